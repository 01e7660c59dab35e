"""Table files: what is read is all that is there, and what is written is what was read, in its types."""

from __future__ import annotations

import json
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfinstruct.dataset import columnar, tables
from selfinstruct.errors import UsageError

TEXTS = ["Name the three longest rivers of Portugal.", "Add 17 and 25.", "Write a polite letter to a gym."]
EVERY_TYPE = {
    "int8": pa.array([1, None, 3], pa.int8()),
    "int32": pa.array([1, 2, 3], pa.int32()),
    "uint64": pa.array([2**64 - 1, None, 3], pa.uint64()),
    "half": pa.array([1.5, None, 3], pa.float16()),
    "ns": pa.array([1, None, 3], pa.timestamp("ns", "UTC")),
    "far": pa.array([2**61, None, 3], pa.timestamp("us")),  # a year that Python has not
    "time": pa.array([1, None, 3], pa.time64("ns")),
    "duration": pa.array([1, None, 3], pa.duration("ns")),
    "decimal": pa.array([Decimal("1.20"), None, Decimal("3.00")], pa.decimal128(20, 2)),
    "binary": pa.array([b"\xff", None, b""], pa.binary()),
    "large": pa.array(["a", None, "c"], pa.large_string()),
    "view": pa.array(["a", None, "c"], pa.string_view()),
    "kind": pa.array(["a", None, "a"], pa.dictionary(pa.int8(), pa.string())),
    "empty": pa.array([[], None, []], pa.list_(pa.string())),
    "pairs": pa.array([[("k", "v")], None, []], pa.map_(pa.string(), pa.string())),
    "nested": pa.array([{"t": "x", "at": 3}, None, {}], pa.struct({"t": pa.string(), "at": pa.timestamp("ns")})),
    "nothing": pa.nulls(3),
    "nulls": pa.nulls(3, pa.string()),
}  # fmt: skip


def typed(path: Path) -> pa.Table:
    """A file with columns of every type, and their description."""
    columns = {"instruction": pa.array(TEXTS), **EVERY_TYPE}
    fields = [pa.field(name, column.type, nullable=name != "instruction") for name, column in columns.items()]
    table = pa.table(list(columns.values()), pa.schema(fields, {"about": "mine"}))
    pq.write_table(table, path)
    return pq.read_table(path)


def read(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in tables.read(path)]


@pytest.mark.parametrize("command", ["dedup", "decontaminate"])
def test_every_type_survives_where_rows_are_only_left_out(command: str, run: Any, tmp_path: Path) -> None:
    file, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    before = typed(file)
    if command == "dedup":
        pq.write_table(pa.concat_tables([before, before]), file)
        expected = before
        ended = run("dedup", file, "-o", out)
    else:
        (tmp_path / "eval.jsonl").write_text(json.dumps({"text": TEXTS[1]}))
        expected = pa.concat_tables([before.slice(0, 1), before.slice(2, 1)])
        ended = run("decontaminate", file, "--against", tmp_path / "eval.jsonl", "-o", out)
    assert ended.returncode == 0, ended.stderr
    found = pq.read_table(out)
    assert found.schema.equals(before.schema, check_metadata=True)
    for name in before.column_names:
        assert found[name].equals(expected[name]), name


def test_only_the_columns_that_are_masked_are_written_anew(run: Any, tmp_path: Path) -> None:
    file, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    before = typed(file)
    held = pa.array(["Ask ana@mail.pt.", "Ask nobody.", "Ask rui@mail.pt."])
    at = before.column_names.index("nested")
    held_within = pa.array([{"t": "ana@mail.pt", "at": 3}, None, {"t": "", "at": 5}], EVERY_TYPE["nested"].type)
    pq.write_table(before.set_column(0, "instruction", held).set_column(at, "nested", held_within), file)
    assert run("scrub", file, "-o", out).returncode == 0
    found = pq.read_table(out)
    assert found["instruction"].to_pylist() == ["Ask [EMAIL].", "Ask nobody.", "Ask [EMAIL]."]
    assert found["nested"][0]["t"].as_py() == "[EMAIL]"
    assert [value.value for value in found["nested"].combine_chunks().field("at")] == [3, None, 5]
    for name in set(before.column_names) - {"instruction", "nested"}:
        assert found[name].equals(before[name]), name


