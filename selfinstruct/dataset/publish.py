"""Publishing: the accepted rows of a journal, as they are now, become the next version of the dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version as package_version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfinstruct.dataset import card, store
from selfinstruct.errors import OutputError, Stopped
from selfinstruct.records import Row
from selfinstruct.run.journal import Journal

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_SHARD = 100_000
_ROWS_AT_ONCE = 10_000


def publish(root: Path, journal: Journal, *, target: int, validation: float) -> tuple[store.Version, bool]:
    """Publish the first ``target`` accepted rows; the version, and whether it is new.

    Nothing new is written when the newest version holds the same rows already. ``validation`` is the share of rows
    (by the hash of their id, so a row never changes sides) in the validation split. Raises Stopped when there are no
    rows yet, OutputError when the disk will not have them.
    """
    counts = journal.counts()
    rows = min(target, counts["accepted"])
    if rows == 0:
        raise Stopped("there are no rows to publish yet", hint=f"selfinstruct resume {root}")
    try:
        before = store.versions(root)
        work = store.new_work_folder(root)
        shards = _write_shards(work, journal.rows(rows), validation)
        if before and before[-1].shards == shards:
            for shard in shards:
                (work / shard.name).unlink()
            work.rmdir()
            newest, is_new = before[-1], False
        else:
            number = before[-1].number + 1 if before else 1
            newest = store.commit(root, work, number, shards, _about(journal, counts, rows, before))
            before.append(newest)
            is_new = True
        store.write_durably(root / "README.md", card.render(root.resolve().name, before))
    except OSError as error:
        raise OutputError(
            f"{error.filename or root}: {error.strerror or error}", hint=f"make room, then: selfinstruct publish {root}"
        ) from error
    return newest, is_new


def split_of(row_id: str, validation: float) -> str:
    """The split that a row belongs to, for ever: decided by its id alone."""
    return "validation" if int(row_id[:8], 16) < validation * 2**32 else "train"


def schema() -> pa.Schema:
    """The columns of a published row."""
    import pyarrow as pa

    text, number = pa.string(), pa.int32()
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
        ]
    )


def _write_shards(work: Path, rows: Iterable[Row], validation: float) -> tuple[store.Shard, ...]:
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
                shard = open_shards[split] = _OpenShard(work, split, number)
            shard.write(mine)
    every = sorted([*full, *open_shards.values()], key=lambda shard: (shard.split, shard.number))
    totals = {split: sum(1 for shard in every if shard.split == split) for split in store.SPLITS}
    return tuple(shard.finish(totals[shard.split]) for shard in every)


class _OpenShard:
    """A Parquet file that is being written."""

    def __init__(self, work: Path, split: str, number: int) -> None:
        import pyarrow.parquet as pq

        self.split, self.number, self.rows = split, number, 0
        self._path = work / f"{split}-{number:05d}.parquet"
        self._schema = schema()
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


def _about(journal: Journal, counts: dict[str, Any], rows: int, before: Sequence[store.Version]) -> dict[str, Any]:
    """What the manifest says about a version. No clock, host or path: two equal runs write equal manifests."""
    return {
        "identity": journal.identity(),
        "parent": before[-1].name if before else None,
        "rows": rows,
        "requests": counts["judged"],
        "drafts": counts["drafts"],
        "rejected": counts["rejected"],
        "lost": counts["lost"],
        "repaired": counts["repaired"],
        "package": f"selfinstruct {package_version('selfinstruct')}",
    }


def _in_parts(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while part := list(islice(iterator, size)):
        yield part
