"""F of a text with every row, for the numpy engine: the bit-parallel LCS turned round, one token of the text at a time.

The bit vectors stand over the rows' positions, so a token touches only the rows that have it: 1.3 updates a row in the
52K instead of a whole comparison. Rows are then counted by (length, matches), and F is computed once a cell.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from selfinstruct.novelty.answers import Profile
from selfinstruct.novelty.bounds import Numbers, f_measures
from selfinstruct.novelty.prefixes import Growing
from selfinstruct.novelty.rouge import f_measure

PLACES = 32  # tokens of the longest row that a 32-bit vector covers: 99.9 % of the 52K
_SIDE = PLACES + 1
_ALL = np.uint32(0xFFFFFFFF)

Cells = npt.NDArray[np.uint16]
Fs = npt.NDArray[np.float64]


class TermProfile:
    """An inverted index of all tokens of the rows of up to PLACES tokens; 120 B a row of 10 tokens."""

    def __init__(self) -> None:
        # By token. 64 bits a row id: numpy would convert 32 at each use, which took half of the profile's time.
        self._rows: list[array[int]] = []
        self._places: list[array[int]] = []
        self._base = Growing(np.uint16)  # n * _SIDE of each row, 0 for those in `long_rows`
        self.long_rows: list[int] = []

    def __len__(self) -> int:
        return len(self._base.view)

    def extend(self, rows: Sequence[Sequence[int]], token_count: int) -> None:
        """Appends rows of token ids, all below `token_count`."""
        new = token_count - len(self._rows)
        self._rows.extend(array("q") for _ in range(new))
        self._places.extend(array("I") for _ in range(new))
        base = np.zeros(len(rows), np.uint16)
        for offset, ids in enumerate(rows):
            row = len(self) + offset
            if len(ids) > PLACES:
                self.long_rows.append(row)
                continue
            base[offset] = len(ids) * _SIDE
            places: dict[int, int] = {}
            for place, token in enumerate(ids):
                places[token] = places.get(token, 0) | 1 << place
            for token, mask in places.items():
                self._rows[token].append(row)
                self._places[token].append(mask)
        self._base.extend(base)

    def profile(self, ids: Sequence[int], long_matches: Sequence[int], long_lengths: Sequence[int], k: int) -> Profile:
        """The profile of a text; the two lists hold its common tokens with each of `long_rows` and their lengths."""
        count = len(self)
        if not count:
            return Profile(0.0, [], 0.0)
        m = len(ids)
        cells = self._cells(ids)
        f_by_cell = _f_by_cell(m)
        rows_by_cell = np.bincount(cells, minlength=_SIDE * _SIDE)
        top = _best(cells, f_by_cell, rows_by_cell, k)
        total = float(rows_by_cell @ f_by_cell)
        for row, matches, n in zip(self.long_rows, long_matches, long_lengths, strict=True):
            f = f_measure(matches, m, n)
            total += f
            if f:
                top.append((row, f))
        top = sorted(top, key=lambda entry: (-entry[1], entry[0]))
        maximum = top[0][1] if top else 0.0
        top = top[:k]
        if len(top) < min(k, count):  # rows without a common token, earliest first
            matched = {row for row, _ in top}
            rest = (row for row in range(count) if row not in matched)
            top += [(row, 0.0) for row, _ in zip(rest, range(min(k, count) - len(top)), strict=False)]
        return Profile(maximum, top, total / count)

    def _cells(self, ids: Sequence[int]) -> Cells:
        """(rows,) n * _SIDE + matches of each row; 0 for the long ones."""
        unmatched = np.full(len(self), _ALL)
        for token in ids:
            if token >= len(self._rows) or not self._rows[token]:
                continue
            rows = np.frombuffer(self._rows[token], np.int64)
            vector = unmatched.take(rows)
            hits = vector & np.frombuffer(self._places[token], np.uint32)
            unmatched[rows] = (vector + hits) | (vector - hits)
        return np.asarray(self._base.view + np.bitwise_count(~unmatched))


def _f_by_cell(m: int) -> Fs:
    """F of a text of m tokens by n * _SIDE + matches; 0.0 where nothing matches."""
    table = np.zeros((_SIDE, _SIDE))
    if m:
        lengths, matches = np.arange(1, _SIDE).reshape(-1, 1), np.arange(1, min(m, PLACES) + 1)
        table[1:, 1 : len(matches) + 1] = f_measures(matches, m, lengths)
    return table.reshape(-1)


def _best(cells: Cells, f_by_cell: Fs, rows_by_cell: Numbers, k: int) -> list[tuple[int, float]]:
    """At least the k best of the rows with F > 0, and no row below them; the best one even for k = 0."""
    filled = np.flatnonzero((rows_by_cell > 0) & (f_by_cell > 0))
    if not len(filled):
        return []
    falling = filled[np.argsort(-f_by_cell[filled], kind="stable")]
    enough = int(np.searchsorted(np.cumsum(rows_by_cell[falling]), max(k, 1)))
    least = f_by_cell[falling[min(enough, len(falling) - 1)]]
    wanted = np.zeros(len(f_by_cell), np.bool_)
    wanted[filled] = f_by_cell[filled] >= least
    rows = np.flatnonzero(wanted.take(cells))
    return list(zip(rows.tolist(), f_by_cell[cells[rows]].tolist(), strict=True))
