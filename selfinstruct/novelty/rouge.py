"""ROUGE-L between two token lists, with rouge_score's own float64 operations.

rouge_score computes p = L/n, r = L/m and F = 2*p*r/(p+r) in float64, L being the length of the longest common
subsequence. F is symmetric in (m, n), and it rises with L by far more than a rounding error; so `F > threshold` is the
same as `L >= least_matches(m, n, threshold)` with a bound found by those very operations, and a search can work on
integers. The shortcuts are wrong: `2L/(m+n) > 0.7` and `20L > 7(m+n)` both keep 7 common tokens of 7 and 13, whose F is
0.7000000000000001 in float64.
"""

from __future__ import annotations

from collections.abc import Sequence


def f_measure(matches: int, m: int, n: int) -> float:
    """F in [0, 1] for `matches` common tokens in order of texts with m and n tokens; 0.0 when nothing matches."""
    if not matches:
        return 0.0
    precision, recall = matches / n, matches / m
    return 2 * precision * recall / (precision + recall)


def common_subsequence(a_tokens: Sequence[str], b_tokens: Sequence[str]) -> int:
    """Length of the longest common subsequence; bit-parallel (Hyyro 2004) on Python integers, any length."""
    positions: dict[str, int] = {}
    for place, token in enumerate(a_tokens):
        positions[token] = positions.get(token, 0) | 1 << place
    everywhere = (1 << len(a_tokens)) - 1
    unmatched = everywhere
    for token in b_tokens:
        hits = unmatched & positions.get(token, 0)
        unmatched = ((unmatched + hits) | (unmatched - hits)) & everywhere
    return len(a_tokens) - unmatched.bit_count()


def score(a_tokens: Sequence[str], b_tokens: Sequence[str]) -> float:
    """ROUGE-L F in [0, 1], equal to rouge_score's `fmeasure` bit for bit; 0.0 when either list is empty."""
    return f_measure(common_subsequence(a_tokens, b_tokens), len(a_tokens), len(b_tokens))


def least_matches(m: int, n: int, threshold: float) -> int:
    """The fewest common tokens with F > threshold for texts of m and n >= 1 tokens; min(m, n) + 1 when none suffice."""
    most = min(m, n)
    least = min(max(int(threshold * (m + n) / 2), 1), most)
    while least > 1 and f_measure(least - 1, m, n) > threshold:
        least -= 1
    while least <= most and not f_measure(least, m, n) > threshold:
        least += 1
    return least
