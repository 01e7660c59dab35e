"""What to answer: rows with an instruction and perhaps an input, from a file or a dataset of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfinstruct.dataset import store, tables
from selfinstruct.errors import UsageError
from selfinstruct.student.examples import listed, published
from selfinstruct.student.prompt import is_unicode


@dataclass(frozen=True, slots=True)
class Question:
    """Row ``row`` (from 0) of the source. ``reference`` is the answer that stood there, None without one."""

    row: int
    instruction: str
    input: str = ""
    reference: str | None = None


def read(source: str, split: str = "train") -> list[Question]:
    """Read a .jsonl, .json, .parquet or .csv file, or a split of ``DATASET[@v]``.

    A row has ``instruction`` (or ``prompt``), and may have ``input`` and ``output``. Raises UsageError that lists
    the bad rows.
    """
    version = published(source)
    files = [Path(source)] if version is None else version.files(split)
    if not files:
        raise UsageError(f"{source}: has no split {split!r}", hint=f"it has {', '.join(store.SPLITS)}")
    questions: list[Question] = []
    problems: list[str] = []
    for place, row in (found for file in files for found in tables.read(file)):
        problem = _problem(row)
        if problem:
            problems.append(f"{place}: {problem}")
            continue
        instruction, context, reference = _instruction(row), row.get("input") or "", row.get("output")
        reference = reference if isinstance(reference, str) else None
        questions.append(Question(len(questions), instruction, context, reference))
    if problems:
        raise UsageError(listed(source, problems), hint="every row needs the text instruction, and may have input")
    if not questions:
        raise UsageError(f"{source}: has no rows")
    return questions


def _instruction(row: Mapping[str, Any]) -> Any:
    return row.get("instruction") or row.get("prompt")


def _problem(row: Mapping[str, Any]) -> str:
    """What is wrong with a row, "" for nothing."""
    instruction, context = _instruction(row), row.get("input") or ""
    if not isinstance(instruction, str) or not instruction.strip():
        return "has no instruction"
    if not isinstance(context, str):
        return "has an 'input' that is no text"
    return "" if is_unicode(instruction + context) else "holds half a character (a lone surrogate)"
