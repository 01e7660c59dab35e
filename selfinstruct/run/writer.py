"""The thread that writes: everything queued while the last commit was on its way to the disk goes into the next.

What somebody waits for is committed at once. So an answer is exposed for the time of one or two fsyncs.
"""

from __future__ import annotations

import os
import queue
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from selfinstruct.errors import DamagedFile, OutputError
from selfinstruct.run.seal import Announcement, checksum

BUSY_SECONDS = 10.0
_PAUSE_SECONDS = 0.05  # what nobody waits for goes with the next thing that somebody waits for
_MOST_IN_A_COMMIT = 1024
_SIGNS_OF_DAMAGE = ("malformed", "Could not decode", "no such table", "no such column", "unsupported file format")

Statement = tuple[str, Sequence[tuple[Any, ...]]]
_Entry = tuple[Sequence[Statement], int, "Future[None] | None"]


class GroupWriter:
    """Commits groups of statements in the order in which they were put; each group is atomic with its commit.

    An answer that is on the disk is announced, then who waits for it hears so; ``answers`` were announced before.
    After a failure nothing more is written, and every later call raises that failure.
    """

    def __init__(self, path: Path, answers: int) -> None:
        self._path = path
        self._queue: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._failure: OutputError | None = None
        self._connection = connect(path, "rw")
        self._announcement = Announcement(path, answers)
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def put(self, statements: Sequence[Statement], *, wait: bool, answers: int = 0) -> Future[None] | None:
        """Queue statements (SQL, rows of values). With ``wait`` a future that is done when they are on the disk.

        ``answers`` is how many more answers the journal holds by them.
        """
        self.check()
        done: Future[None] | None = Future() if wait else None
        if done is not None:
            done.set_running_or_notify_cancel()  # what is queued is written, whoever gives up waiting for it
        self._queue.put((statements, answers, done))
        return done

    def close(self) -> None:
        """Write what is queued, then stop; raises what went wrong."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
            self._connection.close()
            with sqlite_errors(self._path):
                self._announcement.close()
        self.check()

    def check(self) -> None:
        """Raise the failure, if there was one."""
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        ended = False
        while not ended:
            entry = self._queue.get()
            batch: list[_Entry] = []
            pause = _PAUSE_SECONDS
            while entry is not None:
                batch.append(entry)
                if len(batch) >= _MOST_IN_A_COMMIT:
                    break
                pause = pause if entry[2] is None else 0.0
                try:
                    entry = self._queue.get(timeout=pause)
                except queue.Empty:
                    break
            ended = entry is None
            if batch:
                self._commit(batch)

    def _commit(self, batch: Sequence[_Entry]) -> None:
        if self._failure is None:
            try:
                with sqlite_errors(self._path):
                    self._connection.execute("BEGIN IMMEDIATE")
                    for statements, _, _ in batch:
                        for sql, rows in statements:
                            self._connection.executemany(sql, rows)
                    self._connection.execute("COMMIT")
                    answers = sum(more for _, more, _ in batch)
                    if answers:
                        self._announcement.add(answers)
            except OutputError as error:
                self._failure = error
            except Exception as error:  # noqa: BLE001  (whatever it was, those who wait must hear of it)
                self._failure = OutputError(f"{self._path}: cannot take what was to be written ({error})")
        for _, _, done in batch:
            if done is not None and self._failure is not None:
                done.set_exception(self._failure)
            elif done is not None:
                done.set_result(None)


def connect(path: Path, mode: Literal["rw", "ro"]) -> sqlite3.Connection:
    """Open an existing SQLite file: "rw", or "ro" to look on while another process writes.

    Also "ro" opens for writing where it may: only such a connection takes SQLite's side files away when it is the last
    to leave. A folder that nobody can write to is read as it is, without SQLite's log.
    """
    how = "mode=rw" if os.access(path.parent, os.W_OK) else "mode=ro&immutable=1"
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?{how}",
        uri=True,
        isolation_level=None,
        check_same_thread=False,
        timeout=BUSY_SECONDS,
    )
    if mode == "rw":
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
    else:
        connection.execute("PRAGMA query_only=ON")
    return connection


def passes_log_over(path: Path) -> bool:
    """True when there is a log and ``connect`` does not read it, since nobody can write to the folder."""
    return path.with_name(f"{path.name}-wal").exists() and not os.access(path.parent, os.W_OK)


def get_meta(connection: sqlite3.Connection, key: str) -> str | None:
    """An entry of ``meta``, None without; DatabaseError when it is not what was written."""
    row = connection.execute("SELECT * FROM meta WHERE key = ?", (key,)).fetchone()
    if row is not None and len(row) > 2 and checksum([key, row[1]]) != row[2]:  # schema 1 has no checksum here
        raise sqlite3.DatabaseError(f"malformed entry {key!r}")
    return None if row is None else str(row[1])


def set_meta(connection: sqlite3.Connection, **values: str) -> None:
    """Set entries of ``meta`` in one transaction."""
    connection.execute("BEGIN IMMEDIATE")
    rows = [(key, value, checksum([key, value])) for key, value in values.items()]
    connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?, ?)", rows)
    connection.execute("COMMIT")


@contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Turn SQLite's and the system's errors into ours, naming the file."""
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:
        damaged = not isinstance(error, sqlite3.OperationalError | sqlite3.IntegrityError)
        if damaged or any(sign in str(error) for sign in _SIGNS_OF_DAMAGE):
            raise DamagedFile(
                f"{path}: is damaged or no journal ({error})", hint="restore the file from a copy; nothing was changed"
            ) from error
        raise OutputError(
            f"{path}: {error}", hint="it must lie on a local disk with free space, and be writable"
        ) from error
    except OSError as error:
        raise OutputError(
            f"{path}: {error.strerror or error}", hint="check the disk's free space and the folder's permissions"
        ) from error
