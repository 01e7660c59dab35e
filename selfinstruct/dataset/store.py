"""Versions on disk: immutable folders ``v1``, ``v2``, ... of Parquet shards with a manifest, beside a dataset card.

A version is written into a hidden folder, made durable and renamed: it is there whole or not at all. Shard names carry
a hash of their content, because the cache of ``load_dataset`` looks at names alone. Readers go through the manifest;
its name begins with ``_`` so that pandas and pyarrow pass over it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

    def files(self, split: str) -> list[Path]:
        """The shards of a split, in order; [] for a split that has no rows."""
        return [self.folder / shard.name for shard in self.shards if shard.split == split]


def versions(root: Path) -> list[Version]:
    """All published versions, oldest first."""
    try:
        numbers = sorted(
            int(match[1]) for entry in root.iterdir() if (match := _VERSION.fullmatch(entry.name)) and entry.is_dir()
        )
    except OSError as error:
        raise OutputError(f"{root}: cannot be read ({error.strerror or error})") from error
    return [read_version(root, number) for number in numbers]


def find(root: Path, name: str) -> Version:
    """The version called ``name`` ("v2"), or the newest for "latest"."""
    found = versions(root)
    if not found:
        raise UsageError(f"{root}: has no published version", hint=f"selfinstruct publish {root}")
    if name == "latest":
        return found[-1]
    for version in found:
        if version.name == name:
            return version
    raise UsageError(f"{root}: has no version {name!r}", hint=f"it has {', '.join(v.name for v in found)}")


def read_version(root: Path, number: int) -> Version:
    """Read a version's manifest; DamagedFile when it is missing or wrong."""
    folder = root / f"v{number}"
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        shards = tuple(
            Shard(str(s["split"]), str(s["name"]), int(s["rows"]), int(s["bytes"]), str(s["sha256"]))
            for s in found["files"]
        )
        about = found["about"]
    except OSError as error:
        raise DamagedFile(f"{path}: cannot be read ({error.strerror or error})", hint=_REMEDY) from error
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DamagedFile(f"{path}: is damaged", hint=_REMEDY) from None
    if not isinstance(about, dict) or not all(_SHARD.fullmatch(s.name) and s.split in SPLITS for s in shards):
        raise DamagedFile(f"{path}: names files that no version has", hint=_REMEDY)
    return Version(folder, number, shards, about)


_REMEDY = "remove this version's folder, then: selfinstruct publish"


def verify(version: Version) -> None:
    """Compare every shard with its hash in the manifest; DamagedFile names the first that differs."""
    for shard in version.shards:
        path = version.folder / shard.name
        try:
            if path.is_symlink():
                raise DamagedFile(f"{path}: is a link, not the file that was written", hint=_REMEDY)
            with path.open("rb") as stream:
                seen = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise DamagedFile(f"{path}: cannot be read ({error.strerror or error})", hint=_REMEDY) from error
        if seen != shard.sha256:
            raise DamagedFile(f"{path}: is not what was written (its SHA-256 differs)", hint=_REMEDY)


def new_work_folder(root: Path) -> Path:
    """Make a hidden folder for a version in the making, after sweeping those that a killed process left."""
    for leftover in root.glob(".v*.tmp*"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
    folder = root / f".v.tmp{os.getpid()}"
    folder.mkdir()
    return folder


def commit(root: Path, work: Path, number: int, shards: Sequence[Shard], about: Mapping[str, Any]) -> Version:
    """Make the work folder version ``number``: all files durable, the manifest last, then one rename."""
    files = [{"split": s.split, "name": s.name, "rows": s.rows, "bytes": s.bytes, "sha256": s.sha256} for s in shards]
    text = json.dumps({"about": about, "files": files}, indent=2, ensure_ascii=False, sort_keys=True)
    write_durably(work / MANIFEST, text + "\n")
    for shard in shards:
        _sync(work / shard.name)
    _sync(work)
    target = root / f"v{number}"
    work.rename(target)
    _sync(root)
    return Version(target, number, tuple(shards), about)


def write_durably(path: Path, text: str) -> None:
    """Replace a file by new content, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    _sync(temporary)
    temporary.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
