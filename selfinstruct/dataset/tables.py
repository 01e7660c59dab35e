"""Rows of any table file, read and written as a stream: JSON lines, a JSON array, CSV, Parquet, a dataset of ours.

Rows are dictionaries, in the file's order. Nothing is held but the row at hand (a Parquet file: a row group).
"""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from selfinstruct import durable
from selfinstruct.dataset import store
from selfinstruct.dataset.columnar import Row, write_csv, write_parquet
from selfinstruct.errors import OutputError, UsageError

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_CHUNK = 1 << 20  # characters
_MAX_ELEMENT = 64 * _CHUNK
_ROWS_AT_ONCE = 10_000


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row came from: the file (or dataset@version), and its number from 1 (for JSON lines and CSV its line)."""

    source: str
    number: int

    def __str__(self) -> str:
        return f"{self.source}:{self.number}"


def read(path: Path) -> Iterator[tuple[Place, Row]]:
    """The rows of a file, or of a dataset of ours (``folder`` or ``folder@v2``); UsageError says what is wrong."""
    found = version_of(path)
    if found:
        store.verify(found)
        files = [file for split in store.SPLITS for file in found.files(split)]
        return _numbered(f"{found.folder.parent}@{found.name}", (row for file in files for row in _parquet(file)))
    kind = format_of(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file", hint="check the path")
    if kind == "parquet":
        return _numbered(str(path), _parquet(path))
    return {"jsonl": _json_lines, "json": _json_array, "csv": _csv}[kind](path)


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


def write(path: Path, rows: Iterable[Row]) -> int:
    """Write rows to a file in the format that its name says, whole or not at all; how many there were.

    A link planted under its name is replaced. UsageError names a row that CSV or Parquet cannot hold.
    """
    kind = format_of(path)
    counted = _Counted(rows)
    try:
        with durable.replacing(path, path.with_name(f".{path.name}.tmp{os.getpid()}")) as out:
            _WRITERS[kind](path, out, counted)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})", hint="check -o OUT") from error
    return counted.count


class _Counted:
    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows, self.count = rows, 0

    def __iter__(self) -> Iterator[Row]:
        for row in self._rows:
            self.count += 1
            yield row


def _numbered(source: str, rows: Iterable[Row]) -> Iterator[tuple[Place, Row]]:
    for number, row in enumerate(rows, start=1):
        yield Place(source, number), row


def _open(path: Path) -> IO[str]:
    try:
        return path.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error


def _json_lines(path: Path) -> Iterator[tuple[Place, Row]]:
    with _open(path) as lines:
        number = 0
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield Place(str(path), number), _object(path, number, json.loads(line))
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}:{number + 1}: not UTF-8 ({error.reason})") from None
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}:{number}: not JSON ({error})", hint="one JSON object a line") from None


def _json_array(path: Path) -> Iterator[tuple[Place, Row]]:
    """The elements of one JSON array, decoded one by one as the text comes in."""
    decoder = json.JSONDecoder()
    with _open(path) as stream:
        text, number = "", 0
        try:
            text = stream.read(_CHUNK).lstrip()
            if not text.startswith("["):
                raise UsageError(f"{path}: not a JSON array", hint="name JSON lines .jsonl")
            text = text[1:]
            while True:
                text = text.lstrip(" \t\r\n,") or stream.read(_CHUNK).lstrip(" \t\r\n,")
                if text.startswith("]"):
                    return
                number += 1
                found, text = _next_element(decoder, text, stream)
                yield Place(str(path), number), _object(path, number, found)
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: not UTF-8 ({error.reason})") from None
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}: element {number} is not JSON ({error})") from None


def _next_element(decoder: json.JSONDecoder, text: str, stream: IO[str]) -> tuple[Any, str]:
    """Decode the element that begins ``text``, reading on for as long as it is not whole."""
    while True:
        try:
            found, end = decoder.raw_decode(text)
            return found, text[end:]
        except ValueError:
            more = stream.read(max(_CHUNK, len(text)))  # doubling: a long element is decoded a few times only
            if not more or len(text) > _MAX_ELEMENT:
                raise
            text += more


def _object(path: Path, number: int, found: Any) -> Row:
    if not isinstance(found, dict):
        raise UsageError(f"{path}:{number}: a JSON {type(found).__name__}, not an object")
    return found


def _csv(path: Path) -> Iterator[tuple[Place, Row]]:
    csv.field_size_limit(_MAX_ELEMENT)
    with _open(path) as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            twice = [name for name, count in Counter(reader.fieldnames or ()).items() if count > 1]
            if twice:
                raise UsageError(f"{path}: has two columns {twice[0][:80]!r}", hint="rename one of them")
            for row in reader:
                if None in row or None in row.values():
                    raise UsageError(f"{path}:{reader.line_num}: has another number of cells than the first line")
                yield Place(str(path), reader.line_num), row
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: not UTF-8 ({error.reason})") from None
        except csv.Error as error:
            raise UsageError(f"{path}:{reader.line_num}: not CSV ({error})") from None


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as opened:
            for batch in opened.iter_batches(_ROWS_AT_ONCE):
                yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise UsageError(f"{path}: not a Parquet file that can be read ({error})") from None


def _write_json_lines(_: Path, out: IO[bytes], rows: Iterable[Row]) -> None:
    for row in rows:
        out.write(_json(row) + b"\n")


def _write_json_array(_: Path, out: IO[bytes], rows: Iterable[Row]) -> None:
    between = b"[\n"
    for row in rows:
        out.write(between + _json(row))
        between = b",\n"
    out.write(b"\n]\n" if between == b",\n" else b"[]\n")


def _json(row: Row) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:  # half a surrogate pair: JSON can say it, UTF-8 cannot
        return json.dumps(row, default=str).encode()


_WRITERS = {"jsonl": _write_json_lines, "json": _write_json_array, "csv": write_csv, "parquet": write_parquet}
