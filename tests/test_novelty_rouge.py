"""The float rule: equal to rouge_score bit for bit, and as a table of integers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from selfinstruct.novelty.bounds import NEVER, Bounds, least_matches_many
from selfinstruct.novelty.rouge import common_subsequence, f_measure, least_matches, score

TOKENS = st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), max_size=80)
THRESHOLDS = st.one_of(st.sampled_from([0.1, 0.5, 0.7, 0.9, 1.0]), st.floats(0, 1, exclude_min=True))


@given(TOKENS, TOKENS)
def test_score_equals_rouge_score(a: list[str], b: list[str]) -> None:
    assert score(a, b) == rouge_scorer._score_lcs(a, b).fmeasure == score(b, a)


def test_score_is_zero_without_tokens() -> None:
    assert score([], []) == score(["a"], []) == 0.0


def test_f_measure_equals_rouge_score_at_the_boundary_for_all_lengths_up_to_60() -> None:
    above = 0
    for m in range(1, 61):
        for n in range(1, 61):
            if 7 * (m + n) % 20 == 0 and (matches := 7 * (m + n) // 20) <= min(m, n):
                target = ["t"] * matches + ["x"] * (m - matches)
                prediction = ["t"] * matches + ["y"] * (n - matches)
                f = rouge_scorer._score_lcs(target, prediction).fmeasure
                assert f == f_measure(matches, m, n) == f_measure(matches, n, m)
                assert least_matches(m, n, 0.7) == matches + (f <= 0.7)
                above += f > 0.7
    assert above > 0
    assert f_measure(7, 7, 13) > 0.7 >= f_measure(7, 10, 10)


@given(st.integers(1, 200), st.integers(1, 200), THRESHOLDS)
def test_least_matches_is_the_first_that_suffices(m: int, n: int, threshold: float) -> None:
    suffice = [matches for matches in range(1, min(m, n) + 1) if f_measure(matches, m, n) > threshold]
    assert least_matches(m, n, threshold) == (suffice[0] if suffice else min(m, n) + 1)


@given(st.integers(1, 2000), THRESHOLDS)
def test_tables_equal_the_scalar_rule(m: int, threshold: float) -> None:
    lengths = np.arange(1, 80)
    expected = [least_matches(m, n, threshold) for n in lengths.tolist()]
    assert least_matches_many(m, lengths, threshold).tolist() == expected


@pytest.mark.parametrize("threshold", [0.1, 0.7, 1.0])
def test_bounds_hold_need_and_never(threshold: float) -> None:
    bounds = Bounds(threshold)
    for m in (1, 10, 1023):
        bounds.prepare(m)
        row = bounds.flat[m * 1024 : (m + 1) * 1024].tolist()
        assert row[0] == NEVER
        for n in range(1, 1024):
            need = least_matches(m, n, threshold)
            assert row[n] == (need if need <= min(m, n) else NEVER)
        assert bounds.least[m] == min(row)


@given(TOKENS, TOKENS)
def test_common_subsequence_equals_rouge_score(a: list[str], b: list[str]) -> None:
    assert common_subsequence(a, b) == rouge_scorer._lcs_table(a, b)[-1][-1]
