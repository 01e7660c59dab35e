"""Every crash point of a run of forty answers.

The run is recorded once, operation by operation (``shim.c``). What a crash would have left is then built from the
record, for every operation and five kinds of crash, and each different state is resumed:

kill       everything before the operation is there (the process died)
killafter  the operation too
torn       half of the operation's bytes
power      only what was flushed: file contents by fsync of the file, names by fsync of the folder
powernul   names and sizes are there, what was not flushed is NUL (ext4 after a crash)
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from chaos.world import Ended, Row, parquet, run, scripted, shim
from selfinstruct.dataset import audit
from selfinstruct.run import inspection

KINDS = ("kill", "killafter", "torn", "power", "powernul")
CREATE, CUT, WRITE, TRUNCATE, SYNC, RENAME, UNLINK, MKDIR, RMDIR = range(1, 10)
_HEAD = struct.Struct("<IIIIq")
State = dict[str, bytes | None]  # content by path; None for a folder


@dataclass(frozen=True)
class Operation:
    """One operation of the record; ``offset`` is the new length for TRUNCATE."""

    code: int
    path: str
    other: str
    offset: int
    content: bytes


@dataclass
class _File:
    now: bytearray = field(default_factory=bytearray)
    flushed: bytearray = field(default_factory=bytearray)
    dirty: list[tuple[int, int]] = field(default_factory=list)

    def write(self, offset: int, content: bytes) -> None:
        if len(self.now) < offset:
            self.now.extend(bytes(offset - len(self.now)))
        self.now[offset : offset + len(content)] = content
        self.dirty.append((offset, offset + len(content)))

    def cut(self, size: int) -> None:
        del self.now[size:]
        self.now.extend(bytes(size - len(self.now)))

    def flush(self) -> None:
        self.flushed, self.dirty = bytearray(self.now), []

    def with_nuls(self) -> bytes:
        seen = bytearray(self.now)
        for start, end in self.dirty:
            end = min(end, len(seen))
            seen[start:end] = bytes(max(0, end - start))
        return bytes(seen)


class Disk:
    """Files and folders as the process sees them, and as they would be after the power went."""

    def __init__(self) -> None:
        self.names: dict[str, _File | None] = {}
        self.flushed_names: dict[str, _File | None] = {}

    def apply(self, operation: Operation) -> None:
        path, names = operation.path, self.names
        file = names.get(path)
        if operation.code == CREATE:
            names[path] = _File()
        elif operation.code == MKDIR:
            names[path] = None
        elif operation.code in (UNLINK, RMDIR):
            names.pop(path, None)
        elif operation.code == RENAME:
            for name in [n for n in names if n == path or n.startswith(path + "/")]:
                names[operation.other + name[len(path) :]] = names.pop(name)
            self._move_flushed(path, operation.other)
        elif operation.code == SYNC and file is None:
            self._flush_folder(path)
        elif file is not None and operation.code == SYNC:
            file.flush()
        elif file is not None and operation.code == WRITE:
            file.write(operation.offset, operation.content)
        elif file is not None:
            file.cut(operation.offset if operation.code == TRUNCATE else 0)

    def _move_flushed(self, path: str, other: str) -> None:
        """What was flushed in a renamed folder is in it under either name; which one it has is its parent's matter."""
        for name in [n for n in self.flushed_names if n.startswith(path + "/")]:
            self.flushed_names[other + name[len(path) :]] = self.flushed_names[name]

    def _flush_folder(self, folder: str) -> None:
        for name in [n for n in self.flushed_names if _parent(n) == folder and n not in self.names]:
            for gone in [n for n in self.flushed_names if n == name or n.startswith(f"{name}/")]:
                del self.flushed_names[gone]
        self.flushed_names |= {name: file for name, file in self.names.items() if _parent(name) == folder}

    def seen(self) -> State:
        return {name: None if file is None else bytes(file.now) for name, file in self.names.items()}

    def after_power(self) -> State:
        reachable = {n: f for n, f in self.flushed_names.items() if self._has_parents(n)}
        return {name: None if file is None else bytes(file.flushed) for name, file in reachable.items()}

    def after_power_with_nuls(self) -> State:
        return {name: None if file is None else file.with_nuls() for name, file in self.names.items()}

    def _has_parents(self, name: str) -> bool:
        parent = _parent(name)
        return parent == "" or (self.flushed_names.get(parent, 0) is None and self._has_parents(parent))


def _parent(name: str) -> str:
    return name.rpartition("/")[0]


def record(out: Path, log: Path) -> tuple[Ended, list[Operation]]:
    """A run of forty answers, and what it did to the disk, with paths below ``out``'s folder."""
    library = shim()
    base = str(out.parent)
    ended = run(*scripted(out), before=lambda: library.chaos_arm(base.encode(), str(log).encode(), -1, 0))
    return ended, list(_operations(log.read_bytes(), len(base) + 1))


def _operations(raw: bytes, skip: int) -> Iterator[Operation]:
    at = 0
    while at < len(raw):
        code, *lengths, offset = _HEAD.unpack_from(raw, at)
        at += _HEAD.size
        parts = []
        for length in lengths:
            parts.append(raw[at : at + length])
            at += length
        path, other = (part.decode()[skip:] for part in parts[:2])
        if not path.endswith("-shm"):  # SQLite's shared memory: made anew by the first who comes
            yield Operation(code, path, other, offset, parts[2])


