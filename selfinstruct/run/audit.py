"""Looking for damage in a journal: SQLite's structures, the checksum of every record, and what must fit together.

Answers are what was paid for; what was made of them (``judged``, ``drafts``, ``losses``) can be worked out again. So
damage to the second is mended by forgetting it, and damage to the first is told.
"""

from __future__ import annotations

import shlex
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from selfinstruct.errors import DamagedFile
from selfinstruct.run import seal
from selfinstruct.run.seal import checksum
from selfinstruct.run.writer import Statement

_MOST_PROBLEMS = 5


@dataclass(slots=True)
class Damage:
    """What is wrong with a journal. ``problems`` cannot be mended; ``judged_from`` is the first request (if any) that
    must be judged again. ``answers`` are those that are damaged, which the first few ``problems`` name."""

    problems: list[str] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    judged_from: int | None = None


def examine(connection: sqlite3.Connection) -> Damage:
    """Read the whole journal and compare every record with its checksum (52,002 answers: 2 s)."""
    damage = _examined(connection)
    if damage.problems:  # once more, so that a text that is no UTF-8 is a record that its checksum tells apart
        connection.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
        damage = _examined(connection)
        connection.text_factory = str
    return damage


def _examined(connection: sqlite3.Connection) -> Damage:
    damage = Damage()
    try:
        _examine_structure(connection, damage)
        if not damage.problems:
            _examine_meta(connection, damage)
        if not damage.problems:
            _examine_answers(connection, damage)
            damage.judged_from = _first_bad_judgement(connection)
    except (sqlite3.Error, UnicodeDecodeError) as error:
        damage.problems.append(str(error))
    return damage


def is_sealed(path: Path, connection: sqlite3.Connection) -> bool:
    """True when the journal is the very file that was sealed. A run at work on it says first that it is open."""
    if not has_checksums(connection):
        return False
    return is_closed(connection) and seal.state(path) == "good"


def is_closed(connection: sqlite3.Connection) -> bool:
    """True when the last run on the journal ended well, and so sealed it."""
    row = connection.execute("SELECT value FROM meta WHERE key = 'state'").fetchone()
    return bool(row == ("sealed",))


def require_answers(path: Path, connection: sqlite3.Connection) -> int | None:
    """The first request that must be judged again, None when all is well; DamagedFile for what cannot be mended."""
    damage = examine(connection)
    if damage.problems:
        out = shlex.quote(str(path.parent.parent))
        instead = (
            f", or pay for these answers again: selfinstruct resume {out} --forget-damaged" if damage.answers else ""
        )
        raise DamagedFile(
            f"{path}: is damaged ({_told(damage)})",
            hint=f"nothing was changed; restore the file from a copy{instead}",
        )
    return damage.judged_from


def forget_damaged_answers(connection: sqlite3.Connection) -> int:
    """Forget answers that are not what was written, and what was made of all from the first on; how many.

    They are then asked for again. The number is 0, and nothing is forgotten, when more than answers is damaged.
    """
    damaged = examine(connection).answers
    if damaged:
        forget = ("DELETE FROM answers WHERE request_no = ?", [(number,) for number in damaged])
        _in_one(connection, [forget, *judgements_forgotten(min(damaged))])
    return len(damaged)


def _told(damage: Damage) -> str:
    more = len(damage.answers) - len(damage.problems)
    return "; ".join(damage.problems) + (f"; and {more} more answers" if more > 0 else "")


def has_checksums(connection: sqlite3.Connection) -> bool:
    """True from schema 2 on."""
    return any(row[1] == "crc" for row in connection.execute("PRAGMA table_info(judged)"))


def forget_judgements(connection: sqlite3.Connection, first: int) -> None:
    """Forget what was made of the answers from request ``first`` on; the loop works it out again from them."""
    _in_one(connection, judgements_forgotten(first))


def judgements_forgotten(first: int) -> list[Statement]:
    """The statements that forget what was made of the answers from request ``first`` on."""
    # not "request_no >= first": a damaged number may compare as anything
    return [
        (f"DELETE FROM {table} WHERE request_no NOT BETWEEN 0 AND ?", [(first - 1,)])  # noqa: S608
        for table in ("judged", "drafts", "losses")
    ]


def _in_one(connection: sqlite3.Connection, statements: Sequence[Statement]) -> None:
    connection.execute("BEGIN IMMEDIATE")
    for sql, rows in statements:
        connection.executemany(sql, rows)
    connection.execute("COMMIT")


def judgements(connection: sqlite3.Connection) -> Iterator[tuple[int, list[Any], int | None]]:
    """What was made of each request, in order: its number, all that its checksum covers, and the checksum.

    The checksum is None for drafts and losses that no entry of ``judged`` speaks of.
    """
    sums = "crc" if has_checksums(connection) else "0"
    judged = connection.execute(f"SELECT request_no, drafts, accepted, {sums} FROM judged ORDER BY request_no")  # noqa: S608
    drafts = _grouped(connection.execute("SELECT * FROM drafts ORDER BY request_no, item_no"))
    losses = _grouped(connection.execute("SELECT * FROM losses ORDER BY request_no, item_no"))
    next_drafts, next_losses = next(drafts, None), next(losses, None)
    for number, draft_count, accepted, stored in judged:
        values: list[Any] = [number, draft_count, accepted, [], []]
        if next_drafts is not None and next_drafts[0] == number:
            values[3], next_drafts = next_drafts[1], next(drafts, None)
        if next_losses is not None and next_losses[0] == number:
            values[4], next_losses = next_losses[1], next(losses, None)
        yield number, values, stored
    for left in (next_drafts, next_losses):
        if left is not None:
            yield left[0], [left], None


def _grouped(rows: sqlite3.Cursor) -> Iterator[tuple[int, list[Any]]]:
    for number, some in groupby(rows, key=itemgetter(0)):
        yield number, [list(row) for row in some]


def _examine_structure(connection: sqlite3.Connection, damage: Damage) -> None:
    said = [str(row[0]) for row in connection.execute(f"PRAGMA quick_check({_MOST_PROBLEMS})")]
    if said != ["ok"]:
        damage.problems += [" ".join(line.split()) for line in said]


def _examine_meta(connection: sqlite3.Connection, damage: Damage) -> None:
    for key, value, stored in connection.execute("SELECT key, value, crc FROM meta"):
        if checksum([key, value]) != stored:
            damage.problems.append(f"the entry {str(key)[:20]!r} is not what was written")


def _examine_answers(connection: sqlite3.Connection, damage: Damage) -> None:
    for row in connection.execute("SELECT * FROM answers ORDER BY request_no"):
        if checksum(row[:-1]) != row[-1]:
            damage.answers.append(row[0])
            if len(damage.answers) <= _MOST_PROBLEMS:
                damage.problems.append(f"the answer to request {row[0]} is not what was written")


def _first_bad_judgement(connection: sqlite3.Connection) -> int | None:
    answered = connection.execute("SELECT request_no FROM answers ORDER BY request_no")
    for expected, (number, values, stored) in enumerate(judgements(connection)):
        if number != expected or checksum(values) != stored or next(answered, (None,))[0] != number:
            return expected
    return None
