"""What a language pack holds. Packs are data: words and wording, no code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Wording:
    """Our own prompt texts. ``{count}``, ``{first}`` and ``{last}`` are filled in by the method.

    ``numbered`` opens the numbered form, ``schema`` the JSON form, ``short`` the one-line form for small models;
    ``continue_numbered`` closes a chat request for the numbered form.
    """

    numbered: str
    continue_numbered: str
    schema: str
    short: str


@dataclass(frozen=True, slots=True)
class Language:
    """One language of generated tasks.

    ``labels`` are the words that the prompt uses for instruction, input and output. ``forbidden_words`` (whole words
    or phrases, matched without case and accents) ask for more than text; ``forbidden_starts`` are opening phrases.
    ``start`` says which first character an instruction may have: "ascii" (Stanford's rule) or "letter" (any letter or
    digit). ``open_words`` are words that no finished sentence ends with, lower case.
    """

    code: str
    name: str
    labels: tuple[str, str, str]
    no_input: str
    forbidden_words: tuple[str, ...]
    forbidden_starts: tuple[str, ...]
    start: Literal["ascii", "letter"]
    open_words: frozenset[str]
    wording: Wording
