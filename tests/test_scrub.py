"""``scrub``: nothing that looks secret or personal is left, in whatever place of whatever file it stands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfinstruct.dataset import tables
from selfinstruct.dataset.scrub import scrub


def read(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in tables.read(path)]


@pytest.mark.parametrize("target", ["out.parquet", "out.jsonl"])
def test_keys_and_values_of_maps_are_looked_at(target: str, run: Any, tmp_path: Path) -> None:
    texts, numbers = pa.map_(pa.string(), pa.string()), pa.map_(pa.int16(), pa.list_(pa.string()))
    pairs = [[("ana@mail.pt", "x"), ("[EMAIL]", "y"), ("rui@mail.pt", "ask eva@mail.pt")], [], None]
    within = [[], [(7, ["ana@mail.pt", None])], None]
    table = pa.table({"t": ["a", "b", "c"], "m": pa.array(pairs, texts), "n": pa.array(within, numbers)})
    pq.write_table(table, tmp_path / "in.parquet")
    ended = run("scrub", tmp_path / "in.parquet", "-o", tmp_path / target, "--json")
    assert json.loads(ended.stdout)["flagged"]["rows"] == 2
    masked = [("[EMAIL] 2", "x"), ("[EMAIL]", "y"), ("[EMAIL] 3", "ask [EMAIL]")]
    if target == "out.parquet":
        numbered = pa.array([[], [(7, ["[EMAIL]", None])], None], numbers)
        expected = pa.table({"t": ["a", "b", "c"], "m": pa.array([masked, [], None], texts), "n": numbered})
        assert pq.read_table(tmp_path / target).equals(expected)
    else:
        assert read(tmp_path / target)[0]["m"] == [list(pair) for pair in masked]
    assert run("scrub", tmp_path / "in.parquet", "-o", tmp_path / target, "--secrets", "drop").returncode == 0
    assert [row["t"] for row in read(tmp_path / target)] == ["c"]


def test_names_of_json_fields_are_masked_and_stay_different(run: Any, tmp_path: Path) -> None:
    row = {"ana@mail.pt": 1, "by": [{"rui@mail.pt": "x", "eva@mail.pt": {"[EMAIL]": 2, "bia@mail.pt": 3}}]}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + '\n{"by": []}\n')
    ended = run("scrub", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--json")
    assert json.loads(ended.stdout)["flagged"] == {"rows": 1, "kinds": {"email": 1}}
    masked = {"[EMAIL]": 1, "by": [{"[EMAIL]": "x", "[EMAIL] 2": {"[EMAIL]": 2, "[EMAIL] 2": 3}}]}
    assert read(tmp_path / "out.jsonl") == [masked, {"by": []}]


@pytest.mark.parametrize("name", ["in.csv", "in.parquet"])
@pytest.mark.parametrize("more", [(), ("-o", "out.jsonl"), ("-o", "out.csv", "--secrets", "drop")])
def test_a_column_that_is_named_after_a_secret_is_refused(
    name: str, more: tuple[str, ...], run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "in.csv":
        Path(name).write_text("t,ana@mail.pt\nx,y\n")
    else:
        pq.write_table(pa.Table.from_pylist([{"t": [{"ana@mail.pt": 1}]}]), name)
    ended = run("scrub", name, *more)
    assert (ended.returncode, "rename it: [EMAIL]" in ended.stderr) == (2, True), ended.stderr
    assert "ana@" not in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == [name]


NAMES = st.sampled_from(["ana@mail.pt", "rui@mail.pt", "[EMAIL]", "[EMAIL] 2", "a", "Call +351 912 345 678."])
NESTED = st.recursive(NAMES | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner))


def shape(value: Any) -> Any:
    """What is left of a value without its texts and names."""
    if isinstance(value, dict):
        return [shape(part) for part in value.values()]
    return [shape(part) for part in value] if isinstance(value, list) else type(value)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(NAMES, NESTED), max_size=3))
def test_what_was_masked_holds_nothing_more_and_loses_no_field(tmp_path_factory: Any, rows: list[Any]) -> None:
    folder = tmp_path_factory.mktemp("scrub")
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = scrub(folder / "in.jsonl", folder / "out.jsonl", drop=False)
    assert shape(read(folder / "out.jsonl")) == shape(rows)
    assert [place.number for place, _ in first.flagged] == [
        number for number, row in enumerate(rows, 1) if "@" in json.dumps(row) or "912" in json.dumps(row)
    ]
    assert not scrub(folder / "out.jsonl", None, drop=False).flagged
