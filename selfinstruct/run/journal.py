"""The journal: every answer that was paid for, durable before anything looks at it, and what was made of it.

SQLite in WAL mode with ``synchronous=FULL``; one thread writes (``writer.py``). The dataset is a function of seeds,
identity and these tables alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfinstruct.errors import DamagedFile, OutputError
from selfinstruct.records import Completion, Draft, Finish, Prompt, Reading, Row, SeedTask, Verdict, row_id
from selfinstruct.run.migrations import MIGRATIONS, migrate, version
from selfinstruct.run.writer import GroupWriter, Statement, connect, sqlite_errors

FILE_NAME = "journal.sqlite"


@dataclass(frozen=True, slots=True)
class Judged:
    """What became of one request: its drafts (as repaired) with their verdicts, and what could not be read."""

    request_no: int
    reading: Reading
    verdicts: tuple[tuple[Draft, Verdict], ...]


class Journal:
    """The record of one run. ``create`` makes it, ``open`` continues it, ``read_only`` looks at it while it grows."""

    def __init__(self, path: Path, connection: sqlite3.Connection, writer: GroupWriter | None) -> None:
        self.path = path
        self._connection = connection
        self._writer = writer

    @classmethod
    def create(cls, folder: Path, *, identity: dict[str, Any], seeds: Sequence[SeedTask]) -> Journal:
        """Make the journal of a new run. It appears under its name only when it is whole."""
        path, unfinished = folder / FILE_NAME, folder / f"{FILE_NAME}.new"
        with sqlite_errors(path):
            for leftover in folder.glob(f"{unfinished.name}*"):
                leftover.unlink()
            connection = sqlite3.connect(unfinished, isolation_level=None)
            migrate(connection)
            tasks = [[s.task_id, s.instruction, s.input, s.output, s.is_classification] for s in seeds]
            meta = {"identity": json.dumps(identity, sort_keys=True), "seeds": json.dumps(tasks, ensure_ascii=False)}
            connection.execute("BEGIN")
            connection.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
            connection.execute("COMMIT")
            connection.close()
            unfinished.replace(path)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> Journal:
        """Open the journal of a run to go on with it."""
        path = folder / FILE_NAME
        with sqlite_errors(path):
            connection = connect(path, "rw")
            _check_version(path, connection)
            migrate(connection)
            return cls(path, connection, GroupWriter(path))

    @classmethod
    def read_only(cls, folder: Path) -> Journal:
        """Open the journal to look at it; a run may be writing to it at the same time."""
        path = folder / FILE_NAME
        with sqlite_errors(path):
            connection = connect(path, "ro")
            _check_version(path, connection)
        return cls(path, connection, None)

    def identity(self) -> dict[str, Any]:
        """The settings that decide the rows, as recorded when the run began."""
        found: dict[str, Any] = json.loads(self._meta("identity"))
        return found

    def seeds(self) -> list[SeedTask]:
        """The seed tasks of the run: it goes on with these, wherever their file is now."""
        return [SeedTask(*task) for task in json.loads(self._meta("seeds"))]

    async def record_answer(self, prompt: Prompt, completion: Completion) -> None:
        """Write an answer down; returns when it is on the disk."""
        values = (
            completion.request_no,
            prompt_sha(prompt),
            json.dumps(prompt.shown_ids, ensure_ascii=False),
            completion.text,
            completion.finish,
            completion.model,
            completion.prompt_tokens,
            completion.cached_tokens,
            completion.completion_tokens,
            completion.seconds,
            completion.attempts,
        )
        await self._put(
            [("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", [(*values, _crc(values))])]
        )

    def answer(self, prompt: Prompt) -> Completion | None:
        """The stored answer to this very prompt, None without; DamagedFile when it is not what was stored."""
        row = self._one("SELECT * FROM answers WHERE request_no = ?", (prompt.request_no,))
        if row is None:
            return None
        if _crc(row[:-1]) != row[-1]:
            raise DamagedFile(
                f"{self.path}: the answer to request {prompt.request_no} is not what was written",
                hint="restore the file from a copy; nothing was changed",
            )
        if row[1] != prompt_sha(prompt):
            raise DamagedFile(f"{self.path}: the answer to request {prompt.request_no} belongs to another prompt")
        finish: Finish = row[4]
        return Completion(row[0], row[3], finish, row[6], row[7], row[8], row[5], row[9], row[10])

    def record_judged(self, judged: Judged) -> None:
        """Queue what became of a request, as one transaction. It can be worked out again, so nobody waits for it."""
        number = judged.request_no
        accepted = sum(1 for _, verdict in judged.verdicts if verdict.accepted)
        drafts = [
            (
                number,
                draft.item_no,
                draft.instruction,
                draft.input,
                draft.output,
                " ".join(draft.repairs),
                verdict.accepted,
                verdict.rule,
                verdict.detail,
                verdict.score,
                verdict.nearest_id,
            )
            for draft, verdict in judged.verdicts
        ]
        losses = [(number, loss.item_no, loss.reason, loss.detail) for loss in judged.reading.losses]
        self._writing.put(
            [
                ("INSERT INTO drafts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", drafts),
                ("INSERT INTO losses VALUES (?, ?, ?, ?)", losses),
                ("INSERT INTO judged VALUES (?, ?, ?)", [(number, len(drafts), accepted)]),
            ],
            wait=False,
        )

    def judged(self) -> list[tuple[int, int]]:
        """Drafts and accepted drafts of every judged request, in order."""
        return [(row[1], row[2]) for row in self._all("SELECT * FROM judged ORDER BY request_no")]

    def answered_beyond(self, request_no: int) -> set[int]:
        """Numbers of stored answers from ``request_no`` on."""
        return {row[0] for row in self._all("SELECT request_no FROM answers WHERE request_no >= ?", (request_no,))}

    def accepted(self, limit: int = -1) -> Iterator[Draft]:
        """Accepted drafts in their order, at most ``limit`` (-1: all)."""
        sql = (
            "SELECT request_no, item_no, instruction, input, output FROM drafts WHERE accepted "
            "ORDER BY request_no, item_no LIMIT ?"
        )
        for row in self._connection.execute(sql, (limit,)):
            yield Draft(*row)

    def rows(self, limit: int) -> Iterator[Row]:
        """The first ``limit`` rows of the dataset."""
        identity = self.identity()
        sql = (
            "SELECT d.request_no, d.item_no, d.instruction, d.input, d.output, a.shown_ids FROM drafts d "
            "JOIN answers a USING (request_no) WHERE d.accepted ORDER BY d.request_no, d.item_no LIMIT ?"
        )
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
        answered, prompt, cached, completion, attempts = self._one(
            "SELECT COUNT(*), TOTAL(prompt_tokens), TOTAL(cached_tokens), TOTAL(completion_tokens), TOTAL(attempts) "
            "FROM answers"
        ) or (0, 0, 0, 0, 0)
        judged, drafts, accepted = self._one("SELECT COUNT(*), TOTAL(drafts), TOTAL(accepted) FROM judged") or (0, 0, 0)
        rejected = self._all("SELECT rule, COUNT(*) FROM drafts WHERE NOT accepted GROUP BY rule ORDER BY 2 DESC, 1")
        lost = self._all("SELECT reason, COUNT(*) FROM losses GROUP BY reason ORDER BY 2 DESC, 1")
        repaired = self._all(
            "SELECT repairs, COUNT(*) FROM drafts WHERE repairs <> '' GROUP BY repairs ORDER BY 2 DESC"
        )
        return {
            "requests": int(answered),
            "attempts": int(attempts),
            "judged": int(judged),
            "drafts": int(drafts),
            "accepted": int(accepted),
            "prompt_tokens": int(prompt),
            "cached_tokens": int(cached),
            "completion_tokens": int(completion),
            "rejected": {rule: int(count) for rule, count in rejected},
            "lost": {reason: int(count) for reason, count in lost},
            "repaired": {names: int(count) for names, count in repaired},
        }

    async def flush(self) -> None:
        """Return when everything queued so far is on the disk."""
        await self._put([])

    def close(self) -> None:
        """Write what is queued and close; OutputError when that failed."""
        self._connection.close()
        if self._writer is not None:
            self._writer.close()

    @property
    def _writing(self) -> GroupWriter:
        if self._writer is None:
            raise TypeError("this journal was opened to be looked at")
        return self._writer

    def _meta(self, key: str) -> str:
        row = self._one("SELECT value FROM meta WHERE key = ?", (key,))
        if row is None:
            raise DamagedFile(f"{self.path}: has no {key!r} entry; it is no journal of a run")
        return str(row[0])

    def _one(self, sql: str, values: tuple[Any, ...] = ()) -> tuple[Any, ...] | None:
        with sqlite_errors(self.path):
            row: tuple[Any, ...] | None = self._connection.execute(sql, values).fetchone()
            return row

    def _all(self, sql: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        with sqlite_errors(self.path):
            return self._connection.execute(sql, values).fetchall()

    async def _put(self, statements: Sequence[Statement]) -> None:
        done = self._writing.put(statements, wait=True)
        if done is not None:
            await asyncio.wrap_future(done)


def prompt_sha(prompt: Prompt) -> str:
    """16 hex digits of what a prompt says: an answer belongs to the very prompt that was sent."""
    said = prompt.text if prompt.messages is None else json.dumps([dict(m) for m in prompt.messages])
    return hashlib.sha256(f"{said}\x1f{prompt.seed}".encode()).hexdigest()[:16]


def _crc(values: tuple[Any, ...]) -> int:
    return zlib.crc32(json.dumps(values, ensure_ascii=True).encode())


def _check_version(path: Path, connection: sqlite3.Connection) -> None:
    found = version(connection)
    if found > len(MIGRATIONS):
        raise OutputError(
            f"{path}: was written by a newer release (schema {found}, this one knows {len(MIGRATIONS)})",
            hint="pip install --upgrade selfinstruct",
        )
    if found == 0:
        raise DamagedFile(f"{path}: is no journal of a run", hint="choose another folder, or remove this file")