@pytest.mark.parametrize("empty", [pa.nulls(10_500, pa.string()), pa.array([[]] * 10_500, pa.list_(pa.string()))])
@pytest.mark.parametrize("command", ["decontaminate", "scrub"])
def test_a_column_that_is_empty_in_10_000_rows_keeps_its_type(
    command: str, empty: pa.Array, run: Any, tmp_path: Path
) -> None:
    value = "late" if pa.types.is_string(empty.type) else ["late"]
    late = pa.concat_arrays([empty, pa.array([value], empty.type)])
    table = pa.table({"text": [f"Task number {n}" for n in range(10_501)], "late": late})
    pq.write_table(table, tmp_path / "in.parquet")
    (tmp_path / "eval.jsonl").write_text('{"text": "Something else."}')
    flags = ("--against", tmp_path / "eval.jsonl") if command == "decontaminate" else ()
    ended = run(command, tmp_path / "in.parquet", *flags, "-o", tmp_path / "out.parquet")
    assert ended.returncode == 0, ended.stderr
    assert pq.read_table(tmp_path / "out.parquet").equals(table)


@pytest.mark.parametrize("source", ["in.parquet", "in.csv"])
@pytest.mark.parametrize("target", ["out.parquet", "out.csv"])
def test_columns_are_written_when_no_row_is_left(source: str, target: str, run: Any, tmp_path: Path) -> None:
    file, out = tmp_path / source, tmp_path / target
    columns = pa.schema([("text", pa.string()), ("tags", pa.list_(pa.string()))])
    if source == "in.csv":
        file.write_text("text,tags\na b c,\n")
        columns = pa.schema([("text", pa.string()), ("tags", pa.string())])
    else:
        pq.write_table(pa.Table.from_pylist([{"text": "a b c", "tags": []}], columns), file)
    assert run("decontaminate", file, "--against", file, "-o", out).returncode == 0
    if target == "out.csv":
        assert out.read_text() == "text,tags\n"
    else:
        assert (pq.read_schema(out), pq.read_table(out).num_rows) == (columns, 0)


def test_the_file_of_dropped_rows_has_its_columns_also_without_rows(run: Any, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a b c"}\n')
    assert (
        run("dedup", tmp_path / "in.jsonl", "-o", tmp_path / "o.csv", "--dropped", tmp_path / "d.csv").returncode == 0
    )
    assert (tmp_path / "d.csv").read_text() == "row,text,score,because,because_text\n"


VALUES = st.one_of(
    *(
        st.lists(st.none() | kind, min_size=1, max_size=6)
        for kind in (
            st.text(st.characters(codec="utf-8")),
            st.integers(-(2**53), 2**53),
            st.booleans(),
            st.integers(-(2**53), 2**53) | st.floats(allow_nan=False),
            st.lists(st.none() | st.integers(-5, 5)),
            st.dictionaries(st.sampled_from("ab"), st.none() | st.lists(st.text("xy")), min_size=1),
        )
    )
)


def filled(value: Any, names: set[str]) -> Any:
    """A row or a structure as a table has it: with all names, none of them missing."""
    return {name: value.get(name) for name in names} if isinstance(value, dict) else value


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from("xyz"), VALUES, min_size=1), st.integers(1, 3))
def test_rows_of_json_fit_one_table_whatever_comes_first(
    tmp_path_factory: Any, columns: dict[str, list[Any]], at_once: int
) -> None:
    out = tmp_path_factory.mktemp("late") / "a.parquet"
    count = max(map(len, columns.values()))
    rows = [{name: values[n] for name, values in columns.items() if n < len(values)} for n in range(count)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columnar, "_ROWS_AT_ONCE", at_once)
        tables.write(out, rows)
    found = read(out)
    inner = {n: {k for v in vs if isinstance(v, dict) for k in v} for n, vs in columns.items()}
    assert found == [{n: filled(row.get(n), inner[n]) for n in found[0]} for row in rows]


