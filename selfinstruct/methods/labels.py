"""Finds the lines that label the parts of a task: ``4. Instruction:``, ``**Input**:``, ``### Saída`` and relatives."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from selfinstruct.languages.labels import INPUT_LABELS, INSTRUCTION_LABELS, OUTPUT_LABELS, TASK_HEADINGS

Kind = Literal["instruction", "input", "output"]

LABEL_CHARS = 200  # a label stands at the start of its line; keeps the patterns off long hostile lines


def _kinds() -> dict[str, Kind]:
    words: tuple[tuple[Kind, Iterable[str]], ...] = (
        ("instruction", INSTRUCTION_LABELS),
        ("input", INPUT_LABELS),
        ("output", OUTPUT_LABELS),
    )
    plain = str.maketrans("áàâãéêíóôõúüç", "aaaaeeiooouuc")
    return {form: kind for kind, labels in words for w in labels for form in (w.casefold(), w.lower().translate(plain))}


KINDS = _kinds()
WORDS = "|".join(re.escape(word) for word in sorted(KINDS, key=len, reverse=True))
HEADING_WORDS = frozenset(word.casefold() for word in TASK_HEADINGS)
HEADINGS = "|".join(re.escape(word) for word in TASK_HEADINGS)
# Possessive throughout: nothing that follows could use what a part has taken, and hostile lines of blanks stay cheap.
_LABEL = re.compile(
    rf"""[ \t]*+(?P<lead>(?:[>*_#•-][>*_#•\- \t]*+)?+)
    (?:(?:{HEADINGS})[ \t]*+\#?(?P<heading>\d{{1,4}})[ \t]*+[:.)–—-][ \t]*+)?
    (?:[(\[]?(?P<before>\d{{1,4}})[ \t]*+[.)\]:、．-][ \t]*+)?
    (?P<open>[*_`\[]*+)[ \t]*+
    (?P<label>{WORDS})
    (?:[ \t]*+\#?(?P<after>\d{{1,4}}))?
    [ \t]*+(?P<close>[*_`\]]*+)[ \t]*+
    (?P<colon>[:：])?(?P<tail>[*_`]*+)
    (?P<rest>.*)""",
    re.VERBOSE | re.IGNORECASE,
)


class Style(NamedTuple):
    """How a label is written: labels of one reply that share a style belong together.

    ``place`` says where its number stands: "before" the word, "after" it, in a "heading", "" for none.
    """

    word: str
    decoration: str
    place: str

    @property
    def numbered(self) -> bool:
        return bool(self.place)


@dataclass(frozen=True, slots=True)
class Label:
    """One label line. ``rest`` is what follows the label on its line."""

    line: int
    kind: Kind
    number: int | None
    style: Style
    rest: str


def find_labels(lines: Sequence[str]) -> list[Label]:
    """All lines that look like a label, in order."""
    found = []
    for number, line in enumerate(lines):
        match = _LABEL.match(line[:LABEL_CHARS])
        label = match and _label_of(match, number, line[match.start("rest") :])
        if label:
            found.append(label)
    return found


def _label_of(match: re.Match[str], line: int, rest: str) -> Label | None:
    lead, opened, close, tail = match["lead"].strip(), match["open"], match["close"], match["tail"]
    marked = bool(re.search(r"[*_`\[]", lead + opened))
    if not match["colon"]:
        if rest.strip() or tail or not (marked or "#" in lead):
            return None
    elif tail and not (marked and not close):
        rest = tail + rest  # the content begins in bold, the label does not end so
    elif marked and not close and not tail and rest.rstrip().endswith("**"):
        rest = rest.rstrip()[:-2]  # the whole line is in bold
    place = next((place for place in ("before", "after", "heading") if match[place]), "")
    number = int(match[place]) if place else None
    return Label(line, KINDS[match["label"].casefold()], number, Style(match["label"], f"{lead}|{opened}", place), rest)


def usual_style(styles: Iterable[Style | None]) -> Style | None:
    """The most frequent style, the earliest of them at a tie; None when there is none."""
    counts = Counter(style for style in styles if style is not None)
    return max(counts, key=lambda style: counts[style]) if counts else None
