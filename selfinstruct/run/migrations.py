"""The journal's tables, one numbered step a schema version; ``PRAGMA user_version`` says which steps were taken."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

from selfinstruct.errors import DamagedFile, OutputError
from selfinstruct.run.audit import judgements
from selfinstruct.run.seal import checksum

_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE answers (
    request_no INTEGER PRIMARY KEY,
    prompt_sha TEXT NOT NULL,
    shown_ids TEXT NOT NULL,
    text TEXT NOT NULL,
    finish TEXT NOT NULL,
    model TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    seconds REAL NOT NULL,
    attempts INTEGER NOT NULL,
    crc INTEGER NOT NULL
);
CREATE TABLE judged (
    request_no INTEGER PRIMARY KEY,
    drafts INTEGER NOT NULL,
    accepted INTEGER NOT NULL
);
CREATE TABLE drafts (
    request_no INTEGER NOT NULL,
    item_no INTEGER NOT NULL,
    instruction TEXT NOT NULL,
    input TEXT NOT NULL,
    output TEXT NOT NULL,
    repairs TEXT NOT NULL,
    accepted INTEGER NOT NULL,
    rule TEXT NOT NULL,
    detail TEXT NOT NULL,
    score REAL,
    nearest_id TEXT,
    PRIMARY KEY (request_no, item_no)
) WITHOUT ROWID;
CREATE TABLE losses (
    request_no INTEGER NOT NULL,
    item_no INTEGER NOT NULL,
    reason TEXT NOT NULL,
    detail TEXT NOT NULL,
    PRIMARY KEY (request_no, item_no)
) WITHOUT ROWID;
"""


def _first(connection: sqlite3.Connection) -> None:
    for statement in _TABLES.split(";"):
        connection.execute(statement)


def _checksums_for_all(connection: sqlite3.Connection) -> None:
    """Schema 1 had checksums on answers alone."""
    for table in ("meta", "judged"):
        connection.execute(f"ALTER TABLE {table} ADD COLUMN crc INTEGER NOT NULL DEFAULT 0")
    for key, value in connection.execute("SELECT key, value FROM meta").fetchall():
        connection.execute("UPDATE meta SET crc = ? WHERE key = ?", (checksum([key, value]), key))
    sums = [(checksum(values), number) for number, values, _ in judgements(connection)]
    connection.executemany("UPDATE judged SET crc = ? WHERE request_no = ?", sums)


MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (_first, _checksums_for_all)


def version(connection: sqlite3.Connection) -> int:
    """How many steps this journal has taken."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def migrate(connection: sqlite3.Connection) -> None:
    """Take the steps that are missing, each in a transaction of its own."""
    for number in range(version(connection), len(MIGRATIONS)):
        connection.execute("BEGIN IMMEDIATE")
        try:
            MIGRATIONS[number](connection)
            connection.execute(f"PRAGMA user_version = {number + 1}")
            connection.execute("COMMIT")
        except sqlite3.Error:
            connection.execute("ROLLBACK")
            raise


def check_version(path: Path, connection: sqlite3.Connection) -> None:
    """Raise when this release cannot go on with the journal: it is newer, or none."""
    found = version(connection)
    if found > len(MIGRATIONS):
        raise OutputError(
            f"{path}: was written by a newer release (schema {found}, this one knows {len(MIGRATIONS)})",
            hint="pip install --upgrade selfinstruct",
        )
    if found <= 0:
        raise DamagedFile(f"{path}: is no journal of a run", hint="choose another folder, or remove this file")


def require_current(path: Path, connection: sqlite3.Connection) -> None:
    """Raise when the journal cannot be read without changing it first."""
    check_version(path, connection)
    found = version(connection)
    if found < len(MIGRATIONS):
        raise OutputError(
            f"{path}: was written by an earlier release (schema {found}, this one reads {len(MIGRATIONS)})",
            hint=f"bring it up to date with: selfinstruct resume {path.parent.parent}",
        )
