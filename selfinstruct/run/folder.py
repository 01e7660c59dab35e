"""The folder of a run on disk: ``OUT/run`` holds journal, settings and lock; the versions lie beside it in ``OUT``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfinstruct.config import RunConfig, load_file, write_config
from selfinstruct.errors import IdentityError, OutputError, UsageError
from selfinstruct.records import SeedTask
from selfinstruct.run.journal import FILE_NAME, Journal

_CONFIG = "config.yaml"


def run_folder(root: Path) -> Path:
    return root / "run"


def holds_run(root: Path) -> bool:
    """True when ``root`` holds a run of ours, False when a new run may begin there.

    Raises UsageError when ``root`` is a file, or a folder with other things in it: nothing of theirs is touched.
    """
    try:
        if root.is_symlink() and not root.exists():
            raise UsageError(f"{root}: is a link to nothing", hint="choose another folder")
        if not root.exists():
            return False
        if not root.is_dir():
            raise UsageError(f"{root}: is a file, not a folder", hint="choose another folder")
        if (run_folder(root) / FILE_NAME).is_file():
            return True
        foreign = sorted(entry.name for entry in root.iterdir() if entry.name not in ("run", ".gitkeep"))
        inside = sorted(e.name for e in run_folder(root).iterdir()) if run_folder(root).is_dir() else []
    except OSError as error:
        raise OutputError(f"{root}: {error.strerror or error}", hint="choose a folder that you may write to") from error
    unfinished = {"lock", "holder.json", _CONFIG, f"{_CONFIG}.tmp"}
    foreign += [f"run/{name}" for name in inside if name not in unfinished and not name.startswith(f"{FILE_NAME}.new")]
    if foreign:
        raise UsageError(
            f"{root}: holds other things ({', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}) and no run",
            hint="choose a new or an empty folder",
        )
    return False


def require_run(root: Path) -> None:
    """Raise UsageError when there is no run in ``root``."""
    if not holds_run(root):
        raise UsageError(f"{root}: holds no run", hint=f"begin one: selfinstruct generate {root}")


def prepare(root: Path) -> Path:
    """Make the run folder; OutputError when the disk does not let us."""
    folder = run_folder(root)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be made ({error.strerror or error})", hint="choose a folder that you may write to"
        ) from error
    return folder


def create(folder: Path, config: RunConfig, identity: dict[str, Any], seeds: Sequence[SeedTask]) -> Journal:
    """Begin a run: its settings, then its journal."""
    write_config(config, folder / _CONFIG)
    return Journal.create(folder, identity=identity, seeds=seeds)


def reopen(folder: Path, config: RunConfig, identity: Mapping[str, Any]) -> Journal:
    """Go on with a run; IdentityError names every setting that would change its rows."""
    journal = Journal.open(folder)
    recorded = journal.identity()
    differing = sorted(name for name in recorded.keys() | identity.keys() if recorded.get(name) != identity.get(name))
    if differing:
        journal.close()
        lines = "\n".join(f"  {name}: {recorded.get(name)!r} -> {identity.get(name)!r}" for name in differing)
        raise IdentityError(
            f"{folder.parent}: holds a run with other settings, and these decide its rows:\n{lines}",
            hint=f"choose another folder, or go on as it began: selfinstruct resume {folder.parent}",
        )
    write_config(config, folder / _CONFIG)
    return journal


def recorded_config(root: Path) -> RunConfig:
    """The settings that the run was last worked on with."""
    return load_file(run_folder(root) / _CONFIG)
