"""The numpy engine's last step: the longest common subsequence of a text with a few rows, by rapidfuzz."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt
from rapidfuzz.distance import LCSseq
from rapidfuzz.process import cdist

from selfinstruct.novelty.answers import KEPT, Novelty
from selfinstruct.novelty.rouge import f_measure

_CODE_POINTS = 0x110000
_CDIST_FROM = 16  # rows; for fewer, single calls spare cdist's set-up (a chosen number, not a measured one)

# Token ids, as one code point each: rapidfuzz is 5 times as fast on str as on lists. A row with an id beyond the code
# points is a list; rapidfuzz compares both kinds by number.
Row = str | list[int]


def row_of(ids: list[int]) -> Row:
    return ids if max(ids, default=0) >= _CODE_POINTS else "".join(map(chr, ids))


def rows_of(ids: list[list[int]], flat: npt.NDArray[np.int64]) -> list[Row]:
    """`row_of` each text; `flat` (sum of lengths,) has all their token ids."""
    if len(flat) and flat.max() >= _CODE_POINTS:
        return [row_of(text) for text in ids]
    joined, ends = flat.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass"), accumulate(map(len, ids))
    return [joined[start:end] for start, end in pairwise([0, *ends])]


def common_tokens(text: Row, candidates: Sequence[int], rows: Sequence[Row]) -> list[int]:
    """Length of the longest common subsequence of the text with each candidate, an index into `rows`."""
    if len(candidates) < _CDIST_FROM:
        return [LCSseq.similarity(text, rows[row]) for row in candidates]
    common = cdist([text], [rows[row] for row in candidates], scorer=LCSseq.similarity, dtype=np.int32)
    return [int(matches) for matches in common[0].tolist()]


class Best:
    """The highest F, then the earliest row, among the rows that a text was compared with."""

    def __init__(self) -> None:
        self.score, self.row = 0.0, -1

    def take(self, score: float, row: int) -> None:
        if score > self.score or (score == self.score and row < self.row):
            self.score, self.row = score, row

    def compare(self, text: Row, needed: dict[int, int], rows: Sequence[Row]) -> Best:
        """Takes the rows that have the common tokens they need with the text; `needed` has the number by row."""
        for row, matches in zip(needed, common_tokens(text, list(needed), rows), strict=True):
            if matches >= needed[row]:
                self.take(f_measure(matches, len(text), len(rows[row])), row)
        return self

    def answer(self) -> Novelty:
        return KEPT if self.row < 0 else Novelty(False, self.score, self.row)
