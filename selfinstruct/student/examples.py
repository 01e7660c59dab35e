"""Where training rows come from: a published version of a dataset folder, or a file. No torch, no ``datasets``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfinstruct.dataset import store, tables
from selfinstruct.errors import UsageError
from selfinstruct.student.prompt import is_unicode


@dataclass(frozen=True, slots=True)
class Example:
    """One row to learn from. ``input == ""`` means none."""

    instruction: str
    input: str
    output: str


@dataclass(frozen=True, slots=True)
class Source:
    """What a run learns from: rows by split, and the identity that its manifest freezes.

    ``identity`` names the dataset, its version and the SHA-256 of every file. ``about`` is what the dataset's own
    manifest says (its generator run), carried into the student for provenance.
    """

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    identity: Mapping[str, Any]
    about: Mapping[str, Any]


def read(name: str) -> Source:
    """Read ``DATASET``, ``DATASET@v2`` or a ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file.

    Raises UsageError for what is not there or has no rows, with every bad row of a file; DamagedFile for a dataset
    whose files are not what was published.
    """
    version = published(name)
    source = _file(Path(name)) if version is None else _dataset(version)
    if not source.train:
        raise UsageError(f"{name}: has no rows to train on", hint="choose another dataset or file")
    return source


def published(name: str) -> store.Version | None:
    """The version that ``DATASET`` or ``DATASET@v2`` names, its files compared with their hashes; None for a file.

    Raises UsageError for what is not there, DamagedFile.
    """
    path, version = Path(name), "latest"
    if not path.exists() and "@" in name:
        folder, _, version = name.rpartition("@")
        path = Path(folder)
    if path.is_file():
        return None
    if not path.is_dir():
        raise UsageError(f"{name}: no such dataset or file", hint="name a folder that selfinstruct wrote, or a file")
    found = store.find(path, version)
    store.verify(found)
    return found


def _dataset(version: store.Version) -> Source:
    rows = {split: [row for file in version.files(split) for row in _rows(file)] for split in store.SPLITS}
    files = {shard.name: shard.sha256 for shard in version.shards}
    identity = {"dataset": version.folder.parent.resolve().name, "version": version.name, "files": files}
    return Source(tuple(rows["train"]), tuple(rows["validation"]), identity, version.about)


def _file(path: Path) -> Source:
    rows = _rows(path)
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    identity = {"dataset": path.name, "version": None, "files": {path.name: digest}}
    return Source(tuple(rows), (), identity, {})


def _rows(path: Path) -> list[Example]:
    """Rows of a file as examples; UsageError lists the first ten bad rows and counts the rest."""
    found, bad = [], []
    for place, row in tables.read(path):
        problem = _problem(row)
        if problem:
            bad.append(f"{place}: {problem}")
        else:
            found.append(Example(row["instruction"], _input(row), row["output"]))
    if bad:
        raise UsageError(
            listed(str(path), bad), hint="every row needs the texts instruction and output, and may have input"
        )
    return found


def listed(source: str, bad: list[str]) -> str:
    """Bad rows for a message: the first ten, and how many more."""
    more = [f"... and {len(bad) - 10} more"] if len(bad) > 10 else []
    return "\n".join([f"{source}: {len(bad)} bad rows", *bad[:10], *more])


def _input(row: Mapping[str, Any]) -> Any:
    """A row's input; "" where there is none: another value that is false is a value."""
    found = row.get("input")
    return "" if found is None else found


def _problem(row: Mapping[str, Any]) -> str:
    """What is wrong with a row, "" for nothing."""
    for column in ("instruction", "output"):
        if not isinstance(row.get(column), str):
            seen = ", ".join(repr(str(name)[:40]) for name in list(row)[:8]) + (", ..." if len(row) > 8 else "")
            return f"has no text {column!r} (its columns: {seen or 'none'})"
    if not isinstance(_input(row), str):
        return "has an 'input' that is no text"
    if not is_unicode(row["instruction"] + _input(row) + row["output"]):
        return "holds half a character (a lone surrogate)"
    return "" if row["instruction"].strip() else "has an empty instruction"
