"""Looking for damage in the folder of a run: journal, seal, the copy of the settings, locks. Nothing is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selfinstruct import durable
from selfinstruct.config import as_yaml
from selfinstruct.errors import DamagedFile, SelfInstructError
from selfinstruct.run import seal
from selfinstruct.run.audit import examine, said_state
from selfinstruct.run.folder import CONFIG, holds_run, run_folder
from selfinstruct.run.journal import FILE_NAME, Journal
from selfinstruct.run.lock import LOCK, PUBLISH_LOCK
from selfinstruct.run.migrations import require_current
from selfinstruct.run.writer import connect, sqlite_errors

Finding = tuple[Path, str]  # a file, and what is wrong with it
_NOT_ANNOUNCED = "is missing, and says how many answers the journal must hold"
_SEALS = {
    "missing": "is missing, and the run ended well",
    "torn": "is damaged",
    "unreadable": "is damaged",
    "broken": "is not what was sealed (its SHA-256 differs)",
}


def inspect(root: Path) -> tuple[list[Path], list[Finding]]:
    """All files that the run in ``root`` is made of, and every damage in them; ([], []) when there is no run.

    A run that was killed is no damage: what it left half done is healed when it is resumed.
    """
    if not (run_folder(root).exists() or run_folder(root).is_symlink()):
        return [], []
    try:
        if not holds_run(root):
            return [], []
    except DamagedFile as error:
        return [run_folder(root) / FILE_NAME], [_finding(run_folder(root) / FILE_NAME, error)]
    folder = run_folder(root)
    path = folder / FILE_NAME
    files, findings = [path], []
    said: str | None = None
    try:
        with sqlite_errors(path):
            connection = connect(path, "ro")
            try:
                require_current(path, connection)
                damage = examine(path, connection)
                findings += [(path, problem) for problem in damage.problems]
                if damage.judged_from is not None:
                    findings.append((path, f"what was made of the answers from {damage.judged_from} on is damaged"))
                said = said_state(connection)
            finally:
                connection.close()
        settings = None if findings else _settings(folder)
    except DamagedFile as error:
        findings.append(_finding(path, error))
        settings = None
    sealed = seal.state(path)  # looked at last: a run that is just beginning announces before it says so
    closed = said == "sealed"
    if closed or said == "announced" or sealed == "unreadable":
        files.append(folder / seal.FILE_NAME)
    if closed and sealed == "broken":
        findings.append((path, _SEALS[sealed]))
    elif (closed and sealed in _SEALS) or sealed == "unreadable":
        findings.append((files[-1], _SEALS[sealed]))
    elif said == "announced" and sealed == "missing":
        findings.append((files[-1], _NOT_ANNOUNCED))
    files.append(folder / CONFIG)
    findings += _of_config(folder / CONFIG, settings) if closed or said is None else []
    findings += _of_locks(root, folder) if closed else []
    return files, findings


def _settings(folder: Path) -> dict[str, Any] | None:
    journal = Journal.read_only(folder)
    try:
        return journal.settings()
    finally:
        journal.close()


def _of_config(path: Path, settings: dict[str, Any] | None) -> list[Finding]:
    try:
        seen = durable.read(path)
    except OSError as error:
        return [(path, f"cannot be read ({error.strerror or error}); selfinstruct resume writes it again")]
    if settings is not None and seen != as_yaml(settings).encode():
        return [(path, "is not what the run recorded; selfinstruct resume writes it again")]
    return []


def _of_locks(root: Path, folder: Path) -> list[Finding]:
    """Locks are empty files. The one for publishing is made by the first version."""
    findings: list[Finding] = []
    expected = [LOCK, *([PUBLISH_LOCK] if (root / "v1").exists() else [])]
    for name in expected:
        path = folder / name
        if not path.is_file():
            findings.append((path, "is missing; the next command makes it again"))
        elif path.stat().st_size:
            findings.append((path, "holds something, and locks are empty"))
    return findings


def _finding(path: Path, error: SelfInstructError) -> Finding:
    return path, error.message.removeprefix(f"{path}: ")
