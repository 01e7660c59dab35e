"""Rows written as a table, where all have the same columns: CSV and Parquet.

Nothing is left out in silence: what does not fit is refused, with the number of its row. Rows that come without their
columns (from JSON) lie on the disk until all were seen: a column, or its type, may come up late.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any, TypeVar

from selfinstruct.dataset.parquet import open_writer
from selfinstruct.dataset.text_rows import Row, as_json
from selfinstruct.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa

_T = TypeVar("_T")
_ROWS_AT_ONCE = 10_000
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_REMEDY = "write .jsonl, where rows need not be alike"


def write_csv(path: Path, out: IO[bytes], rows: Iterable[Row], columns: pa.Schema | None) -> None:
    """Write rows to ``out``, the file that will be ``path``.

    Names and cells that a spreadsheet would run as a formula get a leading apostrophe; plain numbers do not.
    """
    if columns is not None:
        _write_lines(path, out, columns.names, rows)
        return
    names: dict[str, None] = {}
    with _spool(path) as spool:
        for row in rows:
            _lay_down(spool, [row])
            names.update(dict.fromkeys(row))
        _write_lines(path, out, list(names), _taken_up(spool))


def write_parquet(path: Path, out: IO[bytes], rows: Iterable[Row], columns: pa.Schema | None) -> None:
    """Write rows to ``out``, the file that will be ``path``."""
    import pyarrow as pa

    if columns is not None:
        _write_tables(path, out, columns, rows)
        return
    columns = pa.schema([])
    with _spool(path) as spool:
        for first, some in _parts(rows):
            _lay_down(spool, some)
            columns = _fitting(path, first, some, partial(_widened, columns))
        _write_tables(path, out, columns, _taken_up(spool))


def _spool(path: Path) -> IO[str]:
    """A file without a name, on the disk that has room for what is written."""
    return TemporaryFile("w+", encoding="ascii", dir=path.parent)


def _lay_down(spool: IO[str], rows: Iterable[Row]) -> None:
    spool.writelines(json.dumps(row) + "\n" for row in rows)


def _taken_up(spool: IO[str]) -> Iterator[Row]:
    spool.seek(0)
    return map(json.loads, spool)


def _write_lines(path: Path, out: IO[bytes], names: Sequence[str], rows: Iterable[Row]) -> None:
    text = codecs.getwriter("utf-8")(out)
    plain = csv.writer(text, lineterminator="\n")
    quoted = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)

    def write(number: int, values: Iterable[Any]) -> None:
        cells = [_cell(value) for value in values]
        has_return = any("\r" in cell for cell in cells if isinstance(cell, str))  # which csv leaves unquoted
        try:
            (quoted if has_return else plain).writerow(cells)
        except UnicodeEncodeError as error:
            raise _refused(path, number, error, cells) from None

    if names:
        write(1, names)
    for number, row in enumerate(rows, start=1):
        write(number, (row.get(name) for name in names))


def _cell(value: Any) -> Any:
    if isinstance(value, dict | list):
        value = as_json(value)
    if isinstance(value, str) and value.startswith(_FORMULA) and not _NUMBER.fullmatch(value):
        return f"'{value}"
    return value


def _write_tables(path: Path, out: IO[bytes], columns: pa.Schema, rows: Iterable[Row]) -> None:
    import pyarrow as pa

    try:
        with open_writer(out, columns) as writer:
            for first, some in _parts(rows):
                writer.write_table(_fitting(path, first, some, lambda rows: pa.Table.from_pylist(rows, columns)))
    except pa.ArrowException as error:
        raise UsageError(f"{path}: the rows do not fit one table ({error})", hint=_REMEDY) from None


def _parts(rows: Iterable[Row]) -> Iterator[tuple[int, list[Row]]]:
    """Some rows at a time, with the number of the first."""
    iterator, first = iter(rows), 1
    while some := list(islice(iterator, _ROWS_AT_ONCE)):
        yield first, some
        first += len(some)


def _widened(columns: pa.Schema, rows: Sequence[Row]) -> pa.Schema:
    """The columns and types that hold what ``columns`` hold, and these rows too. Raises as ``_fitting`` expects."""
    import pyarrow as pa

    names = dict.fromkeys(name for row in rows for name in row)
    found = pa.table({name: [row.get(name) for row in rows] for name in names}).schema
    return pa.unify_schemas([columns, found], promote_options="permissive")


def _fitting(path: Path, first: int, rows: Sequence[Row], make: Callable[[Sequence[Row]], _T]) -> _T:
    """What ``make`` makes of the rows; UsageError tells the first that does not go with those before it, and why."""
    import pyarrow as pa

    unfit = (pa.ArrowException, OverflowError, UnicodeError)

    def reason(count: int) -> Exception | None:
        try:
            make(rows[:count])
        except unfit as error:
            return error
        return None

    try:
        return make(rows)
    except unfit as error:
        bad = bisect_left(range(1, len(rows)), True, key=lambda count: reason(count) is not None)
        raise _refused(path, first + bad, reason(bad + 1) or error, rows[bad]) from None


def _refused(path: Path, number: int, why: object, seen: object) -> UsageError:
    return UsageError(f"{path}: row {number} does not fit the table: {why!s:.200} (seen: {seen!r:.100})", hint=_REMEDY)
