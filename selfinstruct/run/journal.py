"""The journal: every answer that was paid for, durable before anything looks at it, and what was made of it.

SQLite in WAL mode with ``synchronous=FULL``; one thread writes (``writer.py``). The dataset is a function of seeds,
identity and these tables alone. Every record has a checksum, and the file of an ended run has a seal: whoever opens a
journal reads it whole first, unless the seal is good (``audit.py``, ``seal.py``).
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from selfinstruct import durable
from selfinstruct.errors import DamagedFile
from selfinstruct.records import Completion, Draft, Prompt, Row, SeedTask, row_id
from selfinstruct.run import entries, seal
from selfinstruct.run.audit import (
    forget_damaged_answers,
    forget_judgements,
    judgements_forgotten,
    paid,
    require_announcement,
    require_answers,
    says_sealed,
)
from selfinstruct.run.counts import counts
from selfinstruct.run.entries import Judged
from selfinstruct.run.migrations import check_version, migrate, require_current
from selfinstruct.run.writer import GroupWriter, Statement, connect, get_meta, set_meta, sqlite_errors

FILE_NAME = "journal.sqlite"
_SEAL_MILLISECONDS = 2000  # a signal ends a run within seconds, readers or not


class Journal:
    """The record of one run.

    ``create`` makes it and ``open`` continues it; ``begin`` must follow before anything is recorded. ``read_only``
    looks at it, also while it grows. ``mended`` says what was damaged and is being worked out again ("": nothing).
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, *, mended: str = "", is_sound: bool = True) -> None:
        self.path = path
        self.mended = mended
        self._is_sound = is_sound
        self._connection = connection
        self._writer: GroupWriter | None = None

    @classmethod
    def create(cls, folder: Path, *, identity: Mapping[str, Any], seeds: Sequence[SeedTask]) -> Journal:
        """Make the journal of a new run. It appears under its name only when it is whole and on the disk."""
        path, unfinished = folder / FILE_NAME, folder / f"{FILE_NAME}.new"
        tasks = [[s.task_id, s.instruction, s.input, s.output, s.is_classification] for s in seeds]
        with sqlite_errors(path):
            for leftover in folder.glob(f"{unfinished.name}*"):
                leftover.unlink()
            connection = sqlite3.connect(unfinished, isolation_level=None)
            migrate(connection)
            set_meta(connection, identity=json.dumps(identity, sort_keys=True), seeds=json.dumps(tasks))
            connection.execute("PRAGMA journal_mode=WAL")
            connection.close()
            durable.sync(unfinished)
            unfinished.replace(path)
            durable.sync(folder)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path, *, forget_damaged: bool = False) -> Journal:
        """Open the journal of a run to go on with it: mended where that can be done, else DamagedFile.

        ``forget_damaged`` also takes damaged and missing answers as forgotten: they are asked for, and paid, again.
        """
        path, mended = folder / FILE_NAME, ""
        with sqlite_errors(path):
            connection, sealed = _connected(path, "rw")
            check_version(path, connection)
            migrate(connection)
            if forget_damaged and not sealed:
                damaged, missing = forget_damaged_answers(path, connection)
                told = " and ".join(f"{n} {what}" for n, what in ((damaged, "damaged"), (missing, "missing")) if n)
                are = "answer is" if damaged + missing == 1 else "answers are"
                mended = f"{path}: {told} {are} asked for again" if told else ""
            elif not sealed:
                require_announcement(path, connection)
            if not sealed:
                first = require_answers(path, connection)
                if first is not None:
                    forget_judgements(connection, first)
                    mended = f"{path}: what was made of the answers from {first} on was damaged; it is worked out again"
            return cls(path, connection, mended=mended)

    @classmethod
    def read_only(cls, folder: Path) -> Journal:
        """Open the journal to look at it; a run may be writing to it at the same time."""
        path = folder / FILE_NAME
        with sqlite_errors(path):
            connection = connect(path, "ro")
            check_version(path, connection)
        return cls(path, connection, is_sound=False)

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Note the settings that the run is now worked on with, break the seal, and be ready to record."""
        with sqlite_errors(self.path):
            answers = paid(self._connection)
            seal.announce(self.path, answers)
            set_meta(self._connection, settings=json.dumps(settings), state="announced")
            # Into the file itself: who has nothing but that file is then told that the announcement is missing.
            self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            self._writer = GroupWriter(self.path, answers)

    def identity(self) -> dict[str, Any]:
        """The settings that decide the rows, as recorded when the run began."""
        return dict(json.loads(self._meta("identity") or "{}"))

    def seeds(self) -> list[SeedTask]:
        """The seed tasks of the run: it goes on with these, wherever their file is now."""
        return [SeedTask(*task) for task in json.loads(self._meta("seeds") or "[]")]

    def require_sound(self) -> None:
        """Raise when anything in the journal is not what was written, or of an old schema; looked for once."""
        if self._is_sound:
            return
        with sqlite_errors(self.path):
            require_current(self.path, self._connection)
            self._connection.close()
            self._connection, sealed = _connected(self.path, "ro")
            if not sealed:
                first = require_answers(self.path, self._connection)
                if first is not None:
                    raise DamagedFile(
                        f"{self.path}: what was made of the answers from {first} on is damaged; the answers are good",
                        hint=f"it is worked out again by: selfinstruct resume {self.path.parent.parent}",
                    )
        self._is_sound = True

    def settings(self) -> dict[str, Any] | None:
        """All settings that the run was last worked on with; None in a journal of schema 1."""
        return json.loads(found) if (found := self._meta("settings")) else None

    async def record_answer(self, prompt: Prompt, completion: Completion) -> None:
        """Write an answer down; returns when it is on the disk."""
        await self._put([entries.of_answer(prompt, completion)], answers=int(completion.finish != "given_up"))

    async def record_late_answer(self, prompt: Prompt, completion: Completion) -> None:
        """Write down the answer to a request that was given up, and forget what was made of all from it on.

        Both or neither: what follows is then judged again, from the answers that are here.
        """
        await self._put([entries.of_answer(prompt, completion), *judgements_forgotten(prompt.request_no)], answers=1)

    def answer(self, prompt: Prompt) -> Completion | None:
        """The stored answer to this very prompt, None without; DamagedFile when it is not what was stored."""
        row = self._one("SELECT * FROM answers WHERE request_no = ?", (prompt.request_no,))
        return None if row is None else entries.completion(self.path, prompt, row)

    def record_judged(self, judged: Judged) -> None:
        """Queue what became of a request, as one transaction. It can be worked out again, so nobody waits for it."""
        self._writing.put(entries.of_judged(judged), wait=False)

    def judged(self) -> list[tuple[int, int]]:
        """Drafts and accepted drafts of every judged request, in order."""
        return self._all("SELECT drafts, accepted FROM judged ORDER BY request_no")

    def answered_beyond(self, request_no: int) -> set[int]:
        """Numbers of stored answers from ``request_no`` on."""
        return {row[0] for row in self._all("SELECT request_no FROM answers WHERE request_no >= ?", (request_no,))}

    def given_up(self) -> list[int]:
        """Numbers of the requests that were given up for the time being, in order."""
        rows = self._all("SELECT request_no FROM answers WHERE finish = 'given_up' ORDER BY request_no")
        return [number for (number,) in rows]

    def accepted(self, limit: int = -1) -> Iterator[Draft]:
        """Accepted drafts in their order, at most ``limit`` (-1: all)."""
        sql = (
            "SELECT request_no, item_no, instruction, input, output FROM drafts WHERE accepted "
            "ORDER BY request_no, item_no LIMIT ?"
        )
        with sqlite_errors(self.path):
            for row in self._connection.execute(sql, (limit,)):
                yield Draft(*row)

    def rows(self, limit: int) -> Iterator[Row]:
        """The first ``limit`` rows of the dataset."""
        self.require_sound()
        identity = self.identity()
        sql = (
            "SELECT d.request_no, d.item_no, d.instruction, d.input, d.output, a.shown_ids FROM drafts d "
            "JOIN answers a USING (request_no) WHERE d.accepted ORDER BY d.request_no, d.item_no LIMIT ?"
        )
        with sqlite_errors(self.path):
            for number, item, instruction, given, output, shown in self._connection.execute(sql, (limit,)):
                yield Row(
                    id=row_id(instruction, given),
                    instruction=instruction,
                    input=given,
                    output=output,
                    method=identity["method"],
                    teacher=identity["teacher"],
                    language=identity["language"],
                    request_no=number,
                    item_no=item,
                    shown_ids=tuple(json.loads(shown)),
                )

    def counts(self) -> dict[str, Any]:
        """Figures of the whole run: requests, tokens, drafts, what was turned down and why."""
        self.require_sound()
        with sqlite_errors(self.path):
            return counts(self._connection)

    async def flush(self) -> None:
        """Return when everything queued so far is on the disk."""
        await self._put([])

    def close(self) -> None:
        """Write what is queued, seal the journal and close; OutputError when that failed."""
        try:
            if self._writer is not None:
                self._writer.close()
                self._seal()
        finally:
            self._connection.close()

    def _seal(self) -> None:
        """Bring everything into the one file and seal it; not while somebody reads: then the next run does."""
        with sqlite_errors(self.path):
            set_meta(self._connection, state="sealed")
            self._connection.execute(f"PRAGMA busy_timeout={_SEAL_MILLISECONDS}")
            if self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0:
                self._connection.close()  # first, see ``_connected``
                seal.write(self.path)
            else:
                set_meta(self._connection, state="announced")

    @property
    def _writing(self) -> GroupWriter:
        if self._writer is None:
            raise TypeError("this journal was opened to be looked at")
        return self._writer

    def _meta(self, key: str) -> str | None:
        with sqlite_errors(self.path):
            found = get_meta(self._connection, key)
        if found is None and key != "settings":
            raise DamagedFile(f"{self.path}: has no {key!r} entry; it is no journal of a run")
        return found

    def _one(self, sql: str, values: tuple[Any, ...] = ()) -> tuple[Any, ...] | None:
        return next(iter(self._all(sql, values)), None)

    def _all(self, sql: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        with sqlite_errors(self.path):
            return self._connection.execute(sql, values).fetchall()

    async def _put(self, statements: Sequence[Statement], *, answers: int = 0) -> None:
        done = self._writing.put(statements, wait=True, answers=answers)
        if done is not None:
            await asyncio.wrap_future(done)


def _connected(path: Path, mode: Literal["rw", "ro"]) -> tuple[sqlite3.Connection, bool]:
    """A connection to a journal, and whether that is the very file that was sealed.

    The seal is looked at first. It reads the file, and when a process closes any descriptor of a file the system drops
    all its locks on it (POSIX): SQLite would go on without the one that says that somebody works with the journal, and
    the next to look at it would take the log away from under a run.
    """
    seen = seal.state(path)
    connection = connect(path, mode)
    # said last: a run that began in between announces itself
    return connection, seen == "good" and says_sealed(connection)