def states(operations: list[Operation], every: int) -> Iterator[tuple[int, str, State]]:
    """What each crash would leave: the number of the operation, the kind of crash, the files."""
    disk = Disk()
    for number, operation in enumerate([*operations, None]):
        if number % every == 0:
            yield number, "kill", disk.seen()
            yield number, "power", disk.after_power()
            yield number, "powernul", disk.after_power_with_nuls()
        if operation is None:
            return
        if operation.code == WRITE and number % every == 0:
            torn = disk.seen()
            half = operation.content[: len(operation.content) // 2]
            content = bytearray(torn.get(operation.path) or b"")
            content.extend(bytes(max(0, operation.offset - len(content))))
            content[operation.offset : operation.offset + len(half)] = half
            yield number, "torn", torn | {operation.path: bytes(content)}
        disk.apply(operation)
        if number % every == 0:
            yield number, "killafter", disk.seen()


def check(folder: Path, every: int) -> list[Row]:
    """Crash before every ``every``-th operation of a run of forty answers, and resume each state."""
    if shim() is None:
        return [Row("every crash point is recovered from", 0, note="skipped: no C compiler")]
    out = folder / "recorded" / "out"
    out.parent.mkdir()
    ended, operations = record(out, folder / "operations")
    assert ended.code == 0, ended.err
    expected = parquet(out)
    unreadable: list[str] = []
    failed: list[str] = []
    lost: list[str] = []
    outcomes: dict[str, tuple[int, str, str]] = {}
    flushed = most = 0
    syncs = set(_commits(operations))
    tried = 0
    for number, kind, state in states(operations, every):
        tried += 1
        digest = hashlib.sha256(repr(sorted(state.items())).encode()).hexdigest()
        if digest not in outcomes:
            outcomes[digest] = _outcome(folder / "crashed", state, expected)
        answers, unread, wrong = outcomes[digest]
        where = f"{kind} at {number} ({operations[min(number, len(operations) - 1)].path})"
        unreadable += [f"{where}: {unread}"] if unread else []
        failed += [f"{where}: {wrong}"] if wrong else []
        if kind == "kill":
            if answers < most:
                lost.append(f"{where}: {answers} answers, and {most} before")
            most = max(most, answers)
            flushed = answers if number in syncs else flushed
        elif kind.startswith("power") and answers < flushed:
            lost.append(f"{where}: {answers} answers, and {flushed} were flushed")
    note = f"{len(operations)} operations, {most} answers, {len(outcomes)} different states"
    return [
        Row("every crash point can be read", tried, unreadable, note),
        Row("every crash point is resumed to the same bytes", tried, failed),
        Row("no crash point loses an answer", tried, lost),
    ]


def _commits(operations: list[Operation]) -> Iterator[int]:
    """Where a commit was over: the log is flushed, and when the log is new its name as well."""
    for number, operation in enumerate(operations):
        if operation.code == SYNC and operation.path.endswith("journal.sqlite-wal"):
            follows = operations[number + 1 : number + 2]
            yield number + (2 if follows and follows[0].code == SYNC else 1)


def _outcome(base: Path, state: State, expected: dict[str, bytes]) -> tuple[int, str, str]:
    """Answers in the journal, why it cannot be read, and what is wrong after resuming ("" for nothing)."""
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir()
    for path, content in sorted(state.items(), key=lambda item: (item[1] is not None, item[0])):
        place = base / path
        place.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.write_bytes(content)
    out = base / "out"
    answers, unread = _answers(out / "run" / "journal.sqlite", base / "copy")
    unread = unread or _verified(out, base / "copy")
    ended = run(*scripted(out))
    if ended.code != 0:
        return answers, unread, f"resume ended with {ended.code}: {ended.err[-300:]}"
    if parquet(out) != expected:
        return answers, unread, f"other bytes: {json.dumps(sorted(parquet(out)))}"
    return answers, unread, _verified(out, base / "copy")


def _verified(out: Path, copy: Path) -> str:
    """What ``verify`` says of a copy: a crash is no damage."""
    if not out.exists():
        return ""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(out, copy)
    damaged = [*inspection.inspect(copy)[1], *audit.examine(copy)[1]]
    return f"verify: {[(path.name, problem) for path, problem in damaged]}" if damaged else ""


def _answers(journal: Path, copy: Path) -> tuple[int, str]:
    """How many answers a copy of the journal holds."""
    if not journal.exists():
        return 0, ""
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for name in (journal.name, f"{journal.name}-wal"):
        if journal.with_name(name).exists():
            shutil.copyfile(journal.with_name(name), copy / name)
    connection = sqlite3.connect(copy / journal.name)
    try:
        check = connection.execute("PRAGMA quick_check").fetchone()[0]
        count = int(connection.execute("SELECT COUNT(*) FROM answers").fetchone()[0])
    except sqlite3.DatabaseError as error:
        return 0, str(error)
    finally:
        connection.close()
    return count, "" if check == "ok" else str(check)
