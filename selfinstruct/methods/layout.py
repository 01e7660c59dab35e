"""What a labelled reply puts between its tasks: separators, headings, code fences."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from selfinstruct.methods.labels import HEADINGS, LABEL_CHARS, Label

_SEPARATOR = re.compile(r"^\s*(#{1,}|-{3,}|\*{3,}|_{3,}|={3,}|/{3,}|~{3,}|(?:[*-] ){2,}[*-])\s*$")
_FENCE = re.compile(r"^\s*(```|~~~)[\w+-]*\s*$")
_HEADING_LINE = re.compile(
    rf"^[\s>*_#-]*(?:(?:{HEADINGS})\s*\#?(\d{{1,4}})|[(\[]?(\d{{1,4}})\s*[.)\]]?)\s*[*_:.)–-]*\s*$", re.IGNORECASE
)


def separator_of(line: str) -> str:
    """The kind of separator that a line is ("###", "---", ...), "" when it is none. Rulers of any length are alike."""
    match = _SEPARATOR.match(line[:LABEL_CHARS])
    if not match:
        return ""
    return match[1] if match[1][0] == "#" else match[1][0] * 3


class Above(NamedTuple):
    """What stands above a task, read upwards: blank lines and separators down from ``end``, and a heading line.

    ``separators`` holds the line of each separator by its kind; ``heading`` is the line of a heading such as
    ``Task 5``, None without.
    """

    end: int
    separators: dict[str, int]
    heading: int | None


def above(lines: Sequence[str], line: int, *, fenced: bool = False) -> Above:
    separators: dict[str, int] = {}
    heading = None
    while line > 0:
        text = lines[line - 1]
        kind = separator_of(text)
        if kind:
            separators[kind] = line - 1
        elif heading is None and not separators and _HEADING_LINE.match(text[:LABEL_CHARS]):
            heading = line - 1
        elif text.strip() and not (fenced and _FENCE.match(text)):
            break
        line -= 1
    return Above(line, separators, heading)


class Layout:
    """What the reply puts between its tasks: one kind of separator, headings, fences; and what is glued together."""

    def __init__(self, lines: Sequence[str], openers: Sequence[Label]) -> None:
        self._lines, self._openers = lines, openers
        preamble = lines[: openers[0].line]
        self._wrapped = sum(1 for line in preamble if _FENCE.match(line)) % 2 == 1
        later = openers[1:]
        fenced = sum(1 for o in later if _FENCE.match(lines[o.line - 1])) * 2 > len(later) > 0
        self._above = [above(lines, o.line, fenced=fenced) for o in later]
        self._fenced = fenced
        counts = Counter(kind for gap in self._above for kind in gap.separators)
        kind, count = counts.most_common(1)[0] if counts else ("", 0)
        enough = count * 10 >= 7 * len(later) and (count >= 2 or kind[0] in "#-*")
        self._separator = kind if enough else ""
        headings = sum(1 for gap in self._above if gap.heading is not None)
        self._headings = headings >= 2 and headings * 10 >= 7 * len(later)
        self.glued = self._glued() if self._separator and count >= 2 else set()

    def _glued(self) -> set[int]:
        """Tasks that begin without the separator that this reply uses, and whose numbers do not vouch for them."""
        glued: set[int] = set()
        for k, gap in enumerate(self._above, start=1):
            if self._separator in gap.separators:
                continue
            number, before = self._openers[k].number, self._openers[k - 1].number
            after = self._openers[k + 1].number if k + 1 < len(self._openers) else None
            counted = number is not None and before is not None and number == before + 1
            if not (counted and (after is None or after == (number or 0) + 1)):
                glued |= {k - 1, k}
        return glued

    def end_of(self, k: int) -> int | None:
        """The line after the last one of task ``k``'s output; None when its end is in doubt.

        Only what this reply puts between its tasks as a rule is left out: a signature line of underscores stays.
        """
        if k == len(self._above):
            return self._end_of_last()
        gap = self._above[k]
        if self._separator in gap.separators:
            return gap.separators[self._separator]
        if self._headings and gap.heading is not None:
            return gap.heading
        return gap.end if self._fenced else self._openers[k + 1].line

    def _end_of_last(self) -> int | None:
        end = len(self._lines)
        while end and not self._lines[end - 1].strip():
            end -= 1
        if self._wrapped and end and _FENCE.match(self._lines[end - 1]):
            end -= 1
        for line in range(self._openers[-1].line + 1, end):
            if separator_of(self._lines[line]) == (self._separator or "###"):
                rest = any(x.strip() for x in self._lines[line + 1 : end])
                return line if not rest or self._separator in ("", "###") else None
        return end
