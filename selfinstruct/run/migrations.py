"""The journal's tables, one numbered step a schema version; ``PRAGMA user_version`` says which steps were taken."""

from __future__ import annotations

import sqlite3

MIGRATIONS: tuple[str, ...] = (
    """
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
    """,
)


def version(connection: sqlite3.Connection) -> int:
    """How many steps this journal has taken."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def migrate(connection: sqlite3.Connection) -> None:
    """Take the steps that are missing, each in a transaction of its own."""
    for number in range(version(connection), len(MIGRATIONS)):
        connection.executescript(f"BEGIN;{MIGRATIONS[number]};PRAGMA user_version = {number + 1};COMMIT;")
