"""The numpy engine's index: rows that share a rare token with a text, at ranks and places that allow enough matches.

`_core.c` explains the bounds. A posting packs row (32 bits), its position in the row, the tokens that
remain from its rank on, and n (10 bits each) into 64 bits. Lists are `array` objects: they grow in place, and numpy
reads them. Long ones are sorted, so by n, when the order is frozen: bisection then finds the lengths that can match.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from selfinstruct.novelty.bounds import LONGEST_INDEXED, Bounds, Numbers

_BLOCK = 65536  # rows posted together when the order is frozen: 5 MB of scratch memory each
_SORTED_FROM = 256  # postings; two bisections cost about as much as sieving that many
_SIEVED = 32768  # postings sieved together: their arrays stay in the second-level cache
# Order of the frozen tokens, from rare to common; tokens met later count down from here, as they are rarer than all.
_FIRST_FROZEN = 2**31

Words = npt.NDArray[np.uint64]
Needs = npt.NDArray[np.uint16]


class Growing:
    """A numpy array that grows at its end; `view` is its used part, valid until the next `extend`."""

    def __init__(self, dtype: Any, width: int = 0) -> None:
        self._array = np.zeros((256, width) if width else 256, dtype)
        self._size = 0
        self.view = self._array[:0]

    def extend(self, values: npt.NDArray[Any]) -> None:
        size = self._size + len(values)
        if size > len(self._array):
            larger = np.zeros((size + size // 2, *self._array.shape[1:]), self._array.dtype)
            larger[: self._size] = self.view
            self._array = larger
        self._array[self._size : size] = values
        self._size = size
        self.view = self._array[:size]

    def append(self, value: int | np.uint64) -> None:
        """`extend` by one number."""
        if self._size == len(self._array):
            self.extend(np.array([value], self._array.dtype))
            return
        self._array[self._size] = value
        self._size += 1
        self.view = self._array[: self._size]


class Prefixes(NamedTuple):
    """The ranks of some texts that are posted and looked up; one element a (text, rank), texts in order."""

    text: Numbers
    token: Numbers
    place: Numbers  # position in the text
    length: Numbers  # tokens of the text
    remaining: Numbers  # tokens from this rank on, itself included

    def postings(self, rows: Numbers) -> Words:
        """(len(text),) postings of these ranks; `rows` holds the row of each element."""
        packed = rows | self.place << 32 | self.remaining << 42 | self.length << 52
        return packed.view(np.uint64)

    def take(self, chosen: Numbers) -> Prefixes:
        return Prefixes(*(column[chosen] for column in self))


class Pairs(NamedTuple):
    """Texts and rows that may match: the row is worth a comparison if `need` common tokens are possible."""

    text: Numbers
    row: Numbers
    need: Numbers

    def take(self, chosen: Numbers) -> Pairs:
        return Pairs(self.text[chosen], self.row[chosen], self.need[chosen])


_ROW_MASK, _TEN_BITS = np.uint64(0xFFFFFFFF), np.uint64(LONGEST_INDEXED)
_PLACE_SHIFT, _REMAINING_SHIFT, _LENGTH_SHIFT = np.uint64(32), np.uint64(42), np.uint64(52)
_NOTHING_FOUND = np.zeros(0, np.uint64), np.zeros(0, np.uint16)
_NO_NUMBERS = np.zeros(0, np.int64)
NO_PAIRS = Pairs(_NO_NUMBERS, _NO_NUMBERS, _NO_NUMBERS)


class PrefixIndex:
    """Postings of the rows' first ranks; texts and rows are flat token ids and lengths of 0 to LONGEST_INDEXED."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._order = array("q")
        self._postings: list[array[int]] = []
        self._sorted: list[int] = []  # the first so many postings of each token
        self._fresh = 0  # tokens met since the order was frozen
        self.frozen_rows = 0

    def meet_tokens(self, count: int) -> None:
        """Gives the token ids below `count` that are new a place in the order."""
        new = count - len(self._postings)
        if new > 0:
            newest = _FIRST_FROZEN - self._fresh
            self._order.extend(range(newest - 1, newest - 1 - new, -1))
            self._fresh += new
            self._postings.extend(array("Q") for _ in range(new))
            self._sorted.extend([0] * new)

    def prefixes(self, flat: Numbers, lengths: Numbers) -> Prefixes:
        """The indexed ranks of texts; `flat` (sum of lengths,) has their token ids."""
        for m in set(lengths.tolist()):
            self._bounds.prepare(m)
        text = np.repeat(np.arange(len(lengths)), lengths)
        first = (np.cumsum(lengths) - lengths)[text]
        rank = np.arange(len(flat)) - first
        length = lengths[text]
        ranked = text << 42 | np.frombuffer(self._order, np.int64)[flat] << 10 | rank
        ranked.sort()
        remaining = length - rank
        chosen = np.flatnonzero(remaining >= self._bounds.least[length])
        place = ranked[chosen] & LONGEST_INDEXED
        return Prefixes(text[chosen], flat[first[chosen] + place], place, length[chosen], remaining[chosen])

    def ranks_of(self, ids: list[int]) -> list[int]:
        """The places of one text's indexed ranks, rarest token first: `prefixes` without numpy's cost a call."""
        self._bounds.prepare(len(ids))
        order = self._order
        ranked = sorted([order[token] << 10 | place for place, token in enumerate(ids)])
        return [key & LONGEST_INDEXED for key in ranked[: max(len(ids) + 1 - self._bounds.least.item(len(ids)), 0)]]

    def search_one(self, ids: list[int], places: list[int]) -> tuple[Words, Needs]:
        """The posted rows (uint64) within the rank bounds of one text, and the matches each needs; rows may repeat.

        The place bound is left out: the few rows that it would drop are left to the signatures.
        """
        lists = [self._postings[ids[place]] for place in places]
        filled = [np.frombuffer(postings, np.uint64) for postings in lists if postings]
        if not filled:
            return _NOTHING_FOUND
        postings = np.concatenate(filled)
        need = self._bounds.flat[len(ids) << 10 :][(postings >> _LENGTH_SHIFT).view(np.int64)]
        counts = list(map(len, lists))
        remaining = np.arange(len(ids), len(ids) - len(lists), -1).astype(np.uint64).repeat(counts)
        passing = (np.minimum((postings >> _REMAINING_SHIFT) & _TEN_BITS, remaining) >= need).nonzero()[0]
        return postings[passing] & _ROW_MASK, need[passing]

    def post_one(self, ids: list[int], places: list[int], row: int) -> None:
        """Adds the ranks of one text."""
        packed = row | len(ids) << 52
        for rank, place in enumerate(places):
            self._postings[ids[place]].append(packed | (len(ids) - rank) << 42 | place << 32)

    def search(self, prefixes: Prefixes) -> Pairs:
        """The posted rows within the bounds of each text; a pair may come more than once."""
        lists = self._possible_lengths(prefixes)
        counts = np.fromiter(map(len, lists), np.int64, len(lists))
        found = []
        for start, end in _batches(np.cumsum(counts)):
            postings = np.frombuffer(b"".join(lists[start:end]), np.uint64)  # cheaper than a numpy view of each list
            some = Prefixes(*(column[start:end] for column in prefixes))
            found.append(self._sieve(postings, counts[start:end], some))
        return Pairs(*map(np.concatenate, zip(*found, strict=True))) if found else NO_PAIRS

    def _possible_lengths(self, prefixes: Prefixes) -> list[array[int]]:
        """For each element the postings of its token; where they are many, without the lengths that cannot match."""
        lists = [self._postings[token] for token in prefixes.token.tolist()]
        long = [e for e, postings in enumerate(lists) if len(postings) >= _SORTED_FROM]
        if long:
            some = prefixes.take(np.array(long))
            lows = self._bounds.low[some.length].tolist()
            highs = self._bounds.high[some.length << 10 | some.remaining].tolist()
            for e, token, low, high in zip(long, some.token.tolist(), lows, highs, strict=True):
                postings, end = lists[e], self._sorted[token]
                first = bisect_left(postings, low << 52, 0, end)
                lists[e] = postings[first : bisect_left(postings, high + 1 << 52, first, end)] + postings[end:]
        return lists

    def join(self, prefixes: Prefixes) -> Pairs:
        """The pairs (text, earlier text) within the bounds, as `search` gives them for texts that are posted."""
        by_token = prefixes.take(np.argsort(prefixes.token, kind="stable"))
        here = np.arange(len(by_token.token))
        opens = np.diff(by_token.token, prepend=-1) != 0
        earlier = here - np.maximum.accumulate(np.where(opens, here, 0))  # elements of the same token before this one
        if not earlier.any():
            return NO_PAIRS
        before = np.cumsum(earlier) - earlier
        partner = np.arange(earlier.sum()) + np.repeat(here - earlier - before, earlier)
        pairs = self._sieve(by_token.postings(by_token.text)[partner], earlier, by_token)
        return pairs.take(np.flatnonzero(pairs.row < pairs.text))

    def _sieve(self, postings: Words, counts: Numbers, prefixes: Prefixes) -> Pairs:
        """The postings that pass the bounds; counts[e] consecutive ones are for element e of `prefixes`."""
        n = (postings >> _LENGTH_SHIFT).view(np.int64)
        need = self._bounds.flat[np.repeat(prefixes.length << 10, counts) + n]
        remaining = (postings >> _REMAINING_SHIFT) & _TEN_BITS
        passing = np.flatnonzero((remaining >= need) & (np.repeat(prefixes.remaining, counts) >= need))
        element = np.searchsorted(np.cumsum(counts), passing, side="right")
        postings, n, needed = postings[passing], n[passing], need[passing].astype(np.int64)
        place, other = prefixes.place[element], ((postings >> _PLACE_SHIFT) & _TEN_BITS).view(np.int64)
        after = np.minimum(prefixes.length[element] - 1 - place, n - 1 - other)
        passing = np.flatnonzero(np.minimum(place, other) + 1 + after >= needed)
        row = (postings[passing] & _ROW_MASK).astype(np.int64)
        return Pairs(prefixes.text[element[passing]], row, needed[passing])

    def post(self, prefixes: Prefixes, rows: Numbers) -> None:
        """Adds ranks; `rows` holds the row of each element."""
        postings = self._postings
        for token, posting in zip(prefixes.token.tolist(), prefixes.postings(rows).tolist(), strict=True):
            postings[token].append(posting)

    def freeze(self, flat: Numbers, lengths: Numbers) -> None:
        """Orders the tokens by their frequency in all rows, and posts all rows again: at each doubling of the pool."""
        frequency = np.bincount(flat, minlength=len(self._postings))
        order = np.empty(len(frequency), np.int64)
        order[np.argsort(frequency, kind="stable")] = _FIRST_FROZEN + np.arange(len(frequency))
        self._order = array("q", order.tobytes())
        self._fresh = 0
        self._postings = [array("Q") for _ in self._postings]
        self._sorted = [0] * len(self._postings)
        self.frozen_rows = len(lengths)
        ends = np.cumsum(lengths)
        for start in range(0, len(lengths), _BLOCK):
            some = lengths[start : start + _BLOCK]
            begin = int(ends[start] - lengths[start])
            self._post_sorted(self.prefixes(flat[begin : begin + int(some.sum())], some), start)
        for token, postings in enumerate(self._postings):
            if len(postings) >= _SORTED_FROM:
                np.frombuffer(postings, np.uint64).sort()
                self._sorted[token] = len(postings)

    def _post_sorted(self, prefixes: Prefixes, first_row: int) -> None:
        """`post` for many rows at once: one append a token rather than a posting."""
        by_token = prefixes.take(np.argsort(prefixes.token, kind="stable"))
        packed = by_token.postings(by_token.text + first_row)
        starts = np.flatnonzero(np.diff(by_token.token, prepend=-1)).tolist()
        for start, end in pairwise([*starts, len(packed)]):
            self._postings[int(by_token.token[start])].frombytes(packed[start:end].tobytes())


def _batches(ends: Numbers) -> Iterator[tuple[int, int]]:
    """Cuts elements with cumulated counts `ends` into stretches of about _SIEVED postings; none if all are empty."""
    start, before = 0, 0
    while start < len(ends) and before < ends[-1]:
        end = max(int(np.searchsorted(ends, before + _SIEVED, side="right")), start + 1)
        yield start, end
        start, before = end, int(ends[end - 1])
