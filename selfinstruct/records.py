"""The nouns that walk through the house: frozen, without behaviour, without imports of ours.

A seed task shows the teacher what is wanted. A prompt asks for tasks, a completion answers it, drafts are the
tasks read out of a completion, a verdict says why a draft was kept or not, and a row is what the dataset holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Finish = Literal["stop", "length", "refused", "given_up"]


@dataclass(frozen=True, slots=True)
class SeedTask:
    """A human-written example. ``input == ""`` means that the task needs none."""

    task_id: str
    instruction: str
    input: str
    output: str
    is_classification: bool


@dataclass(frozen=True, slots=True)
class Draft:
    """A task read out of a completion.

    ``item_no`` counts from 0 within its completion. ``repairs`` names each documented change that was made to the
    teacher's text.
    """

    request_no: int
    item_no: int
    instruction: str
    input: str
    output: str
    repairs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request: all that is needed to send it and to read its reply.

    Exactly one of ``messages`` (chat) and ``text`` (raw completion) is set. ``prefix`` is the part of the prompt
    that the reply continues ("" for a fresh reply). ``max_new_tokens`` is in tokens. ``schema`` is a JSON schema that
    the reply must obey, for backends that accept one. ``seed`` is a sampling seed for servers that honour it.
    ``was_given_up`` by an earlier command: a few attempts are enough.
    """

    request_no: int
    method: str
    messages: tuple[Mapping[str, str], ...] | None = None
    text: str | None = None
    prefix: str = ""
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 1024
    schema: Mapping[str, Any] | None = None
    shown_ids: tuple[str, ...] = ()
    seed: int | None = None
    was_given_up: bool = False


@dataclass(frozen=True, slots=True)
class Completion:
    """One reply, in our words: what the provider calls things is translated once, in the backend.

    Token counts are what the server reports, 0 where it reports none. ``seconds`` is wall time of the successful
    attempt, ``attempts`` counts all of them. With "refused" and "given_up" there is no reply: ``text`` is the reason.
    """

    request_no: int
    text: str
    finish: Finish
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    model: str = ""
    seconds: float = 0.0
    attempts: int = 1


@dataclass(frozen=True, slots=True)
class Loss:
    """A task that could not be read whole out of a completion, and why."""

    request_no: int
    item_no: int
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Reading:
    """All that a completion gave: whole drafts, and a reason for each task that was not whole."""

    drafts: tuple[Draft, ...] = ()
    losses: tuple[Loss, ...] = ()


EXAMPLE = "example_"
"""What the kind of a span begins with that looks secret or personal and is nobody's: ``example_email``."""


class Span(NamedTuple):
    """A part of a text that looks secret or personal: from ``start`` up to ``end`` (characters), and of which kind."""

    start: int
    end: int
    kind: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a draft was kept or not, as data.

    ``rule`` is "" for an accepted draft, else the name of the rule that turned it down. ``score`` and
    ``nearest_id`` (a seed's task id or a row id) are set by the novelty rule.
    """

    accepted: bool
    rule: str = ""
    detail: str = ""
    score: float | None = None
    nearest_id: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One published row. Its columns, in this order, are the schema of the dataset.

    ``flags`` names the kinds of secret-looking or personal text in it; publishing sets them.
    """

    id: str
    instruction: str
    input: str
    output: str
    method: str
    teacher: str
    language: str
    request_no: int
    item_no: int
    shown_ids: tuple[str, ...] = field(default_factory=tuple)
    flags: tuple[str, ...] = field(default_factory=tuple)


def row_id(instruction: str, input: str) -> str:
    """Identify a task by its content: 16 hex digits of the SHA-256 of instruction and input.

    Stable over versions and runs, so a row keeps its split and its name when the dataset grows.
    """
    content = f"{instruction}\x1f{input}".encode("utf-8", "surrogatepass")
    return hashlib.sha256(content).hexdigest()[:16]
