"""Seed files: what is read, what is refused and how it is said; and the seeds that ship."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
from rouge_score import rouge_scorer
from rouge_score.tokenize import tokenize

from selfinstruct.errors import SeedFileError, UsageError
from selfinstruct.languages import LANGUAGES
from selfinstruct.quality.filters import RULES, first_failure, repair
from selfinstruct.records import Draft, SeedTask
from selfinstruct.seeds import MAX_LINE_CHARS, bundled, digest, load, read

EVALUATION = Path(__file__).parents[2] / "shared" / "data" / "user_oriented_252.jsonl"
GOOD = {"instruction": "Name a river.", "instances": [{"input": "", "output": "Douro"}], "is_classification": False}


def line(**changed: object) -> str:
    return json.dumps(GOOD | changed, ensure_ascii=False)


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "seeds.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


GOOD_FILES = {
    "plain": line(id="a") + "\n" + line(id="b") + "\n",
    "no line break at the end": line(id="a") + "\n" + line(id="b"),
    "byte order mark": b"\xef\xbb\xbf" + (line(id="a") + "\n" + line(id="b")).encode(),
    "windows line ends": line(id="a") + "\r\n" + line(id="b") + "\r\n",
    "blank lines": "\n\n" + line(id="a") + "\n  \n\n" + line(id="b") + "\n\n",
    "numbers as ids": line(id=1) + "\n" + line(id=2),
    "no ids": line() + "\n" + line(),
    "flat": '{"instruction": "Name a river.", "input": "", "output": "Douro"}\n' * 2,
    "other keys": line(id="a", name="x", more=[1]) + "\n" + line(id="b", more=None),
    "U+2028 in a text": line(id="a", note="a\u2028b\x85c") + "\n" + line(id="b"),
}


@pytest.mark.parametrize("name", GOOD_FILES)
def test_a_good_file_is_read_whole(name: str, tmp_path: Path) -> None:
    tasks = load(written(tmp_path, GOOD_FILES[name]))
    assert [(t.instruction, t.input, t.output) for t in tasks] == [("Name a river.", "", "Douro")] * 2
    assert len({t.task_id for t in tasks}) == 2


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ((line(id="a"), line(id="a")), ":2: id 'a' was used on line 1; give"),
        ((line(), line(id="seed_task_0")), ":2: id 'seed_task_0' is what line 1, which has none, is called; give"),
        ((line(id="seed_task_1"), line()), ":2: has no id, and the one that it would get, 'seed_task_1', was used on"),
    ],
)
def test_an_id_twice_is_told_by_what_stands_in_the_lines(lines: tuple[str, str], said: str, tmp_path: Path) -> None:
    _, problems = read(written(tmp_path, "\n".join(lines)))
    assert len(problems) == 1
    assert said in problems[0]


BAD_LINES = {
    "broken JSON": ('{"instruction": "a', "not JSON"),
    "not JSON": ("instruction: a", "not JSON"),
    "an array": ("[1]", "not an object"),
    "a text": ('"a"', "not an object"),
    "null": ("null", "not an object"),
    "no instruction": ('{"instances": [{"output": "a"}]}', 'no "instruction"'),
    "no instances": ('{"instruction": "a"}', 'no "instances"'),
    "no output": ('{"instruction": "a", "instances": [{"input": "b"}]}', 'no "output"'),
    "empty instances": ('{"instruction": "a", "instances": []}', "not a list with an object"),
    "instances no list": ('{"instruction": "a", "instances": {"output": "b"}}', "not a list with an object"),
    "instances of texts": ('{"instruction": "a", "instances": ["b"]}', "not a list with an object"),
    "instruction a number": (line(instruction=7), '"instruction" is a int'),
    "instruction null": (line(instruction=None), '"instruction" is a NoneType'),
    "instruction empty": (line(instruction=" \n"), '"instruction" is empty'),
    "output a list": (line(instances=[{"output": ["b"]}]), '"output" is a list'),
    "output empty": (line(instances=[{"output": ""}]), '"output" is empty'),
    "input null": (line(instances=[{"input": None, "output": "b"}]), '"input" is a NoneType'),
    "NaN": ('{"instruction": "a", "input": NaN, "output": "b"}', "not a number or text"),
    "flag a text": (line(is_classification="yes"), "write true or false"),
    "id a list": (line(id=[1]), "write a non-empty text"),
    "id empty": (line(id=""), "write a non-empty text"),
    "id true": (line(id=True), "write a non-empty text"),
    "deep": ("[" * 100_000, "nested too deep"),
    "a long number": ('{"a": ' + "9" * 10_000 + "}", "number too long"),
    "half a character": ('{"instruction": "\\ud800", "input": "", "output": "b"}', "lone surrogate"),
    "half a character in the id": (line().replace("{", '{"id": "\\ud800", ', 1), "lone surrogate"),
    "half a character elsewhere": (line(id="a").replace("{", '{"more": [{"\\udfff": 1}], ', 1), "lone surrogate"),
    "a key twice": ('{"instruction": "a", "instruction": "b", "output": "c"}', '"instruction" is there twice'),
    "a key twice inside": ('{"instruction": "a", "instances": [{"output": "b", "output": "c"}]}', '"output" is there'),
    "a huge line": ('{"instruction": "' + "a" * MAX_LINE_CHARS + '"}', "characters in one line"),
    "NULs": ("\x00\x00\x01", "not JSON"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_with_its_place_what_and_remedy(name: str, tmp_path: Path) -> None:
    bad, what = BAD_LINES[name]
    path = written(tmp_path, f"{line(id='a')}\n\n{bad}\n{line(id='b')}\n")
    with pytest.raises(SeedFileError) as caught:
        load(path)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}:3: ")
    assert what in problem
    assert len(problem) < len(str(path)) + 200
    assert caught.value.exit_code == 2
    assert "seeds check" in caught.value.hint
    assert [t.task_id for t in read(path)[0]] == ["a", "b"]


def test_all_bad_lines_are_named_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, "\n".join(bad for bad, _ in BAD_LINES.values()))
    with pytest.raises(SeedFileError) as caught:
        load(path)
    places = [problem.removeprefix(f"{path}:").split(":")[0] for problem in caught.value.problems]
    assert places == [str(n) for n in range(1, len(BAD_LINES) + 1)]
    assert f"{len(BAD_LINES)} problem(s)" in caught.value.message


def test_many_problems_are_counted_and_not_all_printed(tmp_path: Path) -> None:
    with pytest.raises(SeedFileError) as caught:
        load(written(tmp_path, "x\n" * 1000))
    assert caught.value.problems[-1] == "... and 950 more"


def test_an_id_used_twice_names_both_lines(tmp_path: Path) -> None:
    path = written(tmp_path, line(id="a") + "\n" + line(id="b") + "\n" + line(id="a"))
    with pytest.raises(SeedFileError, match=r":3: id 'a' was used on line 1; give each task its own"):
        load(path)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "no tasks in it"),
        (b"\n \r\n\n", "no tasks in it"),
        (b"\xef\xbb\xbf", "no tasks in it"),
        (line().encode() + b"\n\xff\xfe{}", ":2: not UTF-8 (byte 0xff)"),
        (bytes(range(256)) * 100, ":2: not UTF-8 (byte 0x80)"),
        (line().encode("utf-16"), ":1: not UTF-8"),
    ],
)
def test_an_unreadable_file_is_one_clear_problem(content: bytes, what: str, tmp_path: Path) -> None:
    with pytest.raises(SeedFileError) as caught:
        load(written(tmp_path, content))
    assert what in caught.value.problems[0]


def test_a_folder_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SeedFileError, match="is a folder"):
        load(tmp_path)
    with pytest.raises(SeedFileError, match="no such file"):
        load(tmp_path / "none.jsonl")
    with pytest.raises(SeedFileError, match="cannot be read"):
        load(tmp_path / ("n" * 300))


def test_the_digest_is_of_the_content_in_order() -> None:
    a, b = SeedTask("a", "x", "", "y", False), SeedTask("b", "x", "", "y", False)
    changed = SeedTask("a", "x", "y", "", False)
    prints = [digest(x) for x in ([a, b], [b, a], [a], [changed, b], [])]
    assert len(set(prints)) == 5
    assert digest([a, b]) == prints[0]


def test_a_language_without_seeds_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no seed tasks ship for language 'xx'") as caught:
        bundled("xx")
    assert "--seeds" in caught.value.hint


# --- the seeds that ship ---------------------------------------------------------------------------------------------


def alike(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs above 0.7; rouge_score is asked where as many equal words, in whatever order, would be enough."""
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    words = cache(lambda text: Counter(tokenize(text, None)))
    near = []
    for a, b in pairs:
        m, n = words(a), words(b)
        if 2 * (m & n).total() >= 0.7 * (m.total() + n.total()) and scorer.score(a, b)["rougeL"].fmeasure > 0.7:
            near.append((a, b))
    return near


