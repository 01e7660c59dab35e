"""How damage to a journal is noticed: a checksum on every record, and a seal on the file of a run that ended.

The seal (``journal.sha256`` beside the journal) also covers what no record covers: SQLite's own structures and the
unused bytes of its pages. It is written when a run ends well and taken away when work on the run goes on. The journal
says by itself whether it is sealed, which its seal then covers: so a seal is announced first, and a run that is killed
while it is sealed does not look like one whose seal was taken away.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any, Literal

from selfinstruct import durable

FILE_NAME = "journal.sha256"
_ANNOUNCED = "announced 0"  # in the form of a seal
_encode = json.JSONEncoder(default=repr).encode


def checksum(values: Any) -> int:
    """CRC-32 of plain values (texts, numbers, None, lists of them). Changes with any single changed bit."""
    return zlib.crc32(_encode(values).encode())


def announce(journal: Path) -> None:
    """Put a seal in the making in the place of the seal. Raises OSError."""
    _write(journal, _ANNOUNCED)


def write(journal: Path) -> None:
    """Seal a journal file that nothing will write to any more. Raises OSError."""
    _write(journal, f"{_digest(journal)} {journal.stat().st_size}")


def _write(journal: Path, line: str) -> None:
    durable.write_text(journal.with_name(FILE_NAME), f"{line} {checksum(line):08x}\n")


def remove(journal: Path) -> None:
    """Take the seal away, because the journal is about to change."""
    journal.with_name(FILE_NAME).unlink(missing_ok=True)


def state(journal: Path) -> Literal["good", "missing", "announced", "unreadable", "broken"]:
    """What the seal says of the journal file: "broken" means that the file is not the one that was sealed.

    "announced": the run was killed, or the machine went, before the seal was made.
    """
    try:
        raw = durable.read(journal.with_name(FILE_NAME))[:200]
    except FileNotFoundError:
        return "missing"
    except OSError:  # a folder, say
        return "unreadable"
    digest, _, rest = raw.decode("ascii", "replace").partition(" ")
    size, _, check = rest.partition(" ")
    if check != f"{checksum(f'{digest} {size}'):08x}\n":
        return "unreadable"
    if f"{digest} {size}" == _ANNOUNCED:
        return "announced"
    return "good" if str(journal.stat().st_size) == size and _digest(journal) == digest else "broken"


def _digest(path: Path) -> str:
    with durable.opened(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
