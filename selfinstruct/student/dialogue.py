"""Messages of a conversation as token ids, each turn in the form that the model was trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from selfinstruct.errors import UsageError
from selfinstruct.student.prompt import Template

_ROLES = ("system", "developer", "user", "assistant")


def encode_dialogue(template: Template, tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The ids of a conversation that ends with the user's turn, up to where the reply begins.

    With a text template each earlier turn is a task with its response and end token; what the system says goes
    before the first task. Raises UsageError for a conversation in another order.
    """
    _check(messages)
    if template.kind == "chat":
        return template.encode_messages(tokenizer, messages)
    said = "\n\n".join(m["content"] for m in messages if m["role"] in ("system", "developer") and m["content"])
    turns = [message for message in messages if message["role"] in ("user", "assistant")]
    ids: list[int] = []
    for number, turn in enumerate(turns):
        if turn["role"] == "assistant":
            ids += [*template.encode_replies(tokenizer, [turn["content"]])[0], template.eos_id(tokenizer)]
            continue
        text = f"{said}\n\n{turn['content']}" if number == 0 and said else turn["content"]
        prompt = template.encode_prompt(tokenizer, text, "")
        begins_again = bool(ids) and tokenizer.bos_token_id is not None and prompt[:1] == [tokenizer.bos_token_id]
        ids += prompt[1:] if begins_again else prompt
    return ids


def _check(messages: Sequence[Mapping[str, str]]) -> None:
    if not messages:
        raise UsageError("there are no messages")
    for message in messages:
        if message["role"] not in _ROLES:
            raise UsageError(f"unknown role {message['role']!r}", hint=f"one of {', '.join(_ROLES)}")
    turns = [message["role"] for message in messages if message["role"] in ("user", "assistant")]
    wanted = ["user" if number % 2 == 0 else "assistant" for number in range(len(turns))]
    if turns != wanted or turns[-1:] != ["user"]:
        raise UsageError("the messages must alternate between user and assistant, and begin and end with the user")
