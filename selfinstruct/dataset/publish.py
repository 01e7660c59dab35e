"""Publishing: the accepted rows of a journal, as they are now, become the next version of the dataset."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from selfinstruct import durable
from selfinstruct.dataset import card, store
from selfinstruct.dataset.flags import Flags
from selfinstruct.dataset.shards import write_shards
from selfinstruct.dataset.similarity import profiled
from selfinstruct.errors import OutputError, Stopped
from selfinstruct.records import Row
from selfinstruct.run.journal import Journal


def publish(
    root: Path, journal: Journal, *, target: int, validation: float, profile: bool = False
) -> tuple[store.Version, bool]:
    """Publish the first ``target`` accepted rows; the version, and whether it is new.

    Nothing new is written when the newest version holds the same rows already, or more of them than the run has now
    (while it judges old answers again): what is published is never taken back. Damaged shards of any version are
    replaced by what they were; DamagedFile when that cannot be done. ``validation`` is the share of rows
    (by the hash of their id, so a row never changes sides) in the validation split. With ``profile`` each row says how
    near it is to the seeds and the rows before it. Raises Stopped when there are no
    rows yet, OutputError when the disk will not have them.
    """
    counts = journal.counts()
    rows = min(target, counts["accepted"])
    if rows == 0:
        raise Stopped("there are no rows to publish yet", hint=f"selfinstruct resume {root}")
    try:
        before = store.versions(root)
        with _work_folder(root) as work:
            flags = Flags()
            shards = write_shards(work, _rows(journal, rows, profile, flags), validation, profiled=profile)
            behind = before and rows < min(before[-1].rows, target)
            is_new = not behind and (not before or before[-1].shards != shards)
            if is_new:
                number = before[-1].number + 1 if before else 1
                about = {**_about(journal, counts, rows, profile, before), "flagged": flags.counts()}
                before.append(store.Version(root / f"v{number}", number, shards, about))
                _commit(root, work, before)
        for version in before:
            _mend(root, version, journal, validation)
        if not is_new:
            durable.write_text(root / card.FILE_NAME, _card(root, before))
    except OSError as error:
        raise OutputError(
            f"{error.filename or root}: {error.strerror or error}", hint=f"make room, then: selfinstruct publish {root}"
        ) from error
    return before[-1], is_new


def _commit(root: Path, work: Path, versions: Sequence[store.Version]) -> None:
    """Give the last version its name, and then the card that speaks of it: for who is killed in between, it is there
    beside the old one, where ``verify`` looks for it."""
    path, newest = root / card.FILE_NAME, versions[-1]
    with durable.replacing(path, durable.unfinished(path)) as stream:
        stream.write(_card(root, versions).encode())
        durable.flush(stream)
        store.commit(root, work, newest.number, newest.shards, newest.about)


def _card(root: Path, versions: Sequence[store.Version]) -> str:
    return card.render(root.resolve().name, versions)


@contextmanager
def _work_folder(root: Path) -> Iterator[Path]:
    work = store.new_work_folder(root)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)  # what is left there takes room that may be wanted


def _mend(root: Path, version: store.Version, journal: Journal, validation: float) -> None:
    """Write damaged shards of a version again: each version holds the first rows of the journal."""
    damaged = [shard for shard in version.shards if store.damage_of(version, shard)]
    if not damaged:
        return
    with _work_folder(root) as work:
        profile, flagged = bool(version.about.get("profile")), bool(version.flagged)
        rows = _rows(journal, version.rows, profile, Flags())
        if write_shards(work, rows, validation, profiled=profile, flagged=flagged) != version.shards:
            store.verify(version, is_lost=True)
        for shard in damaged:
            durable.sync(work / shard.name)
            try:
                (work / shard.name).replace(version.folder / shard.name)
            except IsADirectoryError:
                store.verify(version)
        durable.sync(version.folder)


def _rows(journal: Journal, count: int, profile: bool, flags: Flags) -> Iterator[Row]:
    rows = flags.flagged(journal.rows(count))
    if not profile:
        return rows
    identity = journal.identity()
    return profiled(rows, journal.seeds(), threshold=identity["threshold"], tokenizer=identity["tokenizer"])


def _about(
    journal: Journal, counts: dict[str, Any], rows: int, profile: bool, before: Sequence[store.Version]
) -> dict[str, Any]:
    """What the manifest says about a version. No clock, host or path: two equal runs write equal manifests."""
    return {
        "identity": journal.identity(),
        "parent": before[-1].name if before else None,
        "rows": rows,
        "profile": profile,
        "requests": counts["judged"],
        "drafts": counts["drafts"],
        "rejected": counts["rejected"],
        "lost": counts["lost"],
        "repaired": counts["repaired"],
        "package": f"selfinstruct {package_version('selfinstruct')}",
    }
