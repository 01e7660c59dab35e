"""``dedup`` and ``decontaminate`` on any file, and decontamination in a run."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from tasks import replay, task
from teacher import Teacher

from selfinstruct.dataset import tables

TEXTS = [
    "Name the three longest rivers of Portugal and say where each of them ends.",
    "Name the three longest rivers of Portugal and say where each one ends.",
    "Write a polite letter that cancels a gym membership.",
    "Write a polite letter that cancels a phone contract and a gym membership.",
    "Add 17 and 25.",
]
ROWS = [{"instruction": text, "n": number, "note": "ação – ok"} for number, text in enumerate(TEXTS)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as out:
            writer = csv.DictWriter(out, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in tables.read(path)]


def by_rouge_score(texts: list[str], threshold: float) -> list[str]:
    scorer, kept = RougeScorer(["rougeL"]), []
    for text in texts:
        if all(scorer.score(other, text)["rougeL"].fmeasure <= threshold for other in kept):
            kept.append(text)
    return kept


@pytest.mark.parametrize("source", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("target", [".jsonl", ".json", ".csv", ".parquet"])
def test_any_file_in_any_file_out(source: str, target: str, run: Any, tmp_path: Path) -> None:
    file, out = write(tmp_path / f"in{source}", ROWS), tmp_path / f"out{target}"
    ended = run("dedup", file, "-o", out, "--json")
    assert ended.returncode == 0, ended.stderr
    kept = by_rouge_score(TEXTS, 0.7)
    assert [row["instruction"] for row in read(out)] == kept
    assert {str(row["note"]) for row in read(out)} == {"ação – ok"}
    report = json.loads(ended.stdout)
    assert (report["read"], report["kept"], report["dropped"]) == (len(TEXTS), len(kept), len(TEXTS) - len(kept))


def test_the_report_says_because_of_whom(run: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "in.jsonl", ROWS)
    ended = run("dedup", file, "-o", tmp_path / "out.jsonl", "--dropped", tmp_path / "why.jsonl")
    why = read(tmp_path / "why.jsonl")
    expected = RougeScorer(["rougeL"]).score(TEXTS[0], TEXTS[1])["rougeL"].fmeasure
    assert why[0] == {
        "row": f"{file}:2",
        "text": TEXTS[1],
        "score": expected,
        "because": f"{file}:1",
        "because_text": TEXTS[0],
    }
    assert f"{file}:2" in ended.stdout


def test_a_field_and_a_threshold_of_ones_own(run: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "in.jsonl", [{"q": text} for text in TEXTS])
    out = tmp_path / "out.jsonl"
    assert run("dedup", file, "-o", out, "--field", "q", "--threshold", "1.0").returncode == 0
    assert len(read(out)) == len(TEXTS)
    assert run("dedup", file, "-o", out, "--field", "q", "--threshold", "0.4").returncode == 0
    assert [row["q"] for row in read(out)] == by_rouge_score(TEXTS, 0.4)


CHINESE = "说出葡萄牙最长的三条河流。"
BUTTONS = "🙂 → 🙃 !?"


def test_texts_of_any_script_are_compared_by_words_of_that_script(run: Any, tmp_path: Path) -> None:
    near = "说出葡萄牙最长的三条河流吧。"
    file = write(tmp_path / "in.jsonl", [{"instruction": text} for text in (CHINESE, CHINESE, near, "写一封信。")])
    ended = run("dedup", file, "-o", tmp_path / "out.jsonl", "--json")
    assert [row["instruction"] for row in read(tmp_path / "out.jsonl")] == [CHINESE, "写一封信。"]
    assert json.loads(ended.stdout)["tokenizer"] == "unicode"
    assert "tokenizer: unicode (not all texts are ASCII" in ended.stderr
    evals = write(tmp_path / "eval.jsonl", [{"instruction": near}])
    ended = run("decontaminate", file, "--against", evals, "-o", tmp_path / "clean.jsonl", "--json")
    assert [row["instruction"] for row in read(tmp_path / "clean.jsonl")] == ["写一封信。"]
    assert json.loads(ended.stdout)["tokenizer"] == "unicode"


@pytest.mark.parametrize("flags", [("--tokenizer", "rouge"), ("--tokenizer", "unicode"), ()])
def test_equal_texts_are_doubles_also_without_a_single_token(flags: tuple[str, ...], run: Any, tmp_path: Path) -> None:
    texts = [BUTTONS, BUTTONS, CHINESE, CHINESE, "", "", BUTTONS + "!"]
    file, out = write(tmp_path / "in.jsonl", [{"instruction": text} for text in texts]), tmp_path / "out.jsonl"
    ended = run("dedup", file, "-o", out, "--dropped", tmp_path / "why.jsonl", *flags)
    assert ended.returncode == 0, ended.stderr
    assert [row["instruction"] for row in read(out)] == [BUTTONS, CHINESE, "", "", BUTTONS + "!"]
    why = [(row["row"], row["score"], row["because"]) for row in read(tmp_path / "why.jsonl")]
    assert why == [(f"{file}:2", 1.0, f"{file}:1"), (f"{file}:4", 1.0, f"{file}:3")]
    assert ("tokenizer:" in ended.stderr) == (not flags)
    evals = write(tmp_path / "eval.jsonl", [{"instruction": text} for text in ("", BUTTONS, CHINESE)])
    assert run("decontaminate", file, "--against", evals, "-o", out, *flags).returncode == 0
    assert [row["instruction"] for row in read(out)] == ["", "", BUTTONS + "!"]


def test_equal_texts_are_doubles_at_a_threshold_that_nothing_exceeds(run: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "in.jsonl", [*ROWS, *ROWS, {"instruction": TEXTS[4].upper()}])
    ended = run("dedup", file, "-o", tmp_path / "out.jsonl", "--threshold", "1.0")
    assert [row["instruction"] for row in read(tmp_path / "out.jsonl")] == [*TEXTS, TEXTS[4].upper()]
    assert "tokenizer: rouge (all texts are ASCII" in ended.stderr


@pytest.mark.parametrize(("language", "tokenizer"), [("pt", "unicode"), ("en", "rouge")])
def test_a_dataset_is_judged_by_the_tokenizer_of_its_run(
    language: str, tokenizer: str, run: Any, tmp_path: Path
) -> None:
    data, out = tmp_path / "data", tmp_path / "out.jsonl"
    assert run("generate", data, "--teacher", "scripted", "--num", 12, "--language", language).returncode == 0
    evals = write(tmp_path / "eval.jsonl", [{"instruction": CHINESE}])
    for command in (("dedup", data), ("dedup", f"{data}@v1"), ("decontaminate", data, "--against", evals)):
        ended = run(*command, "-o", out, "--json")
        assert json.loads(ended.stdout)["tokenizer"] == tokenizer
        assert f"tokenizer: {tokenizer} (as in the dataset's run" in ended.stderr


def test_evaluation_tasks_are_kept_out_of_training_data(run: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "train.jsonl", ROWS)
    evals = write(tmp_path / "eval.json", [{"prompt": TEXTS[1]}, {"prompt": "Nothing like it at all."}])
    other = write(tmp_path / "more.csv", [{"question": TEXTS[4]}])
    out = tmp_path / "clean.jsonl"
    ended = run("decontaminate", file, "--against", evals, "--against", other, "-o", out, "--json")
    assert ended.returncode == 0, ended.stderr
    assert [row["instruction"] for row in read(out)] == [TEXTS[2], TEXTS[3]]
    assert [entry["because"] for entry in json.loads(ended.stdout)["because"]] == [f"{evals}:1"] * 2 + [f"{other}:2"]


def test_a_dataset_of_ours_is_a_file_too(run: Any, tmp_path: Path) -> None:
    data = tmp_path / "data"
    assert run("generate", data, "--teacher", "scripted", "--num", "12").returncode == 0
    ended = run("dedup", f"{data}@v1", "-o", tmp_path / "out.jsonl", "--json")
    assert json.loads(ended.stdout)["kept"] == 12
    assert run("dedup", data, "-o", tmp_path / "out.parquet").returncode == 0


def test_a_run_keeps_drafts_away_from_evaluation_sets(
    run: Any, teacher: Callable[..., Teacher], tmp_path: Path
) -> None:
    tasks = [task(n) for n in range(120)]
    evals = write(tmp_path / "eval.jsonl", [{"instruction": f"{tasks[3]['instruction']} Please."}])
    server, out = teacher(replay(tasks)), tmp_path / "out"
    flags = ("--teacher", "m", "--base-url", server.url, "--num", "60", "--decontaminate", evals)
    assert run("generate", out, *flags).returncode == 0
    status = json.loads(run("status", out, "--json").stdout)
    assert status["rejected"]["contaminated"] == 1
    instructions = {row["instruction"] for row in read(out)}
    assert tasks[3]["instruction"] not in instructions
    assert tasks[4]["instruction"] in instructions
    evals.write_text(json.dumps({"instruction": "Something else altogether."}))
    refused = run("resume", out, "--num", "70")
    assert refused.returncode == 2
    assert "evaluation_sha256" in refused.stderr


def test_a_dry_run_reads_the_evaluation_sets_too(run: Any, tmp_path: Path) -> None:
    start = ("generate", tmp_path / "plan", "--teacher", "scripted", "--dry-run")
    ended = run(*start, "--decontaminate", tmp_path / "missing.jsonl")
    assert (ended.returncode, "missing.jsonl: no such file" in ended.stderr) == (2, True)
    assert "4 tasks was read and judged: 4 kept" in run(*start).stdout
    assert run("generate", tmp_path / "out", "--teacher", "scripted", "--num", 12).returncode == 0
    first = next(row for row in read(tmp_path / "out") if row["request_no"] == 0)
    evals = write(tmp_path / "eval.jsonl", [{"instruction": first["instruction"]}])
    assert "4 tasks was read and judged: 3 kept" in run(*start, "--decontaminate", evals).stdout


@pytest.mark.parametrize("other", ["out.jsonl", "in.jsonl", "sub/../out.jsonl"])
def test_dropped_rows_are_not_written_over_the_kept_ones(other: str, run: Any, tmp_path: Path) -> None:
    file, before = write(tmp_path / "in.jsonl", ROWS), (tmp_path / "in.jsonl").read_bytes()
    (tmp_path / "sub").mkdir()
    ended = run("dedup", file, "-o", tmp_path / "out.jsonl", "--dropped", tmp_path / other)
    assert (ended.returncode, "--dropped" in ended.stderr) == (2, True)
    assert (file.read_bytes(), (tmp_path / "out.jsonl").exists()) == (before, False)


@pytest.mark.parametrize(
    ("against", "output"),
    [
        ("eval.jsonl", "eval.jsonl"),
        ("eval.jsonl", "sub/../eval.jsonl"),
        ("link.jsonl", "eval.jsonl"),
        ("link.jsonl", "link.jsonl"),
        ("eval.jsonl", "link.jsonl"),
        ("eval.jsonl", "folder/eval.jsonl"),
        ("folder/link.jsonl", "eval.jsonl"),
    ],
)
@pytest.mark.parametrize("option", ["-o", "--dropped"])
def test_an_evaluation_set_is_not_written_over(
    option: str, against: str, output: str, run: Any, tmp_path: Path
) -> None:
    file, evals = write(tmp_path / "in.jsonl", ROWS), write(tmp_path / "eval.jsonl", [{"text": TEXTS[0]}])
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.jsonl").symlink_to(evals)
    (tmp_path / "folder").symlink_to(tmp_path)
    before = evals.read_bytes()
    more = () if option == "-o" else ("-o", tmp_path / "new.jsonl")
    ended = run("decontaminate", file, "--against", tmp_path / against, option, tmp_path / output, *more)
    if option == "-o" or (against, output) != ("eval.jsonl", "link.jsonl"):  # that link alone would be replaced
        assert (ended.returncode, f"{option} {tmp_path / output}" in ended.stderr) == (2, True), ended.stderr
    assert evals.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"instruction": "x"}\n{broken\n', "a.jsonl:2"),
        ("a.jsonl", b'{"instruction": "x"}\n[1]\n', "a.jsonl:2"),
        ("a.jsonl", b'{"other": "x"}\n', "--field"),
        ("a.jsonl", b'{"instruction": 3}\n', "a.jsonl:1"),
        ("a.jsonl", b"\xff\xfe", "UTF-8"),
        ("a.json", b'{"instruction": "x"}', "JSON array"),
        ("a.json", b'[{"instruction": "x"}, {', "element 2"),
        ("a.csv", b"instruction,b\nx\n", "a.csv"),
        ("a.csv", b"instruction,b,instruction\nx,y,z\n", "two columns 'instruction'"),
        ("a.parquet", b"PAR1 no", "a.parquet"),
        ("a.xyz", b"", "format"),
    ],
)
def test_broken_files_are_refused_with_the_place(
    name: str, content: bytes, words: str, run: Any, tmp_path: Path
) -> None:
    file, out = tmp_path / name, tmp_path / "out.jsonl"
    file.write_bytes(content)
    ended = run("dedup", file, "-o", out)
    assert ended.returncode == 2
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_spreadsheets_do_not_run_what_a_teacher_wrote(run: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "in.jsonl", [{"instruction": "Compute the sum of two cells.", "output": "=HYPERLINK(1)"}])
    assert run("dedup", file, "-o", tmp_path / "out.csv").returncode == 0
    assert "'=HYPERLINK" in (tmp_path / "out.csv").read_text()


def test_names_of_columns_are_cells_too(run: Any, tmp_path: Path) -> None:
    name = "=cmd|' /C calc'!A0"
    file = write(tmp_path / "in.jsonl", [{name: "x", "instruction": "Compute the sum.", "n": -5, "s": "a\rb\nc"}])
    assert run("dedup", file, "-o", tmp_path / "out.csv").returncode == 0
    row = {f"'{name}": "x", "instruction": "Compute the sum.", "n": "-5", "s": "a\rb\nc"}
    assert read(tmp_path / "out.csv") == [row]


@pytest.mark.parametrize("target", [".csv", ".parquet"])
def test_no_column_of_a_later_row_is_lost(target: str, run: Any, tmp_path: Path) -> None:
    late = [{"instruction": "Add 17 and 25."}, {"note": "late", "instruction": "Write a letter to a friend."}]
    file, out = write(tmp_path / "in.jsonl", late), tmp_path / f"out{target}"
    assert run("dedup", file, "-o", out).returncode == 0
    assert [list(row) for row in read(out)] == [["instruction", "note"]] * 2
    assert [row["note"] or "" for row in read(out)] == ["", "late"]


@pytest.mark.parametrize("late", [{"note": "late"}, {"about": {"by": "me", "at": "home"}}])
@pytest.mark.parametrize("target", [".csv", ".parquet"])
def test_a_column_that_comes_up_after_10_000_rows_has_its_place(
    late: dict[str, Any], target: str, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = [{"text": str(n), "about": {"by": "me"}} for n in range(10_000)]
    out = tmp_path / f"out{target}"
    tables.write(out, [*rows, {**rows[0], **late}])
    found = read(out)
    assert (len(found), list(found[0])) == (10_001, list(found[-1]))
    for name, value in late.items():
        assert found[-1][name] == (json.dumps(value) if target == ".csv" and name == "about" else value)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize(
    ("value", "targets"),
    [
        ("half a pair: \ud800", (".csv", ".parquet")),
        (10**40, (".parquet",)),
        ({}, (".parquet",)),
        (7, (".parquet",)),
        ({"\udfff": 1}, (".csv", ".parquet")),
    ],
)
def test_what_a_format_cannot_hold_is_refused_and_written_as_json(
    value: Any, targets: tuple[str, ...], run: Any, tmp_path: Path
) -> None:
    rows = [{"instruction": TEXTS[0], **({"x": "text"} if value == 7 else {})}, {"instruction": TEXTS[4], "x": value}]
    file, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out"
    for target in targets:
        ended = run("dedup", file, "-o", out.with_suffix(target))
        assert ended.returncode == 2, target
        assert f"out{target}: " in ended.stderr
        assert "row 2 " in ended.stderr or value == {}
        assert "write .jsonl" in ended.stderr
    for target in (".jsonl", ".json"):
        assert run("dedup", file, "-o", out.with_suffix(target)).returncode == 0
        assert read(out.with_suffix(target)) == rows
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.json", "out.jsonl"]


@pytest.mark.parametrize("target", [".jsonl", ".json", ".csv", ".parquet"])
def test_links_planted_where_dedup_writes_are_not_followed(target: str, run: Any, tmp_path: Path) -> None:
    file, victim, shared = write(tmp_path / "in.jsonl", ROWS), tmp_path / "victim", tmp_path / "shared"
    victim.write_text("mine")
    shared.mkdir()
    names = [f"{name}{target}" for name in ("out", "why")]
    for planted in (*names, *(f".{name}.tmp{os.getpid()}" for name in names)):
        (shared / planted).symlink_to(victim)
    ended = run("dedup", file, "-o", shared / names[0], "--dropped", shared / names[1])
    assert ended.returncode == 0, ended.stderr
    assert victim.read_text() == "mine"
    assert sorted(path.name for path in shared.iterdir()) == names
    assert [len(read(shared / name)) for name in names] == [len(by_rouge_score(TEXTS, 0.7)), 2]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.text(min_size=1), st.text() | st.integers() | st.none() | st.lists(st.text()))))
def test_a_json_array_is_read_as_json_reads_it(tmp_path_factory: Any, rows: list[dict[str, Any]]) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    for indent in (None, 2):
        path.write_text(json.dumps(rows, indent=indent), encoding="utf-8")
        assert read(path) == json.loads(path.read_text(encoding="utf-8"))
