"""What a labelled reply puts between its tasks: separators, headings, code fences."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from selfinstruct.methods.labels import HEADINGS, LABEL_CHARS, Label

_SEPARATOR = re.compile(r"^\s*(#{1,}|-{3,}|\*{3,}|_{3,}|={3,}|/{3,}|~{3,}|(?:[*-] ){2,}[*-])\s*$")
_FENCE = re.compile(r"^\s*(`{3,}|~{3,})[\w+-]*\s*$")
_HEADING_LINE = re.compile(
    rf"^[\s>*_#-]*+(?:(?:{HEADINGS})\s*+\#?(\d{{1,4}})|[(\[]?(\d{{1,4}})\s*+[.)\]]?)\s*+[*_:.)–-]*+\s*$", re.IGNORECASE
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


def above(lines: Sequence[str], line: int) -> Above:
    separators: dict[str, int] = {}
    heading = None
    while line > 0:
        text = lines[line - 1]
        kind = separator_of(text)
        if kind:
            separators[kind] = line - 1
        elif heading is None and not separators and _HEADING_LINE.match(text[:LABEL_CHARS]):
            heading = line - 1
        elif text.strip():
            break
        line -= 1
    return Above(line, separators, heading)


def unwrapped(lines: list[str], openers: set[int]) -> tuple[list[str], str]:
    """The lines with code fences around the whole reply, or around each of its tasks, made blank.

    ``openers`` are the lines with an instruction label. Fences inside the content of a task stay. The second answer
    says which tasks of the result are in doubt: "" for none, "odd" for those with an odd number of fences left, "any"
    for all with a fence: the first task has one around it, and it cannot be told which others are such.
    """
    fences = [number for number, line in enumerate(lines) if _FENCE.match(line[:LABEL_CHARS])]
    if not fences:
        return lines, ""
    stops, bare = _stops(lines, openers), _stops(lines, set())
    wrappers: list[int] = []
    wraps, inside, wrapped = 0, False, False
    for fence in fences:
        if inside:
            inside = False  # ends a block of the content
        elif wrapped and _is_gap(lines, stops[fence + 1], openers):
            wrapped = False
            wrappers.append(fence)
        elif not wrapped and stops[fence + 1] in openers:
            wrapped = True
            wraps += 1
            wrappers.append(fence)
        else:
            inside = True
    early = bool(wrappers) and wrappers[0] < min(openers)
    whole = early and wraps == 1 and all(bare[fence + 1] == len(lines) for fence in wrappers[1:])
    if not whole and wraps * 10 < 7 * len(openers):
        return lines, "any" if early else ""
    lines = [*lines]
    for fence in wrappers:
        lines[fence] = ""
    return lines, "odd" if early else ""


def _is_gap(lines: Sequence[str], stop: int, openers: set[int]) -> bool:
    """True when the task before a gap has ended: the next task, its fence or the end of the reply is where it stops."""
    return stop in openers or stop == len(lines) or bool(_FENCE.match(lines[stop][:LABEL_CHARS]))


def _stops(lines: Sequence[str], openers: set[int]) -> list[int]:
    """For each line, and one more: the first from there on that opens a task or is content, so that the gap ends."""
    stops = [len(lines)] * (len(lines) + 1)
    for number in range(len(lines) - 1, -1, -1):
        text = lines[number][:LABEL_CHARS]
        is_gap = not lines[number].strip() or separator_of(text) or _HEADING_LINE.match(text)
        stops[number] = stops[number + 1] if is_gap and number not in openers else number
    return stops


class Layout:
    """What the reply puts between its tasks: one kind of separator, headings; and what is glued together."""

    def __init__(self, lines: Sequence[str], openers: Sequence[Label]) -> None:
        self._lines, self._openers = lines, openers
        gaps = [above(lines, opener.line) for opener in openers]
        self._above = gaps[1:]
        counts = Counter(kind for gap in self._above for kind in gap.separators)
        kind, count = counts.most_common(1)[0] if counts else ("", 0)
        most = len(self._above) * 7
        enough = kind and count * 10 >= most and (count >= 2 or kind[0] in "#-*=")
        self._separator = kind if enough else ""
        self._frequent = {kind for kind, count in counts.items() if kind[:2] == "##" or (count >= 2 and kind != "___")}
        separated = sum(1 for gap in self._above if gap.separators)
        self._mixed = not enough and separated >= 2 and separated * 10 >= most
        headings = sum(1 for gap in gaps if gap.heading is not None)
        self._headings = headings >= 2 and headings * 10 >= len(gaps) * 7
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

    def end_of(self, k: int, last_label: int) -> int | None:
        """The line after the last one of task ``k``'s output; None when its end is in doubt.

        Only what this reply puts between its tasks as a rule is left out: a signature line of underscores stays.
        ``last_label`` is the line of the last label in the task.
        """
        if k == len(self._above):
            return self._end_of_last(last_label)
        gap, beyond = self._above[k], self._openers[k + 1].line
        if self._separator in gap.separators:
            return gap.separators[self._separator]
        if self._headings and gap.heading is not None and not gap.separators:
            return gap.heading
        if gap.heading is not None and any(c.isalpha() for c in self._lines[gap.heading]):
            return None
        if not gap.separators:
            return beyond
        if self._separator or self._mixed or self._frequent & gap.separators.keys():
            return next(iter(gap.separators.values())) if self._may_stand_in(gap) else None
        return beyond

    def fences_in(self, k: int) -> int:
        """How many lines from the opener of task ``k`` to the next are code fences."""
        beyond = self._openers[k + 1].line if k < len(self._above) else len(self._lines)
        return sum(1 for line in self._lines[self._openers[k].line : beyond] if _FENCE.match(line[:LABEL_CHARS]))

    def _may_stand_in(self, gap: Above) -> bool:
        """True when the separator above a task is none that this reply uses as a rule, and still plainly one."""
        if len(gap.separators) != 1:
            return False
        return self._mixed or (self._separator.startswith("##") and next(iter(gap.separators)).startswith("##"))

    def _end_of_last(self, last_label: int) -> int | None:
        end = len(self._lines)
        while end and not self._lines[end - 1].strip():
            end -= 1
        for line in range(last_label + 1, end):
            if separator_of(self._lines[line]) == (self._separator or "###"):
                rest = [x for x in self._lines[line + 1 : end] if x.strip()]
                opened = len(rest) == 1 and _HEADING_LINE.match(rest[0][:LABEL_CHARS])
                return line if not rest or opened else None
        return end
