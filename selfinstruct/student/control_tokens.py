"""Texts as token ids among which no control token is: "</s>" in a task is four characters, and ends nothing.

What teachers, users and clients write is hostile. A tokenizer takes the text of a control token for the token itself,
wherever it stands; told not to, Unigram and WordLevel models still find it in their vocabulary. So whatever would give
a control token is cut inside the token's text, and its pieces are tokenised apart. Every other text keeps its ids.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Controls:
    """``ids`` of the tokens that no text may give, and ``written``, which finds where their texts begin."""

    ids: frozenset[int]
    written: re.Pattern[str]


def controls_of(tokenizer: Any, turns: Iterable[int] = ()) -> Controls:
    """The control tokens of a tokenizer: its special ones, and the ``turns`` that a chat template writes.

    The unknown token is none: it stands for characters that the tokenizer lacks.
    """
    special = (number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, *turns}
    texts = {i: str(tokenizer.convert_ids_to_tokens(i)) for i in {*tokenizer.all_special_ids, *special, *turns}}
    # Models are padded with "!" at times, and it stays a character; one that ends a text does not.
    texts = {number: text for number, text in texts.items() if len(text) > 1 or number in ends}
    any_of = "|".join(map(re.escape, sorted(texts.values(), key=len, reverse=True))) or "(?!)"
    unknown = {tokenizer.unk_token_id} - ends
    return Controls(frozenset(texts) - unknown, re.compile(f"(?=({any_of})).", re.DOTALL))


def encode_texts(tokenizer: Any, texts: Sequence[str], controls: Controls | None = None) -> list[list[int]]:
    """Ids of each text by itself, without control tokens (None: the tokenizer's special ones)."""
    if not texts:
        return []
    barred = controls or controls_of(tokenizer)
    found = _encode(tokenizer, list(texts), split_special_tokens=True)
    return [
        list(ids) if barred.ids.isdisjoint(ids) else _encode_cut(tokenizer, text, barred)
        for ids, text in zip(found, texts, strict=True)
    ]


def _encode_cut(tokenizer: Any, text: str, controls: Controls) -> list[int]:
    mark = new_mark()
    pieces = cut(tokenizer, [text], controls, mark)[0].split(mark)
    return [i for i in encode_pieces(tokenizer, pieces, split_special_tokens=True) if i not in controls.ids]


def new_mark() -> str:
    """A mark that no text holds, because nobody can guess it."""
    return f"\ue0c5{secrets.randbits(96)}\ue0c5"


def cut(tokenizer: Any, texts: Sequence[str], controls: Controls, mark: str) -> list[str]:
    """Texts with ``mark`` wherever they have to be tokenised apart: nowhere in nearly all."""
    marked = [controls.written.sub(lambda f: f[0] + mark if len(f[1]) > 1 else "", text) for text in texts]
    for number, ids in enumerate(_encode(tokenizer, marked)):
        text = marked[number]
        if not controls.ids.isdisjoint(encode_pieces(tokenizer, text.split(mark)) if mark in text else ids):
            # A normaliser made a control token of characters that look like it ("＜/s＞").
            marked[number] = mark.join(text.replace(mark, ""))
    return marked


def encode_pieces(tokenizer: Any, pieces: Sequence[str], **options: Any) -> list[int]:
    """The ids of consecutive pieces of a text, tokenised apart and joined."""
    first, *others = pieces
    # SentencePiece puts a space before a text. Behind a newline it puts none before a piece.
    found = _encode(tokenizer, [first, *("\n" + piece for piece in others), "\n"], **options)
    ids, newline = list(found[0]), list(found[-1])
    for piece, behind in zip(others, found[1:-1], strict=True):
        clean = list(behind[: len(newline)]) == newline
        ids += behind[len(newline) :] if clean else _encode(tokenizer, [piece], **options)[0]
    return ids


def _encode(tokenizer: Any, texts: list[str], **options: Any) -> list[list[int]]:
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False, **options)
    found: list[list[int]] = encoded["input_ids"]
    return found
