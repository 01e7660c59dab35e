"""The Parquet files of a version: columns, splits, shards, and names that carry a hash of the content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfinstruct.dataset import store
from selfinstruct.records import Row

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_SHARD = 100_000
_ROWS_AT_ONCE = 10_000


def split_of(row_id: str, validation: float) -> str:
    """The split that a row belongs to, for ever: decided by its id alone."""
    return "validation" if int(row_id[:8], 16) < validation * 2**32 else "train"


def schema(*, profiled: bool = False) -> pa.Schema:
    """The columns of a published row; ``profiled`` rows also say how near they are to others."""
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
            *(profile if profiled else []),
        ]
    )


def write_shards(work: Path, rows: Iterable[Row], validation: float, *, profiled: bool) -> tuple[store.Shard, ...]:
    """Write all rows, split and cut into shards; the names get their hash and count once these are known."""
    open_shards: dict[str, _OpenShard] = {}
    full: list[_OpenShard] = []
    for some in _in_parts(rows, _ROWS_AT_ONCE):
        for split in store.SPLITS:
            mine = [row for row in some if split_of(row.id, validation) == split]
            if not mine:
                continue
            shard = open_shards.get(split)
            if shard is None or shard.rows + len(mine) > ROWS_PER_SHARD:
                if shard:
                    full.append(shard)
                number = sum(1 for other in full if other.split == split)
                shard = open_shards[split] = _OpenShard(work, split, number, schema(profiled=profiled))
            shard.write(mine)
    every = sorted([*full, *open_shards.values()], key=lambda shard: (shard.split, shard.number))
    totals = {split: sum(1 for shard in every if shard.split == split) for split in store.SPLITS}
    return tuple(shard.finish(totals[shard.split]) for shard in every)


class _OpenShard:
    """A Parquet file that is being written."""

    def __init__(self, work: Path, split: str, number: int, columns: pa.Schema) -> None:
        import pyarrow.parquet as pq

        self.split, self.number, self.rows = split, number, 0
        self._path = work / f"{split}-{number:05d}.parquet"
        self._schema = columns
        self._writer = pq.ParquetWriter(self._path, self._schema, compression="zstd")

    def write(self, rows: Sequence[Row]) -> None:
        import pyarrow as pa

        columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in self._schema.names}
        self._writer.write_table(pa.table(columns, schema=self._schema))
        self.rows += len(rows)

    def finish(self, total: int) -> store.Shard:
        self._writer.close()
        with self._path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        name = f"{self.split}-{self.number:05d}-of-{total:05d}-{digest[:12]}.parquet"
        size = self._path.rename(self._path.with_name(name)).stat().st_size
        return store.Shard(self.split, name, self.rows, size, digest)


def _in_parts(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while part := list(islice(iterator, size)):
        yield part
