"""The Parquet files of a version: columns, splits, shards, and names that carry a hash of the content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfinstruct.dataset import store
from selfinstruct.dataset.parquet import open_writer
from selfinstruct.records import Row

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_SHARD = 100_000
_ROWS_AT_ONCE = 10_000


def split_of(row_id: str, validation: float) -> str:
    """The split that a row belongs to, for ever: decided by its id alone."""
    return "validation" if int(row_id[:8], 16) < validation * 2**32 else "train"


def schema(*, profiled: bool = False, flagged: bool = True) -> pa.Schema:
    """The columns of a published row; ``profiled`` rows also say how near they are to others.

    Versions of earlier releases have no ``flags``.
    """
    import pyarrow as pa

    text, number = pa.string(), pa.int32()
    score, near = pa.float64(), pa.list_(pa.struct([("id", text), ("score", pa.float64())]))
    profile = [
        pa.field("similarity", score, nullable=False),
        pa.field("nearest_id", text),
        pa.field("mean_similarity", score, nullable=False),
        pa.field("most_similar", near, nullable=False),
    ]
    return pa.schema(
        [
            pa.field("id", text, nullable=False),
            pa.field("instruction", text, nullable=False),
            pa.field("input", text, nullable=False),
            pa.field("output", text, nullable=False),
            pa.field("method", text, nullable=False),
            pa.field("teacher", text, nullable=False),
            pa.field("language", text, nullable=False),
            pa.field("request_no", number, nullable=False),
            pa.field("item_no", number, nullable=False),
            pa.field("shown_ids", pa.list_(text), nullable=False),
            *([pa.field("flags", pa.list_(text), nullable=False)] if flagged else []),
            *(profile if profiled else []),
        ]
    )


def write_shards(
    work: Path, rows: Iterable[Row], validation: float, *, profiled: bool, flagged: bool = True
) -> tuple[store.Shard, ...]:
    """Write all rows, split and cut into shards; the names get their hash and count once these are known."""
    columns = schema(profiled=profiled, flagged=flagged)
    shards: dict[str, list[_OpenShard]] = {split: [] for split in store.SPLITS}
    with ExitStack() as files:
        for some in _in_parts(rows, _ROWS_AT_ONCE):
            for split, mine in shards.items():
                fitting = [row for row in some if split_of(row.id, validation) == split]
                if not fitting:
                    continue
                if not mine or mine[-1].rows + len(fitting) > ROWS_PER_SHARD:
                    path = work / f"{split}-{len(mine):05d}.parquet"
                    mine.append(_OpenShard(split, path, columns, files.enter_context(open_writer(path, columns))))
                mine[-1].write(fitting)
    return tuple(shard.finish(number, len(mine)) for mine in shards.values() for number, shard in enumerate(mine))


class _OpenShard:
    """A Parquet file that is being written."""

    def __init__(self, split: str, path: Path, columns: pa.Schema, writer: Any) -> None:
        self.split, self.rows = split, 0
        self._path, self._schema, self._writer = path, columns, writer

    def write(self, rows: Sequence[Row]) -> None:
        import pyarrow as pa

        columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in self._schema.names}
        self._writer.write_table(pa.table(columns, schema=self._schema))
        self.rows += len(rows)

    def finish(self, number: int, total: int) -> store.Shard:
        """Name the closed file by its place and content."""
        with self._path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        name = f"{self.split}-{number:05d}-of-{total:05d}-{digest[:12]}.parquet"
        size = self._path.rename(self._path.with_name(name)).stat().st_size
        return store.Shard(self.split, name, self.rows, size, digest)


def _in_parts(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while part := list(islice(iterator, size)):
        yield part
