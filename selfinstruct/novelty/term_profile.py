"""F of a text with every row, for the numpy engine: the bit-parallel LCS turned round, one token of the text at a time.

The bit vectors stand over the rows' positions, so a token touches only the rows that have it: 1.3 updates a row in the
52K instead of a whole comparison. The dozen most common tokens make 90 % of those updates; they keep a mask for every
row, and whole arrays are updated in place. Rows lie in blocks of one length, where F rises with the matches: a block's
best F is that of its most matches, and only the best blocks are looked at row by row.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from selfinstruct.novelty.answers import Profile
from selfinstruct.novelty.bounds import Numbers, f_measures
from selfinstruct.novelty.rouge import f_measure

PLACES = 32  # tokens of the longest row that a 32-bit vector covers: 99.9 % of the 52K
_SIDE = PLACES + 1
_BLOCK = 64  # slots
_DENSE_FROM = 256  # rows that have a token before it gets a mask a slot; and one slot in _DENSE_SHARE must have it
_DENSE_SHARE = 16
_ONES = np.ones(_BLOCK, np.float32)

Vectors = npt.NDArray[np.uint32]
Counts = npt.NDArray[np.uint8]
Fs = npt.NDArray[np.float64]


class TermProfile:
    """An inverted index of all tokens of the rows of up to PLACES tokens; about 120 B a row of 10 tokens.

    A row has a slot; block b holds the slots b * _BLOCK to (b + 1) * _BLOCK of rows of `_length[b]` tokens.
    """

    def __init__(self) -> None:
        self._count = 0  # rows
        self.long_rows: list[int] = []
        self._blocks = 0
        self._next_slot = [0] * _SIDE  # by length; a multiple of _BLOCK where its last block is full
        self._length: Numbers = np.zeros(0, np.int64)
        self._starts: Numbers = np.zeros(0, np.int64)
        self._row: Numbers = np.zeros((0, _BLOCK), np.int64)
        self._unmatched: Vectors = np.zeros(0, np.uint32)  # all ones between two texts
        self._scratch: Vectors = np.zeros((2, 0), np.uint32)
        # By token. 64 bits a slot: numpy would convert 32 at each use, which took half of the profile's time.
        self._slots: list[array[int]] = []
        self._places: list[array[int]] = []
        self._masks: dict[int, Vectors] = {}  # of the common tokens, whose two lists are empty

    def __len__(self) -> int:
        return self._count

    def extend(self, rows: Sequence[Sequence[int]], token_count: int) -> None:
        """Appends rows of token ids, all below `token_count`."""
        new = token_count - len(self._slots)
        self._slots.extend(array("q") for _ in range(new))
        self._places.extend(array("I") for _ in range(new))
        for row, ids in enumerate(rows, self._count):
            if len(ids) > PLACES:
                self.long_rows.append(row)
            elif ids:
                self._place(row, ids)
        self._count += len(rows)

    def _place(self, row: int, ids: Sequence[int]) -> None:
        slot = self._next_slot[len(ids)]
        if slot % _BLOCK == 0:
            if self._blocks == len(self._length):
                self._enlarge()
            self._length[self._blocks] = len(ids)
            slot = self._blocks * _BLOCK
            self._blocks += 1
        self._next_slot[len(ids)] = slot + 1
        self._row[slot // _BLOCK, slot % _BLOCK] = row
        places: dict[int, int] = {}
        for place, token in enumerate(ids):
            places[token] = places.get(token, 0) | 1 << place
        for token, mask in places.items():
            if token in self._masks:
                self._masks[token][slot] = mask
                continue
            slots = self._slots[token]
            slots.append(slot)
            self._places[token].append(mask)
            if len(slots) >= _DENSE_FROM and len(slots) * _DENSE_SHARE >= self._blocks * _BLOCK:
                self._make_dense(token)

    def _enlarge(self) -> None:
        added = len(self._length) // 2 + 8
        slots = added * _BLOCK
        self._length = np.concatenate([self._length, np.zeros(added, np.int64)])
        self._starts = np.arange(0, len(self._length) * _BLOCK, _BLOCK)
        self._row = np.concatenate([self._row, np.zeros((added, _BLOCK), np.int64)])
        self._unmatched = np.concatenate([self._unmatched, np.full(slots, 0xFFFFFFFF, np.uint32)])
        self._scratch = np.empty((2, len(self._unmatched)), np.uint32)
        for token, masks in self._masks.items():
            self._masks[token] = np.concatenate([masks, np.zeros(slots, np.uint32)])

    def _make_dense(self, token: int) -> None:
        self._masks[token] = masks = np.zeros(len(self._unmatched), np.uint32)
        masks[self._slots[token]] = self._places[token]
        self._slots[token], self._places[token] = array("q"), array("I")

    def profile(self, ids: Sequence[int], long_matches: Sequence[int], long_lengths: Sequence[int], k: int) -> Profile:
        """The profile of a text; the two lists hold its common tokens with each of `long_rows` and their lengths."""
        count, m = self._count, len(ids)
        if not count:
            return Profile(0.0, [], 0.0)
        matches, length = self._matches(ids), self._length[: self._blocks]
        top = self._best(matches, _f_by_cell(m), k) if self._blocks else []
        common = matches.reshape(-1, _BLOCK) @ _ONES  # by block: float32 has a faster product, exact up to 2**24
        total = float((common / (m + length)).sum()) * 2  # F = 2 matches / (m + n)
        least = top[-1][1] if len(top) >= max(k, 1) else 0.0
        for row, in_common, n in zip(self.long_rows, long_matches, long_lengths, strict=True):
            f = f_measure(in_common, m, n)
            total += f
            if f and f >= least:
                top.append((row, f))
        top.sort(key=lambda entry: (-entry[1], entry[0]))
        maximum = top[0][1] if top else 0.0
        top = top[:k]
        if len(top) < min(k, count):  # rows without a common token, earliest first
            matched = {row for row, _ in top}
            rest = (row for row in range(count) if row not in matched)
            top += [(row, 0.0) for row, _ in zip(rest, range(min(k, count) - len(top)), strict=False)]
        return Profile(maximum, top, total / count)

    def _matches(self, ids: Sequence[int]) -> Counts:
        """(slots,) common tokens of the text with the row of each slot."""
        size = self._blocks * _BLOCK
        unmatched, hits, rest = self._unmatched[:size], *self._scratch[:, :size]
        for token in ids:
            if (masks := self._masks.get(token)) is not None:
                np.bitwise_and(unmatched, masks[:size], out=hits)
                np.subtract(unmatched, hits, out=rest)
                np.add(unmatched, hits, out=unmatched)
                np.bitwise_or(unmatched, rest, out=unmatched)
            elif token < len(self._slots) and self._slots[token]:
                slots = np.frombuffer(self._slots[token], np.int64)
                vector = unmatched.take(slots)
                found = vector & np.frombuffer(self._places[token], np.uint32)
                unmatched[slots] = (vector + found) | (vector - found)
        matches = np.bitwise_count(np.invert(unmatched, out=hits))
        unmatched.fill(0xFFFFFFFF)
        return matches

    def _best(self, matches: Counts, f_by_cell: Fs, k: int) -> list[tuple[int, float]]:
        """The k best of the rows with F > 0 (the one best for k = 0), in order."""
        k = max(k, 1)
        base = self._length[: self._blocks] * _SIDE
        most = np.maximum.reduceat(matches, self._starts[: self._blocks])  # half the time of max(axis=1)
        best = f_by_cell[base + most]
        # The best rows of k blocks are k rows: none of the k best rows has less.
        least = np.partition(best, len(best) - k)[len(best) - k] if len(best) >= k else 0.0
        blocks = np.flatnonzero((best >= least) & (best > 0))
        f = f_by_cell[base[blocks, None] + matches.reshape(-1, _BLOCK)[blocks]]
        chosen = np.nonzero((f >= least) & (f > 0))
        f, rows = f[chosen], self._row[blocks[chosen[0]], chosen[1]]
        order = np.lexsort((rows, -f))[:k]
        return list(zip(rows[order].tolist(), f[order].tolist(), strict=True))


@lru_cache(maxsize=256)
def _f_by_cell(m: int) -> Fs:
    """F of a text of m tokens by n * _SIDE + matches; 0.0 where nothing matches."""
    table = np.zeros((_SIDE, _SIDE))
    if m:
        lengths, matches = np.arange(1, _SIDE).reshape(-1, 1), np.arange(1, min(m, PLACES) + 1)
        table[1:, 1 : len(matches) + 1] = f_measures(matches, m, lengths)
    return table.reshape(-1)
