"""Rows of text files, read as a stream: JSON lines, a JSON array, CSV. Each with its number from 1 (or its line)."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from selfinstruct.errors import UsageError

Row = dict[str, Any]

_CHUNK = 1 << 20  # characters
_MAX_ELEMENT = 64 * _CHUNK
_NO_SPACE = re.compile(r"[^ \t\r\n]")


def json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    """The objects of a JSON lines file, each with its line; empty lines are passed over."""
    with _open(path) as lines:
        number = 0
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _object(path, number, json.loads(line))
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}:{number + 1}: not UTF-8 ({error.reason})") from None
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}:{number}: not JSON ({error})", hint="one JSON object a line") from None


def json_array(path: Path) -> Iterator[tuple[int, Row]]:
    """The elements of one JSON array, decoded one by one as the text comes in. Nothing may stand after the array."""
    with _open(path) as stream:
        text, number = _Text(stream), 0
        try:
            if text.take() != "[":
                raise UsageError(f"{path}: not a JSON array", hint="name JSON lines .jsonl")
            sign = text.take() if text.next_sign() == "]" else ","
            while sign == ",":
                number += 1
                text.next_sign()
                yield number, _object(path, number, text.element())
                sign = text.take()
            if sign != "]":
                seen = f"seen: {sign + text.some!r}" if sign else "the file ends"
                raise UsageError(f"{path}: neither a comma nor ] after element {number} ({seen})", hint=_ONE_ARRAY)
            if text.next_sign():
                where = f"its array, which ends after element {number}"
                raise UsageError(f"{path}: goes on after {where} (seen: {text.some!r})", hint=_ONE_ARRAY)
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: not UTF-8 ({error.reason})") from None
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}: element {number} is not JSON ({error})") from None


_ONE_ARRAY = "a .json file holds one array [..., ...]; name JSON lines .jsonl"


class _Text:
    """The text of a stream, of which no more is held than is needed."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream, self._held, self.at = stream, "", 0  # what is held is read up to ``at``
        self._decoder = json.JSONDecoder()

    @property
    def some(self) -> str:
        """What comes next, for a message."""
        return self._held[self.at : self.at + 40]

    def next_sign(self) -> str:
        """The next character that is no white space, where ``at`` is then; "" at the end."""
        while True:
            found = _NO_SPACE.search(self._held, self.at)
            if found:
                self.at = found.start()
                return found[0]
            self._held, self.at = self._stream.read(_CHUNK), 0
            if not self._held:
                return ""

    def take(self) -> str:
        """The next character that is no white space, and go on after it; "" at the end."""
        sign = self.next_sign()
        self.at += len(sign)
        return sign

    def element(self) -> Any:
        """The JSON value that begins here, reading on for as long as it is not whole."""
        while True:
            try:
                found, self.at = self._decoder.raw_decode(self._held, self.at)
                return found
            except ValueError:
                held = self._held[self.at :]
                more = self._stream.read(max(_CHUNK, len(held)))  # doubling: a long one is decoded a few times only
                if not more or len(held) > _MAX_ELEMENT:
                    raise
                self._held, self.at = held + more, 0


def csv_names(path: Path) -> list[str]:
    """The names of a CSV file's columns, of its first line; [] for an empty file."""
    with _open(path) as lines:
        return _names(path, csv.DictReader(lines, strict=True))


def csv_lines(path: Path) -> Iterator[tuple[int, Row]]:
    """The rows of a CSV file, each with its (last) line."""
    with _open(path) as lines:
        reader = csv.DictReader(lines, strict=True)
        _names(path, reader)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise UsageError(f"{path}:{reader.line_num}: has another number of cells than the first line")
                yield reader.line_num, row
        except (UnicodeDecodeError, csv.Error) as error:
            raise _not_csv(path, reader, error) from None


def _names(path: Path, reader: csv.DictReader[str]) -> list[str]:
    csv.field_size_limit(_MAX_ELEMENT)
    try:
        names = list(reader.fieldnames or ())
    except (UnicodeDecodeError, csv.Error) as error:
        raise _not_csv(path, reader, error) from None
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UsageError(f"{path}: has two columns {twice[0][:80]!r}", hint="rename one of them")
    return names


def _not_csv(path: Path, reader: csv.DictReader[str], error: UnicodeDecodeError | csv.Error) -> UsageError:
    if isinstance(error, UnicodeDecodeError):
        return UsageError(f"{path}: not UTF-8 ({error.reason})")
    return UsageError(f"{path}:{reader.line_num}: not CSV ({error})")


def as_json(value: Any) -> str:
    """A value as JSON. NaN and the infinities, for which JSON has no word, become null, as pandas and ``datasets``
    write them; what else JSON does not know becomes its text."""
    try:
        return json.dumps(value, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value


def _open(path: Path) -> IO[str]:
    try:
        return path.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error


def _object(path: Path, number: int, found: Any) -> Row:
    if not isinstance(found, dict):
        raise UsageError(f"{path}:{number}: a JSON {type(found).__name__}, not an object")
    return found
