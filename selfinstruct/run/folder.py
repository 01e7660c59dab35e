"""The folder of a run on disk: ``OUT/run`` holds journal, settings and lock; the versions lie beside it in ``OUT``.

The settings are in the journal; ``config.yaml`` is a copy of them for people.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from selfinstruct import durable
from selfinstruct.config import RunConfig, load, load_file, write_config
from selfinstruct.errors import DamagedFile, IdentityError, OutputError, UsageError
from selfinstruct.records import SeedTask
from selfinstruct.run import seal
from selfinstruct.run.journal import FILE_NAME, Journal

CONFIG = "config.yaml"
_AS_BEFORE = {"secrets": "flag"}  # settings that are younger than some runs, and what those runs did

_OF_A_RUN = {CONFIG, seal.FILE_NAME, f"{FILE_NAME}-wal"}  # each is made after the journal
_OF_A_BEGINNING = {"lock", "holder.json", ".holder.json.tmp"}
_OURS = {*_OF_A_RUN, *_OF_A_BEGINNING, FILE_NAME, f"{FILE_NAME}-shm", f"{FILE_NAME}-journal", "publish.lock"}


def run_folder(root: Path) -> Path:
    return root / "run"


def holds_run(root: Path) -> bool:
    """True when ``root`` holds a run of ours, False when a new run may begin there.

    Raises UsageError when ``root`` is a file, or a folder with other things in it: nothing of theirs is touched.
    DamagedFile when a run was there and its journal is gone; OutputError when a link takes the place of its files.
    """
    try:
        if root.is_symlink() and not root.exists():
            raise UsageError(f"{root}: is a link to nothing", hint="choose another folder")
        if not root.exists():
            return False
        if not root.is_dir():
            raise UsageError(f"{root}: is a file, not a folder", hint="choose another folder")
        inside = _names_inside(run_folder(root))
        if FILE_NAME in inside:
            return True
        foreign = sorted(entry.name for entry in root.iterdir() if entry.name not in ("run", ".gitkeep"))
    except OSError as error:
        raise OutputError(f"{root}: {error.strerror or error}", hint="choose a folder that you may write to") from error
    if _OF_A_RUN & inside:
        raise DamagedFile(
            f"{run_folder(root) / FILE_NAME}: is missing, and the run that was here is in it",
            hint="restore it from a copy, or choose another folder",
        )
    foreign += sorted(f"run/{name}" for name in inside - _OF_A_BEGINNING if not name.startswith(f"{FILE_NAME}.new"))
    if foreign:
        raise UsageError(
            f"{root}: holds other things ({', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}) and no run",
            hint="choose a new or an empty folder",
        )
    return False


def _names_inside(folder: Path) -> set[str]:
    """What is in the run folder. A link in it is none of ours, and what it points at is not to be written to.

    Nor is a pipe or a folder in the place of one of our files to be waited for.
    """
    if folder.is_symlink():
        raise OutputError(f"{folder}: is a link, not the folder of a run", hint="remove it")
    if not folder.exists():
        return set()
    names = set()
    for entry in folder.iterdir():
        names.add(entry.name)
        with suppress(FileNotFoundError):  # of a run that is at work
            kind = entry.lstat().st_mode
            if stat.S_ISLNK(kind):
                raise OutputError(f"{entry}: is a link, not a file of the run", hint="remove it")
            if entry.name in _OURS and not stat.S_ISREG(kind):
                raise OutputError(f"{entry}: is no regular file, and so none of the run", hint="remove it")
    return names


def require_run(root: Path) -> None:
    """Raise UsageError when there is no run in ``root``."""
    if not holds_run(root):
        raise UsageError(f"{root}: holds no run", hint=f"begin one: selfinstruct generate {root}")


def prepare(root: Path) -> Path:
    """Make the run folder; OutputError when the disk does not let us."""
    folder = run_folder(root)
    try:
        durable.make_folder(folder)
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be made ({error.strerror or error})", hint="choose a folder that you may write to"
        ) from error
    return folder


def create(folder: Path, config: RunConfig, identity: dict[str, Any], seeds: Sequence[SeedTask]) -> Journal:
    """Begin a run: its journal, then the copy of its settings."""
    return _begun(folder, Journal.create(folder, identity=identity, seeds=seeds), config)


def reopen(folder: Path, config: RunConfig, identity: Mapping[str, Any], *, forget_damaged: bool = False) -> Journal:
    """Go on with a run; IdentityError names every setting that would change its rows."""
    journal = Journal.open(folder, forget_damaged=forget_damaged)
    recorded = {**_AS_BEFORE, **journal.identity()}
    differing = sorted(name for name in recorded.keys() | identity.keys() if recorded.get(name) != identity.get(name))
    if differing:
        journal.close()
        lines = "\n".join(f"  {name}: {recorded.get(name)!r} -> {identity.get(name)!r}" for name in differing)
        raise IdentityError(
            f"{folder.parent}: holds a run with other settings, and these decide its rows:\n{lines}",
            hint=f"choose another folder, or go on as it began: selfinstruct resume {folder.parent}",
        )
    return _begun(folder, journal, config)


def _begun(folder: Path, journal: Journal, config: RunConfig) -> Journal:
    try:
        journal.begin(config.model_dump(mode="json"))
        write_config(config, folder / CONFIG)
    except OutputError:
        journal.close()
        raise
    return journal


def recorded_config(root: Path) -> RunConfig:
    """The settings that the run was last worked on with."""
    journal = Journal.read_only(run_folder(root))
    try:
        settings = journal.settings()
    finally:
        journal.close()
    return load(None, {}, settings) if settings is not None else load_file(run_folder(root) / CONFIG)
