"""Rows of the journal: an answer, and what became of it, from our nouns to columns with a checksum, and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from selfinstruct.errors import DamagedFile
from selfinstruct.records import Completion, Draft, Finish, Prompt, Reading, Verdict
from selfinstruct.run.seal import checksum
from selfinstruct.run.writer import Statement

_ITEM = itemgetter(1)
_PUT_ANSWER = "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"


@dataclass(frozen=True, slots=True)
class Judged:
    """What became of one request: its drafts (as repaired) with their verdicts, and what could not be read."""

    request_no: int
    reading: Reading
    verdicts: tuple[tuple[Draft, Verdict], ...]


def of_answer(prompt: Prompt, completion: Completion) -> Statement:
    """Puts an answer down, in place of an earlier one to the same request."""
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
        float(completion.seconds),
        completion.attempts,
    )
    return _PUT_ANSWER, [(*values, checksum(values))]


def completion(path: Path, prompt: Prompt, row: Sequence[Any]) -> Completion:
    """The answer in a row of ``answers``; DamagedFile when it is not what was written, or another prompt's."""
    if checksum(row[:-1]) != row[-1]:
        raise DamagedFile(
            f"{path}: the answer to request {prompt.request_no} is not what was written",
            hint="restore the file from a copy; nothing was changed",
        )
    if row[1] != prompt_sha(prompt):
        raise DamagedFile(f"{path}: the answer to request {prompt.request_no} belongs to another prompt")
    finish: Finish = row[4]
    return Completion(row[0], row[3], finish, row[6], row[7], row[8], row[5], row[9], row[10])


def of_judged(judged: Judged) -> list[Statement]:
    """Puts down what became of a request."""
    number = judged.request_no
    accepted = sum(1 for _, verdict in judged.verdicts if verdict.accepted)
    drafts: list[tuple[Any, ...]] = [
        (
            number,
            draft.item_no,
            draft.instruction,
            draft.input,
            draft.output,
            " ".join(draft.repairs),
            int(verdict.accepted),
            verdict.rule,
            verdict.detail,
            None if verdict.score is None else float(verdict.score),
            verdict.nearest_id,
        )
        for draft, verdict in judged.verdicts
    ]
    losses = [(number, loss.item_no, loss.reason, loss.detail) for loss in judged.reading.losses]
    made = [number, len(drafts), accepted, sorted(drafts, key=_ITEM), sorted(losses, key=_ITEM)]
    return [
        ("INSERT INTO drafts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", drafts),
        ("INSERT INTO losses VALUES (?, ?, ?, ?)", losses),
        ("INSERT INTO judged VALUES (?, ?, ?, ?)", [(number, len(drafts), accepted, checksum(made))]),
    ]


def prompt_sha(prompt: Prompt) -> str:
    """16 hex digits of what a prompt says: an answer belongs to the very prompt that was sent."""
    said = prompt.text if prompt.messages is None else json.dumps([dict(m) for m in prompt.messages])
    return hashlib.sha256(f"{said}\x1f{prompt.seed}".encode()).hexdigest()[:16]
