"""Rows written as a table, where all have the same columns: CSV and Parquet.

Nothing is left out in silence: what does not fit is refused, with the number of its row. The first 10,000 rows decide
which columns there are, and no more rows are held.
"""

from __future__ import annotations

import codecs
import csv
import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from selfinstruct.dataset.parquet import open_writer
from selfinstruct.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, Any]

_ROWS_AT_ONCE = 10_000
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_REMEDY = "write .jsonl, where rows need not be alike"


def write_csv(path: Path, out: IO[bytes], rows: Iterable[Row]) -> None:
    """Write rows to ``out``, the file that will be ``path``.

    Names and cells that a spreadsheet would run as a formula get a leading apostrophe.
    """
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

    for first, names, some in _parts(path, rows, nested=False):
        if first == 1:
            write(1, names)
        for number, row in enumerate(some, start=first):
            write(number, (row.get(name) for name in names))


def write_parquet(path: Path, out: IO[bytes], rows: Iterable[Row]) -> None:
    """Write rows to ``out``, the file that will be ``path``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer: Any = None
    with ExitStack() as closing:
        for first, names, some in _parts(path, rows, nested=True):
            table = _table(path, first, names, some, writer.schema if writer else None)
            try:
                writer = writer or closing.enter_context(open_writer(out, table.schema))
                writer.write_table(table)
            except pa.ArrowException as error:
                raise UsageError(f"{path}: the rows do not fit one table ({error})", hint=_REMEDY) from None
    if writer is None:
        pq.write_table(pa.table({}), out)


def _cell(value: Any) -> Any:
    if isinstance(value, dict | list):
        value = json.dumps(value, ensure_ascii=False, default=str)
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _parts(path: Path, rows: Iterable[Row], *, nested: bool) -> Iterator[tuple[int, list[str], list[Row]]]:
    """Some rows at a time: the number of the first, the names of all columns, the rows.

    UsageError for a column, or with ``nested`` a field within one, that comes up later than in the first part.
    """
    known: dict[tuple[str, ...], None] = {}
    iterator, first = iter(rows), 1
    while some := list(islice(iterator, _ROWS_AT_ONCE)):
        for number, row in enumerate(some, start=first):
            for field in _fields(row) if nested else ((name,) for name in row):
                if first == 1:
                    known[field] = None
                elif field not in known:
                    why = f"has {'.'.join(field)!r}, which none of the first {_ROWS_AT_ONCE} rows has"
                    raise _refused(path, number, why, row)
        yield first, [field[0] for field in known if len(field) == 1], some
        first += len(some)


def _fields(row: Row) -> Iterator[tuple[str, ...]]:
    """The names in a row, and in what is nested in it, each with those above it."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), row)]
    while waiting:
        above, value = waiting.pop()
        if isinstance(value, dict):
            for name, inner in value.items():
                yield (*above, name)
                waiting.append(((*above, name), inner))
        elif isinstance(value, list):
            waiting += [(above, inner) for inner in value]


def _table(path: Path, first: int, names: Sequence[str], rows: Sequence[Row], schema: pa.Schema | None) -> pa.Table:
    """The rows as a table; UsageError tells the first that does not go with those before it."""
    import pyarrow as pa

    def table(count: int) -> pa.Table:
        return pa.table({name: [row.get(name) for row in rows[:count]] for name in names}, schema=schema)

    unfit = (pa.ArrowException, OverflowError, UnicodeError)

    def fits(count: int) -> bool:
        with suppress(*unfit):
            table(count)
            return True
        return False

    try:
        return table(len(rows))
    except unfit as error:
        bad = bisect_left(range(1, len(rows)), True, key=lambda count: not fits(count))
        raise _refused(path, first + bad, error, rows[bad]) from None


def _refused(path: Path, number: int, why: object, seen: object) -> UsageError:
    return UsageError(f"{path}: row {number} does not fit the table: {why!s:.200} (seen: {seen!r:.100})", hint=_REMEDY)
