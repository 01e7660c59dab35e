"""The gate keeps what a plain loop over the rules and rouge_score keeps."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from rouge_score import rouge_scorer

from selfinstruct.languages import LANGUAGES
from selfinstruct.quality.filters import RULES, first_failure, repair
from selfinstruct.quality.gate import Gate
from selfinstruct.records import Draft, SeedTask, Verdict, row_id
from selfinstruct.seeds import bundled, load

CORPUS = Path(__file__).parents[2] / "shared" / "data" / "alpaca_52k.jsonl.gz"
EN = LANGUAGES["en"]
ALL = tuple(RULES)
SEEDS = [SeedTask("s1", "Name the three longest rivers of Europe.", "", "Volga", False)]


def gate(seeds: Sequence[SeedTask] = SEEDS, tokenizer: str = "rouge") -> Gate:
    return Gate(seeds, language=EN, rules=ALL, threshold=0.7, tokenizer=tokenizer)


def draft(instruction: str, input: str = "", output: str = "An answer.", item: int = 0) -> Draft:
    return Draft(0, item, instruction, input, output)


def corpus(start: int, stop: int) -> list[Draft]:
    if not CORPUS.exists():
        pytest.skip("the released 52K is not beside this checkout")
    with gzip.open(CORPUS, "rt", encoding="utf-8") as stream:
        return [draft(**json.loads(line)) for n, line in enumerate(stream) if start <= n < stop]


def plain_loop(seeds: Sequence[SeedTask], drafts: Sequence[Draft]) -> list[bool]:
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    pool, kept, answers = [s.instruction for s in seeds], set(), []
    for given in map(repair, drafts):
        fine = first_failure(given, EN, ALL) == ("", "") and (given.instruction, given.input) not in kept
        fine = fine and not any(scorer.score(x, given.instruction)["rougeL"].fmeasure > 0.7 for x in pool)
        if fine:
            pool.append(given.instruction)
            kept.add((given.instruction, given.input))
        answers.append(fine)
    return answers


def variants(drafts: Sequence[Draft]) -> list[Draft]:
    """Real rows, and near copies of each third: words dropped, doubled or added."""
    made = []
    for n, given in enumerate(drafts):
        made.append(given)
        words = given.instruction.split()
        if n % 3 == 0:
            changed = [words[:-1], words + words[-2:], [*words, "please"], words[: len(words) * 2 // 3]][n // 3 % 4]
            made.append(draft(" ".join(changed), given.input, given.output))
    return made


def test_the_gate_keeps_what_a_plain_loop_over_rouge_score_keeps() -> None:
    drafts = variants(corpus(800, 920))
    seeds = load(bundled("en"))[:20]
    judged = gate(seeds)
    kept = [judged.judge(d)[1].accepted for d in drafts]
    assert kept == plain_loop(seeds, drafts)
    assert 15 < kept.count(False) < 100


def test_a_verdict_names_the_rule_or_the_nearest() -> None:
    judged = gate()
    assert judged.judge(draft("Write a haiku about rain."))[1] == Verdict(True)
    seen = judged.judge(draft("Name the three longest rivers of Asia."))[1]
    assert (seen.accepted, seen.rule, seen.nearest_id) == (False, "not_new", "s1")
    assert seen.score == pytest.approx(12 / 14)
    near = judged.judge(draft("Write a short haiku about rain."))[1]
    assert (near.rule, near.nearest_id) == ("not_new", row_id("Write a haiku about rain.", ""))
    assert judged.judge(draft("Describe this image to me."))[1] == Verdict(False, "forbidden_word", "image")


def test_a_draft_that_breaks_a_rule_is_no_neighbour_of_later_ones() -> None:
    judged = gate()
    assert judged.judge(draft("Write a haiku about rain.", output=""))[1].rule == "no_output"
    assert judged.judge(draft("Write a haiku about rain."))[1].accepted
    assert not judged.judge(draft("Write a haiku about rain now."))[1].accepted


def test_the_order_of_drafts_matters() -> None:
    a, b, c = (
        draft("one two three four five six"),
        draft("one two three four five six seven eight"),
        draft("three four five six seven eight"),
    )
    first, second = gate(), gate()
    assert [first.judge(x)[1].accepted for x in (a, b, c)] == [True, False, True]
    assert [second.judge(x)[1].accepted for x in (b, a, c)] == [True, False, False]


def test_a_seed_is_compared_with_and_never_filtered() -> None:
    odd = SeedTask("odd", "Draw.", "", "", False)
    assert gate([odd]).judge(draft("Draw."))[1].rule == "length"
    assert gate([odd]).judge(draft("Write a haiku about rain."))[1].accepted


def test_the_draft_comes_back_as_repaired() -> None:
    mended, verdict = gate().judge(draft("Write a haiku about rain.", "<noinput>"))
    assert (mended.input, mended.repairs, verdict.accepted) == ("", ("no_input",), True)


def test_the_same_row_without_a_word_that_rouge_sees_is_a_duplicate() -> None:
    pt = LANGUAGES["pt"]
    judged = Gate([], language=pt, rules=(), threshold=0.7, tokenizer="rouge")
    assert judged.judge(draft("你好 吗"))[1].accepted
    assert judged.judge(draft("你好 吗"))[1].rule == "duplicate"
    assert judged.judge(draft("你好 吗", "x"))[1].accepted


def test_restored_rows_give_the_same_later_verdicts() -> None:
    drafts = variants(corpus(800, 920))
    whole, earlier, later = gate(), gate(), gate()
    expected = [whole.judge(d) for d in drafts]
    before = [earlier.judge(d) for d in drafts[:80]]
    later.restore((d.instruction, d.input) for d, verdict in before if verdict.accepted)
    assert [later.judge(d) for d in drafts[80:]] == expected[80:]
