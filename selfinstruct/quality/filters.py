"""Rules on one draft, as data: each has a name, is asked in order, and says what it saw when it turns a draft down.

The first five are Stanford Alpaca's, on the instruction alone. The others mend what its data shows: it had no check
of inputs and outputs (28 empty answers, 62 "nooutput" markers, 39 rows with the next task inside, about 85 cut short).
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable
from functools import lru_cache

from selfinstruct.languages import LANGUAGES, Language
from selfinstruct.languages.labels import NO_INPUT_MARKERS, NO_OUTPUT_MARKERS
from selfinstruct.records import Draft

MIN_WORDS, MAX_WORDS = 4, 150  # of an instruction, as in both papers' code
_MIN_WORDS_TO_JUDGE_AN_END = 5  # of the last line: a list item may be "and", a letter ends with "Sincerely,"

Rule = Callable[[Draft, Language], str]

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff]")
_DECORATION = "<>[](){}\"'`*_.!?:-–— \t\n"
_PROMPT_LABELS = "|".join(re.escape(word) for pack in LANGUAGES.values() for word in pack.labels)
_NUMBERED_LABEL = re.compile(
    rf"(?<![\w.])\d{{1,3}}[ \t]*[.)][ \t]*[*_]{{0,2}}(?:{_PROMPT_LABELS})[*_]{{0,2}}[ \t]*[:：]"
)
_SEPARATOR_LINE = re.compile(r"^[ \t]*#{2,}[ \t]*$", re.MULTILINE)
_FENCE_LINE = re.compile(r"^[ \t]*```", re.MULTILINE)


def repair(draft: Draft) -> Draft:
    """Make the documented repairs and name them in ``repairs``.

    ``no_input``: a marker for "no input" becomes "". ``control_characters``: C0 controls, DEL and byte order marks
    (never line breaks or tabs) are removed.
    """
    fields = {"instruction": draft.instruction, "input": draft.input, "output": draft.output}
    repairs = []
    cleaned = {name: _CONTROL.sub("", text).strip() if _CONTROL.search(text) else text for name, text in fields.items()}
    if cleaned != fields:
        repairs.append("control_characters")
    if cleaned["input"] and _is_marker(cleaned["input"], _NO_INPUT):
        cleaned["input"] = ""
        repairs.append("no_input")
    if not repairs:
        return draft
    return Draft(draft.request_no, draft.item_no, **cleaned, repairs=tuple(repairs))


def first_failure(draft: Draft, language: Language, rules: tuple[str, ...]) -> tuple[str, str]:
    """The first rule (by name) that turns the draft down and what it saw; ("", "") when all agree."""
    for name in rules:
        seen = RULES[name](draft, language)
        if seen:
            return name, seen
    return "", ""


def _length(draft: Draft, language: Language) -> str:
    words = len(draft.instruction.split())
    return "" if MIN_WORDS <= words <= MAX_WORDS else f"{words} words"


def _forbidden_word(draft: Draft, language: Language) -> str:
    found = _forbidden_pattern(language).search(_fold(draft.instruction))
    return found[0] if found else ""


def _forbidden_start(draft: Draft, language: Language) -> str:
    return next((start for start in language.forbidden_starts if draft.instruction.startswith(start)), "")


def _punctuation_start(draft: Draft, language: Language) -> str:
    first = draft.instruction[:1]
    return first if first in string.punctuation else ""


def _foreign_start(draft: Draft, language: Language) -> str:
    first = draft.instruction[:1]
    fine = first.isascii() if language.start == "ascii" else first.isalnum() or first in "¿¡«“‘"
    return "" if fine else f"U+{ord(first):04X}"


def _no_output(draft: Draft, language: Language) -> str:
    if not draft.output:
        return "empty"
    return draft.output if _is_marker(draft.output, _NO_OUTPUT) else ""


def _echo(draft: Draft, language: Language) -> str:
    if draft.output == draft.instruction:
        return "the output is the instruction"
    return "the output is the input" if draft.output == draft.input else ""


def _leak(draft: Draft, language: Language) -> str:
    for name, text in (("instruction", draft.instruction), ("input", draft.input), ("output", draft.output)):
        found = _NUMBERED_LABEL.search(text) or _SEPARATOR_LINE.search(text)
        if found:
            return f"{name}: {found[0].strip()}"
    return ""


def _unfinished(draft: Draft, language: Language) -> str:
    text = draft.output
    if len(_FENCE_LINE.findall(text)) % 2:
        return "an open code fence"
    words = text[text.rfind("\n") + 1 :][-400:].split()
    if len(words) < _MIN_WORDS_TO_JUDGE_AN_END:
        return ""
    last = words[-1]
    if last in language.open_words or last[-1] in ",([{=" or last == "$":
        return f"ends with {last[-40:]!r}"
    return ""


RULES: dict[str, Rule] = {
    "length": _length,
    "forbidden_word": _forbidden_word,
    "forbidden_start": _forbidden_start,
    "punctuation_start": _punctuation_start,
    "foreign_start": _foreign_start,
    "no_output": _no_output,
    "echo": _echo,
    "leak": _leak,
    "unfinished": _unfinished,
}


def _fold(text: str) -> str:
    """The text without accents, so that "grafico" and "gráfico" are one word. ASCII text is returned as it is."""
    if text.isascii():
        return text
    return "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c))


@lru_cache(maxsize=8)
def _forbidden_pattern(language: Language) -> re.Pattern[str]:
    words = "|".join(re.escape(_fold(word)) for word in language.forbidden_words)
    return re.compile(rf"\b(?:{words})\b", re.IGNORECASE)


def _bare(text: str) -> str:
    return " ".join(text.strip(_DECORATION).casefold().replace("_", " ").split())


_NO_INPUT = frozenset(_bare(marker) for marker in NO_INPUT_MARKERS)
_NO_OUTPUT = frozenset(_bare(marker) for marker in NO_OUTPUT_MARKERS)


def _is_marker(text: str, markers: frozenset[str]) -> bool:
    """True when the whole text says "none", in any case, brackets or punctuation."""
    return len(text) <= 60 and _bare(text) in markers
