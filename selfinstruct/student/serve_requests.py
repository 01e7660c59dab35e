"""Bodies of OpenAI-compatible requests, read strictly: what is not honoured is refused, never ignored."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from selfinstruct.errors import UsageError
from selfinstruct.student.dialogue import encode_dialogue
from selfinstruct.student.prompt import Template, is_unicode
from selfinstruct.student.sampling import TOP_LOGPROBS, Sampling

_MOST_CHOICES = 128
_MOST_ANSWERS = 2048  # of one request, prompts times n
_MOST_STOPS = 16
# Fields that change the answer and that we do not have, with the values that ask for nothing.
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "functions": (None, []),
    "top_k": (None, 0, -1),
    "json_schema": (None,),
    "grammar": (None,),
    "response_format": (None, {"type": "text"}),
}


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


def read_chat(body: Any, template: Template, tokenizer: Any) -> Asked:
    """A body of /v1/chat/completions. Raises UsageError that names the field."""
    _check(body)
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UsageError("messages: must be a list of messages")
    ids = encode_dialogue(template, tokenizer, [_message(message) for message in messages])
    wants = _flag(body, "logprobs")
    top = _whole(body, "top_logprobs", 0, 0, TOP_LOGPROBS)
    if top and not wants:
        raise UsageError("top_logprobs: needs logprobs to be true")
    name = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    return _asked(body, (tuple(ids),), top if wants else None, _optional_whole(body, name), is_chat=True)


def read_completion(body: Any, tokenizer: Any) -> Asked:
    """A body of /v1/completions: the prompt is taken as it stands, with BOS where the tokenizer has one."""
    _check(body)
    prompts = tuple(tuple(_encode(tokenizer, prompt)) for prompt in _prompts(body.get("prompt")))
    top = _optional_whole(body, "logprobs", 0, TOP_LOGPROBS)
    most = _optional_whole(body, "max_tokens")
    return _asked(body, prompts, top, 16 if most is None else most, is_chat=False)


def _asked(body: Mapping[str, Any], prompts: Any, top: int | None, most: int | None, *, is_chat: bool) -> Asked:
    temperature = _number(body, "temperature", 1.0, 0.0, 100.0)
    top_p = _number(body, "top_p", 1.0, 0.0, 1.0)
    if top_p == 0:
        temperature, top_p = 0.0, 1.0
    seed = body.get("seed")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise UsageError("seed: must be a whole number")
    sampling = Sampling(
        temperature, top_p, _number(body, "min_p", 0.0, 0.0, 1.0), secrets.randbits(48) if seed is None else seed
    )
    about = body.get("stream_options") or {}
    n = _whole(body, "n", 1, 1, _MOST_CHOICES)
    if len(prompts) * n > _MOST_ANSWERS:
        raise UsageError(f"prompt: {len(prompts)} prompts with n {n} are more than {_MOST_ANSWERS} answers",
                         hint="send them in several requests")  # fmt: skip
    return Asked(
        prompts,
        n,
        most,
        sampling,
        _stops(body.get("stop")),
        top,
        _flag(body, "stream"),
        isinstance(about, dict) and bool(about.get("include_usage")),
        is_chat,
    )


def _check(body: Any) -> None:
    if not isinstance(body, dict):
        raise UsageError("the body must be a JSON object")
    for name, neutral in _REFUSED.items():
        if name in body and body[name] not in neutral:
            raise UsageError(f"{name}: is not supported by this server", hint=f"leave {name} out")


def _message(message: Mapping[str, Any]) -> dict[str, str]:
    content = message.get("content")
    if isinstance(content, list):  # the newer form: parts of text
        parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(parts) != len(content) or not all(isinstance(part, str) for part in parts):
            raise UsageError("messages: only text can be read")
        content = "".join(str(part) for part in parts)
    if not isinstance(content, str) or not isinstance(message.get("role"), str):
        raise UsageError("messages: each needs a role and a text as content")
    return {"role": message["role"], "content": _whole_text(content, "messages")}


def _whole_text(text: str, name: str) -> str:
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


def _encode(tokenizer: Any, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        return [int(number) for number in tokenizer(_whole_text(prompt, "prompt"))["input_ids"]]
    return prompt


def _stops(stop: Any) -> tuple[str, ...]:
    found = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(found, list) or len(found) > _MOST_STOPS or not all(isinstance(one, str) for one in found):
        raise UsageError(f"stop: must be a text or a list of at most {_MOST_STOPS} texts")
    return tuple(one for one in found if one)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name) or False
    if not isinstance(value, bool):
        raise UsageError(f"{name}: must be true or false")
    return value


def _number(body: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{name}: must be a number")
    if not low <= value <= high:  # nor is NaN
        raise UsageError(f"{name}: must be from {low:g} to {high:g}")
    return float(value)


def _whole(body: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    found = _optional_whole(body, name, low, high)
    return default if found is None else found


def _optional_whole(body: Mapping[str, Any], name: str, low: int = 1, high: int = 1 << 30) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{name}: must be a whole number from {low} to {high}")
    return value