def test_the_english_seeds_are_enough_and_of_many_kinds() -> None:
    tasks = load(bundled("en"))
    assert len(tasks) >= 175
    assert sum(t.is_classification for t in tasks) >= 25
    assert 0.25 <= sum(not t.input for t in tasks) / len(tasks) <= 0.45
    assert len({t.instruction.split()[0] for t in tasks}) >= 40
    assert len({t.output for t in tasks}) >= len(tasks) * 0.8


@pytest.mark.parametrize("code", LANGUAGES)
def test_no_seed_that_ships_breaks_our_own_rules(code: str) -> None:
    for t in load(bundled(code)):
        draft = Draft(0, 0, t.instruction, t.input, t.output)
        assert repair(draft) is draft, t.task_id
        assert first_failure(draft, LANGUAGES[code], tuple(RULES)) == ("", ""), t.task_id


@pytest.mark.parametrize("code", LANGUAGES)
def test_no_two_seeds_that_ship_are_alike(code: str) -> None:
    assert alike(combinations([t.instruction for t in load(bundled(code))], 2)) == []


def test_the_check_for_likeness_finds_likeness() -> None:
    pair = ("Name the three longest rivers of Europe.", "Name the two longest rivers of Europe.")
    assert alike([pair, (pair[0], "Write a haiku about rain.")]) == [pair]


@pytest.mark.skipif(not EVALUATION.exists(), reason="the 252 evaluation tasks are not beside this checkout")
def test_no_english_seed_is_near_an_evaluation_task() -> None:
    asked = [json.loads(x)["instruction"] for x in EVALUATION.read_text(encoding="utf-8").splitlines()]
    assert len(asked) == 252
    assert alike((t.instruction, x) for t in load(bundled("en")) for x in asked) == []
