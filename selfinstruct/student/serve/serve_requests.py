"""Bodies of OpenAI-compatible requests, read strictly: what is not honoured is refused, never ignored."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from selfinstruct.errors import UsageError
from selfinstruct.student.dialogue import encode_dialogue
from selfinstruct.student.infer.sampling import TOP_LOGPROBS, Sampling
from selfinstruct.student.prompt import Template, is_unicode
from selfinstruct.student.serve.serve_fields import check_fields, flag, number, optional_whole, wants_usage, whole

_MOST_CHOICES = 128
_MOST_ANSWERS = 2048  # of one request, prompts times n
_MOST_STOPS = 16


class TooLong(UsageError):
    """A prompt that leaves no room for a reply."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that can be run: ``prompts`` as ids, ``n`` replies to each. ``top_logprobs`` None: none asked for."""

    prompts: tuple[tuple[int, ...], ...]
    n: int
    max_new_tokens: int | None
    sampling: Sampling
    stop: tuple[str, ...]
    top_logprobs: int | None
    stream: bool
    usage_in_stream: bool
    is_chat: bool

    def seed(self, choice: int) -> int:
        """Each choice draws by a seed of its own, fixed by the request's."""
        return self.sampling.seed + 1_000_003 * choice


class Reader:
    """Reads bodies for a model whose prompt and reply together have at most ``context`` tokens.

    What it raises is a UsageError that names the field, TooLong for a prompt that leaves no room for a reply.
    """

    def __init__(self, template: Template, tokenizer: Any, context: int) -> None:
        self._template, self._tokenizer, self._context = template, tokenizer, context
        self._most_characters = context * max(map(len, tokenizer.get_vocab()), default=1)

    def chat(self, body: Any) -> Asked:
        """A body of /v1/chat/completions."""
        check_fields(body, is_chat=True)
        messages = body.get("messages")
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise UsageError("messages: must be a list of messages")
        said = [_message(message) for message in messages]
        self._check_size(sum(len(message["content"]) for message in said))
        wants = flag(body, "logprobs")
        top = whole(body, "top_logprobs", 0, 0, TOP_LOGPROBS)
        if top and not wants:
            raise UsageError("top_logprobs: needs logprobs to be true")
        name = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
        most = optional_whole(body, name)
        ids = self._checked(encode_dialogue(self._template, self._tokenizer, said))
        return _asked(body, (ids,), top if wants else None, most, is_chat=True)

    def completion(self, body: Any) -> Asked:
        """A body of /v1/completions: the prompt is taken as it stands, with BOS where the tokenizer has one."""
        check_fields(body, is_chat=False)
        top = optional_whole(body, "logprobs", 0, TOP_LOGPROBS)
        most = optional_whole(body, "max_tokens")
        found = _prompts(body.get("prompt"))
        _check_number(len(found), _choices(body))
        prompts = tuple(self._checked(self._encode(prompt)) for prompt in found)
        return _asked(body, prompts, top, 16 if most is None else most, is_chat=False)

    def _encode(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        self._check_size(len(prompt))
        return [int(one) for one in self._tokenizer(_unbroken(prompt, "prompt"))["input_ids"]]

    def _check_size(self, characters: int) -> None:
        """Megabytes take long to be cut into tokens: what cannot fit, be each token the longest, is not even begun."""
        if characters > self._most_characters:
            raise TooLong(f"a prompt of {characters} characters does not fit the context of {self._context} tokens")

    def _checked(self, ids: list[int]) -> tuple[int, ...]:
        if not ids:
            raise UsageError("prompt: is empty", hint="give at least one token")
        if len(ids) >= self._context:
            raise TooLong(f"a prompt of {len(ids)} tokens does not fit the context of {self._context}")
        return tuple(ids)


def _asked(body: Mapping[str, Any], prompts: Any, top: int | None, most: int | None, *, is_chat: bool) -> Asked:
    temperature = number(body, "temperature", 1.0, 0.0, 100.0)
    top_p = number(body, "top_p", 1.0, 0.0, 1.0)
    if top_p == 0:
        temperature, top_p = 0.0, 1.0
    seed = body.get("seed")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise UsageError("seed: must be a whole number")
    sampling = Sampling(
        temperature, top_p, number(body, "min_p", 0.0, 0.0, 1.0), secrets.randbits(48) if seed is None else seed
    )
    return Asked(
        prompts,
        _choices(body),
        most,
        sampling,
        _stops(body.get("stop")),
        top,
        flag(body, "stream"),
        wants_usage(body),
        is_chat,
    )


def _choices(body: Mapping[str, Any]) -> int:
    return whole(body, "n", 1, 1, _MOST_CHOICES)


def _check_number(prompts: int, n: int) -> None:
    if prompts * n > _MOST_ANSWERS:
        raise UsageError(
            f"prompt: {prompts} prompts with n {n} are more than {_MOST_ANSWERS} answers",
            hint="send them in several requests",
        )


def _message(message: Mapping[str, Any]) -> dict[str, str]:
    content = message.get("content")
    if isinstance(content, list):  # the newer form: parts of text
        parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(parts) != len(content) or not all(isinstance(part, str) for part in parts):
            raise UsageError("messages: only text can be read")
        content = "".join(str(part) for part in parts)
    if not isinstance(content, str) or not isinstance(message.get("role"), str):
        raise UsageError("messages: each needs a role and a text as content")
    return {"role": message["role"], "content": _unbroken(content, "messages")}


def _unbroken(text: str, name: str) -> str:
    if not is_unicode(text):
        raise UsageError(f"{name}: holds half a character (a lone surrogate)")
    return text


def _prompts(prompt: Any) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(_is_id(one) for one in prompt):
            return [prompt]
        if all(isinstance(one, str) or (isinstance(one, list) and one and all(map(_is_id, one))) for one in prompt):
            return prompt
    raise UsageError("prompt: must be a text, a list of token ids, or a list of these")


def _is_id(one: Any) -> bool:
    return isinstance(one, int) and not isinstance(one, bool)


def _stops(stop: Any) -> tuple[str, ...]:
    found = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(found, list) or len(found) > _MOST_STOPS or not all(isinstance(one, str) for one in found):
        raise UsageError(f"stop: must be a text or a list of at most {_MOST_STOPS} texts")
    return tuple(one for one in found if one)
