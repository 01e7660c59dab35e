"""Parquet files read, and written again with some rows less or other texts, every type as it was.

What is not changed never becomes a Python object: that would cost nanoseconds, large numbers and the types of columns
that are empty.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, groupby
from pathlib import Path
from typing import IO, TYPE_CHECKING

from selfinstruct.dataset.parquet import open_writer
from selfinstruct.dataset.text_rows import Row
from selfinstruct.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS_AT_ONCE = 10_000
_PART_BY_PART = {"pre_buffer": False, "buffer_size": 1 << 20}  # the default is to hold all that was read so far


def columns(files: Sequence[Path]) -> pa.Schema:
    """The columns of Parquet files that all have the same; those of the first are read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(files[0])
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(files[0], error) from None


def names(fields: Iterable[pa.Field]) -> Iterator[str]:
    """The names of columns, and of what is nested in them."""
    for field in fields:
        yield field.name
        yield from names(_parts(field.type))


def rows(files: Sequence[Path]) -> Iterator[tuple[int, Row]]:
    """The rows of some Parquet files, numbered through from 1."""
    numbers = count(1)
    for path, batch in _batches(files):
        for row in _rows(path, batch, batch.schema.names):
            yield next(numbers), row


def rewrite(files: Sequence[Path], out: IO[bytes], turn: Callable[[int, Row], Row | None]) -> None:
    """Write to ``out`` what ``turn`` makes of each row: the same row, one with other texts, or None for no row.

    ``turn`` gets the row's number, and of its columns those that hold text, at whatever depth.
    """
    import pyarrow as pa

    schema, numbers = columns(files), count(1)
    names = [field.name for field in schema if _holds_text(field.type)]
    waiting: list[pa.Table] = []
    with open_writer(out, schema) as writer:
        for path, batch in _batches(files):
            before = _rows(path, batch, names)
            after = [turn(next(numbers), row) for row in before]
            waiting.append(_turned(path, batch, names, before, after))
            if sum(table.num_rows for table in waiting) >= _ROWS_AT_ONCE:  # row groups of a few rows are slow to read
                writer.write_table(pa.concat_tables(waiting))
                waiting = []
        if waiting:
            writer.write_table(pa.concat_tables(waiting))


def _batches(files: Sequence[Path]) -> Iterator[tuple[Path, pa.RecordBatch]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in files:
        try:
            with pq.ParquetFile(path, **_PART_BY_PART) as opened:
                twice = [name for name, count in Counter(opened.schema_arrow.names).items() if count > 1]
                if twice:
                    raise UsageError(f"{path}: has two columns {twice[0][:80]!r}", hint="rename one of them")
                for batch in opened.iter_batches(_ROWS_AT_ONCE):
                    yield path, batch
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, error) from None


def _rows(path: Path, batch: pa.RecordBatch, names: Iterable[str]) -> list[Row]:
    """The rows of a batch, of the columns ``names``."""
    values = {}
    for name in names:
        try:
            values[name] = batch.column(name).to_pylist()
        except (ValueError, OverflowError) as error:  # such as a date after the year 9999
            why = f"column {name[:80]!r} has a value that Python cannot hold ({error})"
            raise UsageError(f"{path}: {why}", hint="make it a column of texts") from None
    return [{name: column[row] for name, column in values.items()} for row in range(batch.num_rows)]


def _turned(
    path: Path, batch: pa.RecordBatch, names: Sequence[str], before: Sequence[Row], after: Sequence[Row | None]
) -> pa.Table:
    """The batch without the rows that are None ``after``, and with the columns of ``names`` where texts changed."""
    import pyarrow as pa

    kept = _kept(batch, [row is not None for row in after])
    pairs = [(old, new) for old, new in zip(before, after, strict=True) if new is not None]
    for name in names:
        if all(new is old or new[name] == old[name] for old, new in pairs):
            continue
        field = batch.schema.field(name)
        try:
            changed = pa.chunked_array([pa.array([new[name] for _, new in pairs], field.type)])
        except (pa.ArrowException, OverflowError) as error:
            why = f"column {name[:80]!r} cannot be written again as {field.type} ({error})"
            raise UsageError(f"{path}: {why}", hint="write .jsonl") from None
        kept = kept.set_column(batch.schema.get_field_index(name), field, changed)
    return kept


def _kept(batch: pa.RecordBatch, wanted: Sequence[bool]) -> pa.Table:
    import pyarrow as pa

    try:
        return pa.Table.from_batches([batch.filter(pa.array(wanted, pa.bool_()))])
    except pa.ArrowNotImplementedError:  # of a type that Arrow cannot filter: string_view
        runs = [list(run) for is_wanted, run in groupby(range(batch.num_rows), wanted.__getitem__) if is_wanted]
        return pa.Table.from_batches([batch.slice(run[0], len(run)) for run in runs], batch.schema)


def _holds_text(kind: pa.DataType) -> bool:
    """Whether there is text in values of a type, at whatever depth."""
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        return _holds_text(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _holds_text(kind.value_type)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return True
    return any(_holds_text(field.type) for field in _parts(kind))


def _parts(kind: pa.DataType) -> list[pa.Field]:
    """The fields that a nested type is made of; [] for a plain one."""
    return [kind.field(number) for number in range(kind.num_fields)]


def _unreadable(path: Path, error: Exception) -> UsageError:
    return UsageError(f"{path}: not a Parquet file that can be read ({error})")
