"""Figures of a whole run, counted from its journal."""

from __future__ import annotations

import sqlite3
from collections import Counter
from typing import Any


def counts(connection: sqlite3.Connection) -> dict[str, Any]:
    """Requests, tokens, drafts, and what was turned down or not read, and why."""

    def one(sql: str) -> tuple[Any, ...]:
        row: tuple[Any, ...] = connection.execute(sql).fetchone()
        return row

    def every(sql: str) -> list[tuple[Any, ...]]:
        return connection.execute(sql).fetchall()

    answered, prompt, cached, completion, attempts = one(
        "SELECT COUNT(*), TOTAL(prompt_tokens), TOTAL(cached_tokens), TOTAL(completion_tokens), TOTAL(attempts) "
        "FROM answers WHERE finish <> 'given_up'"
    )
    (given_up,) = one("SELECT COUNT(*) FROM answers WHERE finish = 'given_up'")
    judged, drafts, accepted = one("SELECT COUNT(*), TOTAL(drafts), TOTAL(accepted) FROM judged")
    rejected = every("SELECT rule, COUNT(*) FROM drafts WHERE NOT accepted GROUP BY rule ORDER BY 2 DESC, 1")
    lost = every("SELECT reason, COUNT(*) FROM losses GROUP BY reason ORDER BY 2 DESC, 1")
    repaired: Counter[str] = Counter()
    for names, count in every("SELECT repairs, COUNT(*) FROM drafts WHERE repairs <> '' GROUP BY repairs ORDER BY 1"):
        repaired.update(dict.fromkeys(names.split(), int(count)))
    return {
        "requests": int(answered),
        "attempts": int(attempts),
        "given_up": int(given_up),
        "judged": int(judged),
        "drafts": int(drafts),
        "accepted": int(accepted),
        "prompt_tokens": int(prompt),
        "cached_tokens": int(cached),
        "completion_tokens": int(completion),
        "rejected": {rule: int(count) for rule, count in rejected},
        "lost": {reason: int(count) for reason, count in lost},
        "repaired": dict(repaired.most_common()),
    }
