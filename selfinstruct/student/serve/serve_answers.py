"""The shapes of OpenAI's answers: chat and completions, whole and in pieces."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from selfinstruct.student.infer.requests import TokenLogprobs
from selfinstruct.student.infer.token_names import TokenNames


@dataclass(frozen=True, slots=True)
class Piece:
    """Some more of one choice. ``finish`` is set with the last piece.

    ``tokens`` are those that begin within the text, ``starts`` the places of the choice's text where they do.
    """

    index: int
    text: str
    tokens: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: str | None = None
    new_tokens: int = 0


@dataclass(slots=True)
class Whole:
    """One choice, complete; as the pieces."""

    text: str
    finish: str
    tokens: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    new_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Shape:
    """Dresses up the pieces of one request. ``top`` is the number of likeliest tokens to report, None for no report."""

    model: str
    names: TokenNames
    is_chat: bool
    top: int | None
    number: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def answer(self, choices: Sequence[Whole], prompt_tokens: int) -> dict[str, Any]:
        """The body for a request that does not stream."""
        kind = "chat.completion" if self.is_chat else "text_completion"
        made = []
        for index, one in enumerate(choices):
            entry: dict[str, Any] = {"index": index, "finish_reason": one.finish}
            entry["logprobs"] = self._report(one, first=True)
            if self.is_chat:
                entry["message"] = {"role": "assistant", "content": one.text, "refusal": None}
            else:
                entry["text"] = one.text
            made.append(entry)
        new = sum(one.new_tokens for one in choices)
        return {**self._head(kind), "choices": made, "usage": usage(prompt_tokens, new)}

    def piece(self, piece: Piece, *, first: bool) -> dict[str, Any]:
        """One event of a stream."""
        entry: dict[str, Any] = {"index": piece.index, "finish_reason": piece.finish}
        entry["logprobs"] = self._report(piece, first=first) if piece.tokens else None
        if self.is_chat:
            entry["delta"] = {**({"role": "assistant"} if first else {}), "content": piece.text}
        else:
            entry["text"] = piece.text
        return {**self._head("chat.completion.chunk" if self.is_chat else "text_completion"), "choices": [entry]}

    def usage_event(self, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
        """The last event of a stream that was asked for its usage."""
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return {**self._head(kind), "choices": [], "usage": usage(prompt_tokens, new_tokens)}

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        return {"id": f"{prefix}-{self.number}", "object": kind, "created": self.created, "model": self.model}

    def _report(self, some: Piece | Whole, *, first: bool) -> dict[str, Any] | None:
        if self.top is None:
            return None
        # A completion goes on with the prompt's text; a reply begins its own, where a first space may be left out.
        starting = [first and self.is_chat and place == 0 for place in range(len(some.tokens))]
        pairs = list(zip(some.tokens, some.logprobs, starting, strict=False))
        if self.is_chat:
            return {"content": [self._chat_entry(*pair) for pair in pairs], "refusal": None}
        return {
            "tokens": [self.names.key(token) for token, _, _ in pairs],
            "token_logprobs": [entry.chosen for _, entry, _ in pairs],
            "top_logprobs": [self._likeliest(entry) for _, entry, _ in pairs],
            "text_offset": list(some.starts),
        }

    def _likeliest(self, entry: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens; of those that are written alike the first."""
        found: dict[str, float] = {}
        for token, value in entry.top[: self.top]:
            found.setdefault(self.names.key(token), value)
        return found

    def _chat_entry(self, token: int, entry: TokenLogprobs, at_start: bool) -> dict[str, Any]:
        top = [self._named(number, value, at_start) for number, value in entry.top[: self.top]]
        return {**self._named(token, entry.chosen, at_start), "top_logprobs": top}

    def _named(self, token: int, value: float, at_start: bool) -> dict[str, Any]:
        raw = self.names.raw(token, at_start=at_start)
        return {"token": self.names.text(token, at_start=at_start), "logprob": value, "bytes": list(raw)}


def usage(prompt_tokens: int, new_tokens: int) -> dict[str, int]:
    """Token counts of a request: its prompts once, all its choices."""
    total = prompt_tokens + new_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": new_tokens, "total_tokens": total}


def error_body(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
