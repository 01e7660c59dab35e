"""Versions on disk: immutable folders ``v1``, ``v2``, ... of Parquet shards with a manifest, beside a dataset card.

A version is written into a hidden folder, made durable and renamed: it is there whole or not at all. Shard names carry
a hash of their content, because the cache of ``load_dataset`` looks at names alone. Readers go through the manifest,
which holds the SHA-256 of every shard and of itself; its name begins with ``_`` so that pandas and pyarrow pass over
it. Links are never followed inside a dataset.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfinstruct import durable
from selfinstruct.errors import DamagedFile, OutputError, UsageError

MANIFEST = "_manifest.json"
SPLITS = ("train", "validation")
_VERSION = re.compile(r"v([1-9]\d{0,8})")
_SHARD = re.compile(r"(train|validation)-\d{5}-of-\d{5}-[0-9a-f]{12}\.parquet")


@dataclass(frozen=True, slots=True)
class Shard:
    """One Parquet file of a version."""

    split: str
    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Version:
    """One state of a dataset. ``about`` is what the manifest says beside the files: identity, counts, parent."""

    folder: Path
    number: int
    shards: tuple[Shard, ...]
    about: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"v{self.number}"

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def rows_in(self, split: str) -> int:
        return sum(shard.rows for shard in self.shards if shard.split == split)

    @property
    def flagged(self) -> Mapping[str, Any]:
        """How many ``rows`` look secret or personal, and how many for each of the ``kinds``; {} when not looked for."""
        found: Mapping[str, Any] = self.about.get("flagged", {})  # versions of earlier releases have none
        return found

    @property
    def flags_told(self) -> str:
        """The same in words; "" when there is nothing to tell."""
        rows = self.flagged.get("rows", 0)
        kinds = ", ".join(f"{kind} {count}" for kind, count in self.flagged.get("kinds", {}).items())
        verbs = "row looks as if it holds" if rows == 1 else "rows look as if they hold"
        return f"{rows} {verbs} secrets or personal text: {kinds}" if rows else ""

    def files(self, split: str) -> list[Path]:
        """The shards of a split, in order; [] for a split that has no rows."""
        return [self.folder / shard.name for shard in self.shards if shard.split == split]


def versions(root: Path) -> list[Version]:
    """All published versions, oldest first."""
    return [read_version(root, number) for number in numbers(root)]


def numbers(root: Path) -> list[int]:
    """The numbers of the versions that are there, in order; nothing in them is read.

    Also of what only has the name of a version: that must not be passed over, nor written to.
    """
    try:
        return sorted(int(match[1]) for entry in root.iterdir() if (match := _VERSION.fullmatch(entry.name)))
    except OSError as error:
        raise OutputError(f"{root}: cannot be read ({error.strerror or error})") from error


def find(root: Path, name: str) -> Version:
    """The version called ``name`` ("v2"), or the newest for "latest"."""
    found = numbers(root)
    if not found:
        raise UsageError(f"{root}: has no published version", hint=f"selfinstruct publish {root}")
    if name == "latest":
        return read_version(root, found[-1])
    for number in found:
        if name == f"v{number}":
            return read_version(root, number)
    raise UsageError(f"{root}: has no version {name!r}", hint=f"it has {', '.join(f'v{number}' for number in found)}")


def read_version(root: Path, number: int) -> Version:
    """Read a version's manifest; DamagedFile when it is missing or wrong."""
    folder = root / f"v{number}"
    path = folder / MANIFEST
    for planted in (folder, path):
        if planted.is_symlink():
            raise DamagedFile(f"{planted}: is a link, not what was written", hint=without(folder))
    if not folder.is_dir():
        raise DamagedFile(f"{folder}: is not the folder of a version", hint=without(folder))
    try:
        raw = durable.read(path)
        found = json.loads(raw)
        shards = tuple(
            Shard(str(s["split"]), str(s["name"]), int(s["rows"]), int(s["bytes"]), str(s["sha256"]))
            for s in found["files"]
        )
        about = found["about"]
    except OSError as error:
        raise DamagedFile(f"{path}: cannot be read ({error.strerror or error})", hint=without(folder)) from error
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise DamagedFile(f"{path}: is damaged", hint=without(folder)) from None
    if not isinstance(about, dict) or not all(_SHARD.fullmatch(s.name) and s.split in SPLITS for s in shards):
        raise DamagedFile(f"{path}: names files that no version has", hint=without(folder))
    if raw != _manifest(shards, about).encode():
        raise DamagedFile(f"{path}: is not what was written (its SHA-256 differs)", hint=without(folder))
    return Version(folder, number, shards, about)


def _manifest(shards: Sequence[Shard], about: Mapping[str, Any]) -> str:
    """The manifest's text: what is said and its SHA-256."""
    files = [{"split": s.split, "name": s.name, "rows": s.rows, "bytes": s.bytes, "sha256": s.sha256} for s in shards]
    said = {"about": about, "files": files}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    return json.dumps({**said, "sha256": digest}, indent=2, ensure_ascii=True, sort_keys=True) + "\n"


def without(folder: Path) -> str:
    """The remedy for a version that cannot be mended in its place."""
    return f"remove {shlex.quote(str(folder))}, then: selfinstruct publish {shlex.quote(str(folder.parent))}"


def verify(version: Version, *, is_lost: bool = False) -> None:
    """Compare every shard with its hash in the manifest; DamagedFile names the first that differs.

    ``is_lost`` says that the run cannot write it again.
    """
    for shard in version.shards:
        wrong = damage_of(version, shard)
        if wrong:
            path = version.folder / shard.name
            again = f"selfinstruct publish {shlex.quote(str(version.folder.parent))}"
            hint = f"{again} (writes it again from the run; without a run, copy the dataset again)"
            if path.is_dir() and not path.is_symlink():  # which no file can replace
                hint = f"remove {shlex.quote(str(path))}, then: {again}"
            raise DamagedFile(f"{path}: {wrong}", hint=without(version.folder) if is_lost else hint)


def damage_of(version: Version, shard: Shard) -> str:
    """What is wrong with a shard's file, in words; "" for nothing."""
    path = version.folder / shard.name
    try:
        if path.is_symlink():
            return "is a link, not the file that was written"
        with durable.opened(path) as stream:
            seen = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return "" if seen == shard.sha256 else "is not what was written (its SHA-256 differs)"


def new_work_folder(root: Path) -> Path:
    """Make a hidden folder for a version in the making, after sweeping those that a killed process left."""
    for leftover in root.glob(".v.tmp*"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    folder = root / f".v.tmp{os.getpid()}"
    folder.mkdir()
    return folder


def commit(root: Path, work: Path, number: int, shards: Sequence[Shard], about: Mapping[str, Any]) -> Version:
    """Make the work folder version ``number``: all files durable, the manifest last, then one rename."""
    for shard in shards:
        durable.sync(work / shard.name)
    durable.write_text(work / MANIFEST, _manifest(shards, about))
    target = root / f"v{number}"
    work.rename(target)
    durable.sync(root)
    return Version(target, number, tuple(shards), about)
