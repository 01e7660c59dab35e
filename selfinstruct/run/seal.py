"""How damage to a journal is noticed: a checksum on every record, and a seal on the file of a run that ended.

The seal (``journal.sha256`` beside the journal) also covers what no record covers: SQLite's own structures and the
unused bytes of its pages. It is written when a run ends well. While work on the run goes on, an announcement has its
place: how many answers the journal holds at least, so that a log (``-wal``) that is lost with answers in it is missed.
The journal says by itself whether a seal or an announcement is beside it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any, Literal

from selfinstruct import durable

FILE_NAME = "journal.sha256"
_ANNOUNCED = "announced"  # in the place of the SHA-256; the number has the place of the size
_ANNOUNCEMENT_BYTES = len(f"{_ANNOUNCED} {0:012} {0:08x}\n")
_encode = json.JSONEncoder(default=repr).encode


def checksum(values: Any) -> int:
    """CRC-32 of plain values (texts, numbers, None, lists of them). Changes with any single changed bit."""
    return zlib.crc32(_encode(values).encode())


def announce(journal: Path, answers: int) -> None:
    """Put an announcement of at least so many answers in the place of the seal. Raises OSError."""
    durable.write_text(journal.with_name(FILE_NAME), _line(_ANNOUNCED, f"{answers:012}"))


class Announcement:
    """The announcement of a run at work, which counts the answers that are in the journal.

    It is written over in place and not flushed, after the journal's commit was: whatever ends the process or the
    machine, it may be behind the journal and is never ahead of it.
    """

    def __init__(self, journal: Path, answers: int) -> None:
        """Go on with what was announced, which is ``answers``. Raises OSError."""
        self._path, self._answers = journal.with_name(FILE_NAME), answers
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_NOFOLLOW)

    def add(self, answers: int) -> None:
        """Count answers whose commit is on the disk. Raises OSError."""
        if not os.fstat(self._descriptor).st_nlink:
            raise FileNotFoundError(errno.ENOENT, "The folder of the run was removed", str(self._path))
        self._answers += answers
        os.pwrite(self._descriptor, _line(_ANNOUNCED, f"{self._answers:012}").encode(), 0)

    def close(self) -> None:
        """Flush it to the disk and count no more. Raises OSError."""
        try:
            os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)


def write(journal: Path) -> None:
    """Seal a journal file that nothing will write to any more. Raises OSError."""
    durable.write_text(journal.with_name(FILE_NAME), _line(_digest(journal), str(journal.stat().st_size)))


def state(journal: Path) -> Literal["good", "missing", "announced", "torn", "unreadable", "broken"]:
    """What the seal says of the journal file: "broken" means that the file is not the one that was sealed.

    It reads the journal: not to be called by a process that has it open with SQLite (see ``journal._connected``).
    "announced": the run is at work, or was killed. "torn": as long as an announcement and none, which a loss of power
    may leave while the run is at work.
    """
    try:
        raw = _read(journal)
    except FileNotFoundError:
        return "missing"
    except OSError:  # a folder, say
        return "unreadable"
    found = _parts(raw)
    if found is None:
        return "torn" if len(raw) == _ANNOUNCEMENT_BYTES else "unreadable"
    digest, size = found
    if digest == _ANNOUNCED:
        return "announced"
    if str(journal.stat().st_size) == size and _digest(journal) == digest:
        return "good"
    # A run that began meanwhile has put its announcement in the seal's place before it wrote to the journal.
    return state(journal) if _changed(journal, raw) else "broken"


def announced(journal: Path) -> int:
    """How many answers the journal holds at least: 0 without a readable announcement."""
    try:
        found = _parts(_read(journal))
    except OSError:
        return 0
    return int(found[1]) if found is not None and found[0] == _ANNOUNCED and found[1].isdecimal() else 0


def _changed(journal: Path, seen: bytes) -> bool:
    try:
        return _read(journal) != seen
    except OSError:
        return False


def _line(digest: str, size: str) -> str:
    return f"{digest} {size} {checksum(f'{digest} {size}'):08x}\n"


def _read(journal: Path) -> bytes:
    return durable.read(journal.with_name(FILE_NAME))[:200]


def _parts(raw: bytes) -> tuple[str, str] | None:
    """A seal's SHA-256 and size, or what an announcement has in their place; None when it is not what was written."""
    digest, _, rest = raw.decode("ascii", "replace").partition(" ")
    size, _, _ = rest.partition(" ")
    return (digest, size) if raw == _line(digest, size).encode("ascii", "replace") else None


def _digest(path: Path) -> str:
    with durable.opened(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
