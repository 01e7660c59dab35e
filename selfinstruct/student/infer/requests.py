"""What an engine is asked, and what it answers: token ids in, token ids out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from selfinstruct.student.infer.sampling import GREEDY, Sampling

Ended = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt as token ids, and how to go on from it. ``max_new_tokens`` >= 1; ``logprobs``: report them."""

    request_id: int
    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    logprobs: bool = False


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The log-probability of a chosen token and the likeliest tokens with theirs, likeliest first."""

    chosen: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class News:
    """Tokens that a request has gained; ``ended`` is set with the last of them. The end token is not among them."""

    request_id: int
    tokens: tuple[int, ...]
    ended: Ended | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request got: new tokens without the end token, and why it ended."""

    request_id: int
    tokens: tuple[int, ...]
    ended: Ended
