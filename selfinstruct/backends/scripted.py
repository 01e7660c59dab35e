"""A backend of canned replies, for tests, documentation and dry runs: no network, no model, no cost.

Third parties can read this file as the smallest complete backend.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from selfinstruct.backends.base import scrub
from selfinstruct.errors import Stopped, UsageError
from selfinstruct.records import Completion, Finish, Prompt

_ACTS = "Explain Compare Rewrite Summarise Estimate Correct Outline Describe Justify Simplify".split()
_THINGS = "tide bridge harvest contract recipe timetable melody vaccine glacier orchard".split()
_PLACES = "Lisbon Nairobi Oslo Quito Hanoi Tbilisi Perth Izmir Cusco Turku".split()


class ScriptedBackend:
    """Answers request n with ``reply(n)``. A reply of None means that the script has ended."""

    name = "scripted"
    max_in_flight = 64

    def __init__(self, reply: Callable[[int], str | None]) -> None:
        self._reply = reply

    async def complete(self, prompt: Prompt) -> Completion:
        text = self._reply(prompt.request_no)
        if text is None:
            raise Stopped(f"the script has no reply for request {prompt.request_no}")
        finish: Finish = "stop"
        return Completion(prompt.request_no, scrub(text), finish, model=self.name)

    def halt(self) -> None:
        """Nothing waits here."""

    async def aclose(self) -> None:
        """Nothing is held open."""


def from_file(path: Path) -> ScriptedBackend:
    """Replies from a file of JSON lines, each a text or ``{"text": ...}``; line n answers request n."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        entries = [json.loads(line) for line in lines if line.strip()]
        replies = [entry["text"] if isinstance(entry, dict) else entry for entry in entries]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{path}: cannot be read as a script ({error})", hint='write {"text": "..."} lines') from None
    if not all(isinstance(reply, str) for reply in replies):
        raise UsageError(f"{path}: a reply is no text", hint='write {"text": "..."} lines')
    return from_replies(replies)


def from_replies(replies: Sequence[str]) -> ScriptedBackend:
    """Replies from a list; request n gets the n-th."""
    return ScriptedBackend(lambda n: replies[n] if n < len(replies) else None)


def invented() -> ScriptedBackend:
    """Endless replies of four plain tasks each, made from word lists; the same for ever."""
    return ScriptedBackend(_invent)


def _invent(request_no: int) -> str:
    parts = []
    for k in range(4):
        n = request_no * 4 + k
        act, thing, place = _ACTS[n % 10], _THINGS[n // 10 % 10], _PLACES[n // 100 % 10]
        parts.append(
            f"{k + 4}. Instruction: {act} item{n} about the {thing} of {place} in words{n * 7}.\n"
            f"{k + 4}. Input:\n<noinput>\n{k + 4}. Output:\nA short answer about the {thing} of {place}, number {n}.\n"
        )
    return "###\n".join(parts)
