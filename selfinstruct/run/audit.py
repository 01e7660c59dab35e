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
from selfinstruct.run.writer import Statement, passes_log_over

_MOST_PROBLEMS = 5


@dataclass(slots=True)
class Damage:
    """What is wrong with a journal. ``problems`` cannot be mended; ``judged_from`` is the first request (if any) that
    must be judged again. ``answers`` are those that are damaged, which the first few ``problems`` name; ``missing`` is
    how many are gone with SQLite's log, which one of the ``problems`` tells."""

    problems: list[str] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    missing: int = 0
    judged_from: int | None = None


def examine(path: Path, connection: sqlite3.Connection) -> Damage:
    """Read the whole journal and compare every record with its checksum (52,002 answers: 2 s)."""
    # looked at first: the journal may grow meanwhile, and never holds less than was announced
    announced = 0 if passes_log_over(path) else seal.announced(path)
    damage = _examined(connection, announced)
    if damage.problems:  # once more, so that a text that is no UTF-8 is a record that its checksum tells apart
        connection.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
        damage = _examined(connection, announced)
        connection.text_factory = str
    return damage


def _examined(connection: sqlite3.Connection, announced: int) -> Damage:
    damage = Damage()
    try:
        _examine_structure(connection, damage)
        if not damage.problems:
            _examine_meta(connection, damage)
        if not damage.problems:
            _examine_answers(connection, damage, announced)
            damage.judged_from = _first_bad_judgement(connection)
    except (sqlite3.Error, UnicodeDecodeError) as error:
        damage.problems.append(str(error))
    return damage


def says_sealed(connection: sqlite3.Connection) -> bool:
    """Whether the journal says that it is sealed. A run at work on it says first that it is open."""
    return has_checksums(connection) and said_state(connection) == "sealed"


def said_state(connection: sqlite3.Connection) -> str:
    """What the journal says is beside it: "sealed" when the last run on it ended well, "announced" for an announcement.

    Anything else: nothing need be there (the run has not begun, or an earlier release was killed at it).
    """
    row = connection.execute("SELECT value FROM meta WHERE key = 'state'").fetchone()
    return "" if row is None else str(row[0])


def require_announcement(path: Path, connection: sqlite3.Connection) -> None:
    """DamagedFile when an announcement must be there and is not: nobody can tell then whether answers are missing."""
    if said_state(connection) == "announced" and (seen := seal.state(path)) in ("missing", "unreadable"):
        what = "missing" if seen == "missing" else "damaged"
        raise DamagedFile(
            f"{path.with_name(seal.FILE_NAME)}: is {what}, and says how many answers {path.name} must hold",
            hint="nothing was changed; restore both files (and the -wal file) from a copy, or go on with the answers "
            f"that are here: {_forgetting(path)}",
        )


def require_answers(path: Path, connection: sqlite3.Connection) -> int | None:
    """The first request that must be judged again, None when all is well; DamagedFile for what cannot be mended."""
    damage = examine(path, connection)
    if damage.problems:
        files = "the file and its -wal" if damage.missing else "the file"
        instead = f", or pay for these answers again: {_forgetting(path)}" if damage.answers or damage.missing else ""
        raise DamagedFile(
            f"{path}: is damaged ({_told(damage)})",
            hint=f"nothing was changed; restore {files} from a copy{instead}",
        )
    return damage.judged_from


def forget_damaged_answers(path: Path, connection: sqlite3.Connection) -> tuple[int, int]:
    """Forget answers that are not what was written, and what was made of all from the first on, and missing ones.

    They are then asked for again. Returns how many were damaged and how many missing. Both are 0, and nothing is
    forgotten, when more than answers is damaged.
    """
    damage = examine(path, connection)
    if damage.answers or damage.missing:
        seal.announce(path, 0)  # first, so that it is never ahead
    if damage.answers:
        forget = ("DELETE FROM answers WHERE request_no = ?", [(number,) for number in damage.answers])
        _in_one(connection, [forget, *judgements_forgotten(min(damage.answers))])
    return len(damage.answers), damage.missing


def paid(connection: sqlite3.Connection) -> int:
    """How many answers there are: those that the announcement counts. What was given up is none."""
    return int(connection.execute("SELECT COUNT(*) FROM answers WHERE finish <> 'given_up'").fetchone()[0])


def _forgetting(path: Path) -> str:
    return f"selfinstruct resume {shlex.quote(str(path.parent.parent))} --forget-damaged"


def _told(damage: Damage) -> str:
    more = len(damage.answers) - _MOST_PROBLEMS
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


def _examine_answers(connection: sqlite3.Connection, damage: Damage, announced: int) -> None:
    found = 0
    for row in connection.execute("SELECT * FROM answers ORDER BY request_no"):
        found += row[4] != "given_up"
        if checksum(row[:-1]) != row[-1]:
            damage.answers.append(row[0])
            if len(damage.answers) <= _MOST_PROBLEMS:
                damage.problems.append(f"the answer to request {row[0]} is not what was written")
    damage.missing = max(0, announced - found)
    if damage.missing:
        told = f"{damage.missing} of {announced} answers are missing, as when its -wal file is deleted or damaged"
        damage.problems.insert(0, told)


def _first_bad_judgement(connection: sqlite3.Connection) -> int | None:
    answered = connection.execute("SELECT request_no FROM answers ORDER BY request_no")
    for expected, (number, values, stored) in enumerate(judgements(connection)):
        if number != expected or checksum(values) != stored or next(answered, (None,))[0] != number:
            return expected
    return None
