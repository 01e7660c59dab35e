"""The float rule as tables of integers, for the numpy engine: `rouge.least_matches` of many length pairs at once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# Tokens. A posting has 10 bits for a length, a rank and a position; longer rows are compared one by one.
LONGEST_INDEXED = 1023
NEVER = 0xFFFF

Numbers = npt.NDArray[np.int64]


def f_measures(matches: Numbers, m: Numbers | int, n: Numbers) -> npt.NDArray[np.float64]:
    """`rouge.f_measure` elementwise, by the same float64 operations; `matches`, `m` and `n` must be above 0."""
    precision, recall = matches / n, matches / m
    return np.asarray(2 * precision * recall / (precision + recall))


def least_matches_many(m: int, n: Numbers, threshold: float) -> Numbers:
    """`rouge.least_matches(m, n_i, threshold)` for each n_i >= 1; min(m, n_i) + 1 where nothing suffices."""
    most = np.minimum(m, n)
    least = np.clip((threshold * (m + n) / 2).astype(np.int64), 1, most)
    while (lower := (least > 1) & (f_measures(np.maximum(least - 1, 1), m, n) > threshold)).any():
        least -= lower
    while (higher := (least <= most) & ~(f_measures(least, m, n) > threshold)).any():
        least += higher
    return least


class Bounds:
    """need(m, n) for one threshold and lengths up to LONGEST_INDEXED; a row is filled when its length is first met.

    `flat[m * 1024 + n]` (uint16) is the least number of common tokens, NEVER where no number suffices; `least[m]` is
    its minimum over n: a text of m tokens needs at least that many matches with any row. `low[m]` is the shortest n
    that can match, `high[m * 1024 + r]` (uint16) the longest whose need is at most r, 0 without one.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.flat = np.zeros((LONGEST_INDEXED + 1) ** 2, np.uint16)  # untouched pages stay unmapped
        self.least = np.zeros(LONGEST_INDEXED + 1, np.int64)  # 0: not filled yet
        self.least[0] = NEVER
        self.low = np.zeros(LONGEST_INDEXED + 1, np.int64)
        self.high = np.zeros((LONGEST_INDEXED + 1) ** 2, np.uint16)
        self._lengths = np.arange(1, LONGEST_INDEXED + 1, dtype=np.int64)

    def prepare(self, m: int) -> None:
        """Makes the row of m (1 to LONGEST_INDEXED) usable."""
        if self.least[m]:
            return
        need = least_matches_many(m, self._lengths, self.threshold)
        need[need > np.minimum(m, self._lengths)] = NEVER
        self.flat[m * (LONGEST_INDEXED + 1) + 1 : (m + 1) * (LONGEST_INDEXED + 1)] = need
        self.flat[m * (LONGEST_INDEXED + 1)] = NEVER
        self.least[m] = need.min()
        self.low[m] = np.argmax(need < NEVER) + 1
        from_here_on = np.minimum.accumulate(need[::-1])[::-1]
        reachable = np.searchsorted(from_here_on, np.arange(LONGEST_INDEXED + 1), side="right")
        self.high[m * (LONGEST_INDEXED + 1) : (m + 1) * (LONGEST_INDEXED + 1)] = reachable
