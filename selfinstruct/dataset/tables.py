"""Rows of any table file, read and written as a stream: JSON lines, a JSON array, CSV, Parquet, a dataset of ours.

Rows are dictionaries, in the file's order. Nothing is held but the row at hand (of a Parquet file some thousand rows).
JSON is read as Python writes it, also with NaN and Infinity; what is written is JSON for everybody, with null for them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from selfinstruct import durable
from selfinstruct.dataset import batches, store, text_rows
from selfinstruct.dataset.columnar import write_csv, write_parquet
from selfinstruct.dataset.text_rows import Row, as_json
from selfinstruct.errors import OutputError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_WITH_COLUMNS = ("csv", "parquet")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row came from: the file (or dataset@version), and its number from 1 (for JSON lines and CSV its line)."""

    source: str
    number: int

    def __str__(self) -> str:
        return f"{self.source}:{self.number}"


Turn = Callable[[Place, Row], Row | None]


@dataclass(frozen=True, slots=True)
class _Source:
    """A file, or the shards of a dataset of ours."""

    name: str
    kind: str
    files: tuple[Path, ...]

    def rows(self) -> Iterator[tuple[Place, Row]]:
        numbered = batches.rows(self.files) if self.kind == "parquet" else _READERS[self.kind](self.files[0])
        return ((Place(self.name, number), row) for number, row in numbered)

    def columns(self) -> pa.Schema | None:
        import pyarrow as pa

        if self.kind == "parquet":
            return batches.columns(self.files)
        if self.kind == "csv":
            return pa.schema([(name, pa.string()) for name in text_rows.csv_names(self.files[0])])
        return None


def read(path: Path) -> Iterator[tuple[Place, Row]]:
    """The rows of a file, or of a dataset of ours (``folder`` or ``folder@v2``); UsageError says what is wrong."""
    return _source(path).rows()


def columns(path: Path) -> pa.Schema | None:
    """The columns that a file has beside its rows; None for JSON, where each row has names of its own."""
    return _source(path).columns()


def _source(path: Path) -> _Source:
    found = version_of(path)
    if found:
        store.verify(found)
        files = tuple(file for split in store.SPLITS for file in found.files(split))
        return _Source(f"{found.folder.parent}@{found.name}", "parquet", files)
    kind = format_of(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file", hint="check the path")
    return _Source(str(path), kind, (path,))


def version_of(path: Path) -> store.Version | None:
    """The version of a dataset of ours that ``folder`` or ``folder@v2`` names; None for a path that names a file."""
    if path.is_dir():
        return store.find(path, "latest")
    folder, _, version = str(path).rpartition("@")
    return store.find(Path(folder), version) if folder and not path.exists() and Path(folder).is_dir() else None


def format_of(path: Path) -> str:
    """The format that a file's name says."""
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise UsageError(f"{path}: cannot tell its format", hint=f"name it with one of {', '.join(FORMATS)}")
    return kind


def write(path: Path, rows: Iterable[Row], columns: pa.Schema | None = None) -> None:
    """Write rows to a file in the format that its name says, whole or not at all.

    ``columns`` says which there are, also when there is no row; without them they are those of the rows.
    A link planted under its name is replaced. UsageError names a row that CSV or Parquet cannot hold.
    """
    kind = format_of(path)
    with _replacing(path) as out:
        if kind == "csv":
            write_csv(path, out, rows, columns)
        elif kind == "parquet":
            write_parquet(path, out, rows, columns)
        else:
            (_write_json_lines if kind == "jsonl" else _write_json_array)(out, rows)


def rewrite(source: Path, out: Path, turn: Turn) -> None:
    """Write what ``turn`` makes of each row of ``source`` to ``out``: the row, one with other texts, or None for none.

    ``out`` has the columns of ``source``, also when no row is left. From Parquet to Parquet every type survives, and
    ``turn`` gets only the columns that hold text.
    """
    kind, found = format_of(out), _source(source)
    if found.kind == kind == "parquet":
        with _replacing(out) as stream:
            batches.rewrite(found.files, stream, lambda number, row: turn(Place(found.name, number), row))
        return
    turned = (turn(place, row) for place, row in found.rows())
    write(out, (row for row in turned if row is not None), found.columns() if kind in _WITH_COLUMNS else None)


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    try:
        with durable.replacing(path, path.with_name(f".{path.name}.tmp{os.getpid()}")) as out:
            yield out
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})", hint="check -o OUT") from error


def _write_json_lines(out: IO[bytes], rows: Iterable[Row]) -> None:
    for row in rows:
        out.write(_json(row) + b"\n")


def _write_json_array(out: IO[bytes], rows: Iterable[Row]) -> None:
    between = b"[\n"
    for row in rows:
        out.write(between + _json(row))
        between = b",\n"
    out.write(b"\n]\n" if between == b",\n" else b"[]\n")


def _json(row: Row) -> bytes:
    return as_json(row).encode(errors="backslashreplace")  # half a surrogate pair: as JSON writes it, \udc00


_READERS = {"jsonl": text_rows.json_lines, "json": text_rows.json_array, "csv": text_rows.csv_lines}
