"""What to answer: rows with an instruction and perhaps an input, from a file or a dataset of ours."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfinstruct.errors import UsageError

_MOST_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class Question:
    """Row ``row`` (from 0) of the source. ``reference`` is the answer that stood there, None without one."""

    row: int
    instruction: str
    input: str = ""
    reference: str | None = None


def read(source: str, split: str = "train") -> list[Question]:
    """Read ``FILE`` (.jsonl, .json, .parquet, .csv) or a dataset folder ``DATASET[@v]``.

    A row has ``instruction`` (or ``prompt``), and may have ``input`` and ``output``. Raises UsageError that lists
    the bad rows.
    """
    path = Path(source)
    if path.is_file():
        rows = _read_file(path)
    else:
        name, at, version = source.rpartition("@")
        folder, version = (Path(name), version) if at and not path.is_dir() else (path, "latest")
        if not folder.is_dir():
            raise UsageError(f"{source}: no such file or dataset", hint="give a .jsonl, .json, .parquet or .csv file")
        from selfinstruct.dataset import store

        found = store.find(folder, version)
        files = found.files(split)
        if not files:
            raise UsageError(f"{source}: has no split {split!r}", hint=f"it has {', '.join(store.SPLITS)}")
        rows = [row for file in files for row in _read_parquet(file)]
    return _questions(source, rows)


def _read_file(path: Path) -> list[Any]:
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            return _read_parquet(path)
        text = path.read_text(encoding="utf-8-sig")
        if kind == ".csv":
            return list(csv.DictReader(text.splitlines(keepends=True)))
        if kind == ".json":
            found = json.loads(text)
            return found if isinstance(found, list) else [found]
        if kind == ".jsonl":
            return [_line(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from error
    raise UsageError(f"{path}: unknown kind of file", hint="give a .jsonl, .json, .parquet or .csv file")


def _line(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None  # reported with its number, among all bad rows


def _read_parquet(path: Path) -> list[Any]:
    import pyarrow.lib
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
        wanted = [name for name in ("instruction", "prompt", "input", "output") if name in names]
        rows: list[Any] = pyarrow.parquet.read_table(path, columns=wanted).to_pylist()
    except pyarrow.lib.ArrowException as error:
        raise UsageError(f"{path}: is no Parquet file ({error})") from error
    return rows


def _questions(source: str, rows: Iterable[Any]) -> list[Question]:
    questions, problems = [], []
    for number, row in enumerate(rows):
        problem = _problem(row)
        if problem:
            problems.append(f"  row {number + 1}: {problem}")
            continue
        reference = row.get("output")
        questions.append(
            Question(
                number,
                row.get("instruction") or row.get("prompt"),
                row.get("input") or "",
                reference if isinstance(reference, str) else None,
            )
        )
    if problems:
        shown = problems[:_MOST_PROBLEMS]
        more = [f"  and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
        raise UsageError("\n".join([f"{source}: {len(problems)} bad rows", *shown, *more]))
    if not questions:
        raise UsageError(f"{source}: has no rows")
    return questions


def _problem(row: Any) -> str:
    if not isinstance(row, Mapping):
        return "is no JSON object"
    instruction = row.get("instruction") or row.get("prompt")
    if not isinstance(instruction, str) or not instruction.strip():
        return "has no instruction"
    if not isinstance(row.get("input") or "", str):
        return "its input is no text"
    return ""
