"""Fields of OpenAI-compatible bodies: their types, and those that would change the answer and are not honoured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from selfinstruct.errors import UsageError

_NOT_SET: tuple[Any, ...] = (None,)
_OFF: tuple[Any, ...] = (None, False)
# Fields that change the answer and that we do not have (of OpenAI, vLLM and llama.cpp), with the values that ask for
# nothing.
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "echo": _OFF,
    "suffix": (None, ""),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "length_penalty": (None, 1),
    "logit_bias": (None, {}),
    "allowed_token_ids": _NOT_SET,
    "bad_words": (None, []),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "top_k": (None, 0, -1),
    "typical_p": (None, 1),
    "use_beam_search": _OFF,
    "min_tokens": (None, 0),
    "ignore_eos": _OFF,
    "stop_token_ids": (None, []),
    "include_stop_str_in_output": _OFF,
    "skip_special_tokens": (None, True),
    "prompt_logprobs": _NOT_SET,
    "truncate_prompt_tokens": _NOT_SET,
    "n_predict": (None, -1),
    "json_schema": _NOT_SET,
    "grammar": (None, ""),
    "response_format": (None, {"type": "text"}),
    "structured_outputs": _NOT_SET,
    "chat_template": _NOT_SET,
    "chat_template_kwargs": (None, {}),
    "documents": (None, []),
    "continue_final_message": _OFF,
    "add_generation_prompt": (None, True),
    "reasoning_effort": (None, "none"),
    "modalities": (None, ["text"]),
    "audio": _NOT_SET,
    "web_search_options": _NOT_SET,
}
# What only the other of the two paths has.
_OF_CHAT = ("messages", "max_completion_tokens", "top_logprobs")
_OF_COMPLETIONS = ("prompt",)
_STREAM_OPTIONS = ("include_usage", "include_obfuscation")


def check_fields(body: Any, *, is_chat: bool) -> None:
    """Raise UsageError, with its name, for a field whose wish would not be granted."""
    if not isinstance(body, dict):
        raise UsageError("the body must be a JSON object")
    for name, neutral in _REFUSED.items():
        if name in body and body[name] not in neutral:
            raise UsageError(f"{name}: is not supported by this server", hint=f"leave {name} out")
    for name in body:
        if name.startswith("guided_") and body[name] is not None:  # vLLM's, which had ever more of them
            raise UsageError(f"{name[:100]}: is not supported by this server", hint="leave it out")
    # BOS is put before a completion's text, and stands in a chat's template.
    if body.get("add_special_tokens") not in (None, not is_chat):
        raise UsageError("add_special_tokens: is not supported by this server", hint="leave it out")
    other = "/v1/completions" if is_chat else "/v1/chat/completions"
    for name in _OF_COMPLETIONS if is_chat else _OF_CHAT:
        if body.get(name) is not None:
            raise UsageError(f"{name}: belongs to {other}", hint=f"leave {name} out, or ask there")


def wants_usage(body: Mapping[str, Any]) -> bool:
    """Whether a stream shall end with its usage."""
    about = body.get("stream_options")
    if about is None:
        return False
    if not isinstance(about, dict):
        raise UsageError("stream_options: must be an object")
    for name, value in about.items():
        if value and name not in _STREAM_OPTIONS:
            raise UsageError(f"stream_options: {str(name)[:100]} is not supported by this server", hint="leave it out")
    said = {name: flag(about, name, f"stream_options.{name}") for name in _STREAM_OPTIONS}
    return said["include_usage"]


def flag(body: Mapping[str, Any], name: str, shown: str = "") -> bool:
    """True or false; false where nothing is said."""
    value = body.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise UsageError(f"{shown or name}: must be true or false")
    return value


def number(body: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    """A number from ``low`` to ``high``."""
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{name}: must be a number")
    if not low <= value <= high:  # nor is NaN
        raise UsageError(f"{name}: must be from {low:g} to {high:g}")
    return float(value)


def whole(body: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    """A whole number from ``low`` to ``high``."""
    found = optional_whole(body, name, low, high)
    return default if found is None else found


def optional_whole(body: Mapping[str, Any], name: str, low: int = 1, high: int = 1 << 30) -> int | None:
    """The same, None where nothing is said."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{name}: must be a whole number from {low} to {high}")
    return value