@pytest.mark.parametrize("at_once", [1, 2, 10])
def test_a_refusal_tells_the_reason_of_the_row_it_names(
    at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columnar, "_ROWS_AT_ONCE", at_once)
    rows = [{"a": 1, "b": 1}, {"a": 1, "b": ["of row 2"]}, {"a": "of row 3", "b": 1}]
    with pytest.raises(UsageError, match=r"row 2 .*list.*seen: .*of row 2") as caught:
        tables.write(tmp_path / "out.parquet", rows)
    assert "of row 3" not in caught.value.message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"text": "a"}]\n[{"text": "b"}]', "goes on after its array, which ends after element 1"),
        ('[{"text": "a"}] garbage', "goes on after its array, which ends after element 1 (seen: 'garbage')"),
        ("[]]", "goes on after its array, which ends after element 0"),
        ('[{"text": "a"} {"text": "b"}]', "neither a comma nor ] after element 1"),
        ('[{"text": "a"}', "after element 1 (the file ends)"),
        ('[{"text": "a"},, {"text": "b"}]', "element 2"),
        ('[, {"text": "b"}]', "element 1"),
        ('[{"text": "a"},]', "element 2"),
        ("[", "element 1"),
        ("", "not a JSON array"),
    ],
)
def test_a_json_file_holds_one_array_and_nothing_else(text: str, words: str, run: Any, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    ended = run("dedup", tmp_path / "a.json", "-o", tmp_path / "out.jsonl")
    assert (ended.returncode, words in ended.stderr) == (2, True), ended.stderr
    assert not (tmp_path / "out.jsonl").exists()


JSON = st.lists(st.dictionaries(st.text("ab]", max_size=2), st.text('a[],"\\ {}', max_size=4), max_size=2), max_size=3)


@settings(max_examples=300, deadline=None)
@given(JSON, st.integers(1, 9), st.data())
def test_an_array_is_refused_where_json_refuses_it(
    tmp_path_factory: Any, rows: list[dict[str, Any]], chunk: int, data: st.DataObject
) -> None:
    text = json.dumps(rows, indent=data.draw(st.sampled_from([None, 1])))
    at = data.draw(st.integers(0, len(text)))
    text = text[:at] + data.draw(st.sampled_from(["", ",", "]", "[", " ", "x", "{}"])) + text[at:]
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(text, encoding="utf-8")
    try:
        expected = json.loads(text)
    except ValueError:
        expected = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("selfinstruct.dataset.text_rows._CHUNK", chunk)
        patch.setattr("selfinstruct.dataset.text_rows._MAX_ELEMENT", 10_000)
        if isinstance(expected, list) and all(isinstance(row, dict) for row in expected):
            assert read(path) == expected
        else:
            with pytest.raises(UsageError, match=r"a\.json"):
                read(path)


@pytest.mark.parametrize("target", ["out.jsonl", "out.json"])
@pytest.mark.parametrize("source", ["in.jsonl", "in.parquet"])
def test_what_json_has_no_number_for_is_null(source: str, target: str, run: Any, tmp_path: Path) -> None:
    row = {"text": "a b c", "n": float("nan"), "within": [{"n": float("-inf")}, {"n": 1.5}]}
    if source == "in.jsonl":
        (tmp_path / source).write_text(json.dumps(row))
    else:
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / source)
    assert run("dedup", tmp_path / source, "-o", tmp_path / target).returncode == 0
    text = (tmp_path / target).read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert read(tmp_path / target) == [{"text": "a b c", "n": None, "within": [{"n": None}, {"n": 1.5}]}]


def test_a_value_that_python_cannot_hold_is_told_with_its_column(run: Any, tmp_path: Path) -> None:
    typed(tmp_path / "in.parquet")
    ended = run("dedup", tmp_path / "in.parquet", "-o", tmp_path / "out.jsonl")
    assert (ended.returncode, "column 'far'" in ended.stderr) == (2, True), ended.stderr


def test_two_parquet_columns_of_one_name_are_refused(run: Any, tmp_path: Path) -> None:
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "in.parquet")
    for target in ("out.jsonl", "out.parquet"):
        ended = run("dedup", tmp_path / "in.parquet", "-o", tmp_path / target)
        assert (ended.returncode, "two columns 'text'" in ended.stderr) == (2, True), ended.stderr


@settings(max_examples=200, deadline=None)
@given(st.integers() | st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["{}", "+{}"]))
def test_numbers_stay_numbers_in_csv(tmp_path_factory: Any, number: float, form: str) -> None:
    text = str(number) if str(number).startswith("-") else form.format(number)
    folder = tmp_path_factory.mktemp("csv")
    (folder / "in.csv").write_text(f"n,t\n{text},x\n")
    tables.rewrite(folder / "in.csv", folder / "out.csv", lambda place, row: row)
    assert (folder / "out.csv").read_text() == f"n,t\n{text},x\n"


@pytest.mark.parametrize("cell", ["-1+2", "+351 912", "-", "+", "-A1", "-1\n", "=1", "@x", "-1,5", "-٣", "-0x1", "--1"])
def test_what_only_begins_like_a_number_is_guarded_in_csv(cell: str, tmp_path: Path) -> None:
    tables.write(tmp_path / "out.csv", [{"t": cell}])
    assert read(tmp_path / "out.csv") == [{"t": f"'{cell}"}]


def test_what_was_read_of_a_parquet_file_is_let_go(tmp_path: Path) -> None:
    file = tmp_path / "in.parquet"
    with pq.ParquetWriter(file, pa.schema([("text", pa.string())])) as writer:
        for _ in range(40):
            writer.write_table(pa.table({"text": [random.randbytes(500).hex() for _ in range(1000)]}))
    before, most = pa.total_allocated_bytes(), 0

    def turn(_: tables.Place, row: dict[str, Any]) -> dict[str, Any]:
        nonlocal most
        most = max(most, pa.total_allocated_bytes() - before)
        return row

    tables.rewrite(file, tmp_path / "out.parquet", turn)
    assert most < file.stat().st_size
