"""What a tokenizer's chat template writes around the messages, found by having it render a conversation of ours."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

# Put before a chat template. Those of Llama 3 and SmolLM3 write today's date into the prompt: a run could not be
# resumed tomorrow, and would be trained on other prompts than it is asked. This is the date Llama's own falls back to.
_FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
_REPLY = "zebrareply"
_TURNS = (
    {"role": "user", "content": "zebrafirst"},
    {"role": "assistant", "content": _REPLY},
    {"role": "user", "content": "zebralast"},
)


def apply(
    tokenizer: Any, template: str, messages: Sequence[Mapping[str, str]], *, tokenize: bool, asks: bool = True
) -> Any:
    """The conversation as text, or as ids (``tokenize``); with ``asks`` up to where the next reply begins.

    Raises what templates raise: jinja2.TemplateError, ValueError.
    """
    return tokenizer.apply_chat_template(
        [dict(message) for message in messages], chat_template=_FIXED_DATE + template,
        add_generation_prompt=asks, tokenize=tokenize, return_dict=False,
    )  # fmt: skip


def turn_tokens(tokenizer: Any, template: str) -> set[int]:
    """The ids of the added tokens that a template writes around messages, whether or not the tokenizer calls them
    special; none for a template that refuses our conversation."""
    return set(_added(tokenizer, _ids(tokenizer, _rendered(tokenizer, template, len(_TURNS)))))


def reply_end(tokenizer: Any, template: str) -> str:
    """The token that a template writes after every reply, "" where that is not one token.

    Gemma's is ``<end_of_turn>`` and Phi-3's ``<|end|>``, neither of which is their ``eos_token``. What follows the
    last reply alone (Phi-3's ``<|endoftext|>``) or begins the next turn is no part of it.
    """
    after = (_rendered(tokenizer, template, turns).rpartition(_REPLY)[2] for turns in (2, 3))
    last, earlier = (_ids(tokenizer, text) for text in after)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(last, earlier, strict=False))
    ends = _added(tokenizer, [one for one, _ in same])
    return str(tokenizer.convert_ids_to_tokens(ends[0])) if len(ends) == 1 else ""


def _rendered(tokenizer: Any, template: str, turns: int) -> str:
    from jinja2 import TemplateError

    try:
        return str(apply(tokenizer, template, _TURNS[:turns], tokenize=False, asks=False))
    except (TemplateError, ValueError, TypeError):
        return ""


def _ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return found


def _added(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Those that are added tokens; some tokenizers add runs of spaces and newlines, which are text."""
    added = tokenizer.added_tokens_decoder
    return [i for i in ids if i in added and len(added[i].content.strip()) > 1]
