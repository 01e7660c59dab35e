"""Reads tasks out of labelled text: ``4. Instruction: ...``, ``4. Input: ...``, ``4. Output: ...`` and relatives.

Stanford's reader wants ``###`` between tasks and exact numbers, and reads nothing when a chat model answers in bold,
in another language or with numbers from 1. This one asks only that a reply is consistent with itself: the way in
which most of its tasks are labelled decides which lines are labels and which are the content of a task. Where two
readings are possible, the task is lost with a reason: never merged with its neighbour, never cut short.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from selfinstruct.methods.labels import HEADING_WORDS, KINDS, WORDS, Kind, Label, Style, find_labels, usual_style
from selfinstruct.methods.layout import Layout, above, unwrapped

_FIELDS: tuple[Kind, ...] = ("input", "output")
# The same labels in the middle of a line, for replies that put a whole task on one line.
_INLINE = re.compile(rf"(?<!\S)(\d{{1,4}})\.\s+({WORDS})\s*[:：]", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Fields:
    """What was read for one task: three texts, or a ``problem`` and no texts."""

    instruction: str = ""
    input: str = ""
    output: str = ""
    problem: str = ""


def read_labelled(text: str, labels: Sequence[Label] | None = None) -> list[Fields]:
    """Read every task of a labelled reply, in order; [] when it holds no labels of tasks."""
    lines = text.split("\n")
    found = list(find_labels(lines) if labels is None else labels)
    lines, doubt = unwrapped(lines, {label.line for label in _candidates(found)})
    found = _with_head(lines, found)
    openers, doubtful = _openers(lines, found)
    if not openers:
        return []
    layout = Layout(lines, openers)
    inside = _inside(found, openers)
    usual: dict[Kind, Style | None] = {
        kind: usual_style(next((x.style for x in span if x.kind == kind), None) for span in inside) for kind in _FIELDS
    }
    tasks = []
    for k, opener in enumerate(openers):
        if k in doubtful or k in layout.glued:
            tasks.append(Fields(problem="merged with its neighbour"))
            continue
        last = inside[k][-1].line if inside[k] else opener.line
        fences = layout.fences_in(k) if doubt else 0
        if fences % 2 or (fences and doubt == "any"):
            task = Fields(problem="code fences in doubt")
        else:
            task = _task(lines, opener, inside[k], usual, layout.end_of(k, last))
        if k == 0 and task.problem and not inside[0] and len(openers) > 1:
            continue  # opening chatter, or an empty first label that the reply repeats
        tasks.append(task)
    return tasks


def _inside(labels: Sequence[Label], openers: Sequence[Label]) -> list[list[Label]]:
    """For each task, the labels between its opener and the next that are no headings."""
    inside: list[list[Label]] = [[] for _ in openers]
    lines = [opener.line for opener in openers]
    passed = {label.line for label in _candidates(labels)} - set(lines)
    for label in labels:
        if (label.kind != "instruction" or label.line in passed) and label.line >= lines[0]:
            inside[bisect_right(lines, label.line) - 1].append(label)
    return inside


def _with_head(lines: Sequence[str], labels: list[Label]) -> list[Label]:
    """A reply that goes on after an open ``4. Instruction:`` begins without that label: put it back."""
    if not labels or labels[0].kind == "instruction":
        return labels
    head = "\n".join(lines[: labels[0].line]).strip()
    if not head or "\n\n" in head:
        return labels  # nothing, or more than an instruction: not ours to guess
    openers = [label.style for label in labels if label.kind == "instruction"]
    style = usual_style(openers) or Style("", "", labels[0].style.place)
    return [Label(0, "instruction", labels[0].number, style, lines[0]), *labels]


def _candidates(labels: Sequence[Label]) -> list[Label]:
    """The labels that may begin a task: beside as many of "Instruction:", a "Task 4:" is a heading."""
    instructions = [label for label in labels if label.kind == "instruction"]
    plain = [label for label in instructions if label.style.word.casefold() not in HEADING_WORDS]
    return plain if len(plain) * 3 > len(instructions) else instructions


def _openers(lines: Sequence[str], labels: Sequence[Label]) -> tuple[list[Label], set[int]]:
    """The instruction labels that begin a task, and the positions among them of which neither reading is sure."""
    candidates = _candidates(labels)
    usual = usual_style(label.style for label in candidates)
    if usual is None:
        return [], set()
    counts = Counter(label.style for label in candidates)
    openers: list[Label] = []
    doubtful: set[int] = set()
    answered, whole = _answered(labels), False
    following = _following(candidates, usual)
    for k, label in enumerate(candidates):
        has_output = label.line in answered
        many = counts[label.style] * 4 >= len(candidates) and has_output and (whole or not openers)
        common = label.style == usual or many
        if not common and not above(lines, label.line).separators:
            same = label.style.place == usual.place and label.style.word.casefold() == usual.word.casefold()
            if not same and not (whole and has_output and not _neighbours(lines, openers, following[k])):
                whole = whole or has_output
                continue  # the content of a task
            before = openers[-1].number if openers else None
            follows = before is not None and label.number == before + 1 and len(openers) - 1 not in doubtful
            if openers and not follows:
                doubtful |= {len(openers) - 1, len(openers)}
        openers.append(label)
        whole = has_output
    return openers, doubtful


def _following(candidates: Sequence[Label], usual: Style) -> list[Label | None]:
    """For each candidate the next one in the usual style."""
    following: list[Label | None] = []
    after = None
    for label in reversed(candidates):
        following.append(after)
        after = label if label.style == usual else after
    return following[::-1]


def _neighbours(lines: Sequence[str], openers: Sequence[Label], after: Label | None) -> bool:
    """True when numbers and a separator vouch that no task stands between the last of ``openers`` and ``after``."""
    if not openers or after is None or after.number is None or openers[-1].number is None:
        return False
    return after.number == openers[-1].number + 1 and bool(above(lines, after.line).separators)


def _answered(labels: Sequence[Label]) -> set[int]:
    """The lines of the instruction labels with an output label before the next of them."""
    answered, opener = set(), -1
    lines = {label.line for label in _candidates(labels)}
    for label in labels:
        if label.line in lines:
            opener = label.line
        elif label.kind == "output":
            answered.add(opener)
    return answered


def _task(
    lines: Sequence[str],
    opener: Label,
    inside: Sequence[Label],
    usual: dict[Kind, Style | None],
    output_end: int | None,
) -> Fields:
    if output_end is None:
        return Fields(problem="closing words in doubt")
    outputs = _chosen(opener, [x for x in inside if x.kind == "output"], usual["output"])
    if not outputs:
        inline = _inline(lines, opener, output_end)
        return inline or Fields(problem="no output label")
    if len(outputs) > 1:
        return Fields(problem="two output labels")
    output = outputs[0]
    inputs = _chosen(opener, [x for x in inside if x.kind == "input"], usual["input"])
    before = [label for label in inputs if label.line < output.line]
    if len(before) > 1:
        return Fields(problem="two input labels")
    if len(before) != len(inputs) or _foreign(opener, output, before, inside, usual):
        return Fields(problem="labels of another task inside")
    upto = before[0].line if before else output.line
    instruction = _between(lines, opener, upto)
    if not before and "\n\n" in instruction and usual["input"] is not None:
        return Fields(problem="no input label")
    given = _between(lines, before[0], output.line) if before else ""
    answer = _between(lines, output, max(output_end, output.line + 1))
    if not instruction:
        return Fields(problem="no instruction")
    return Fields(instruction, given, answer)


def _chosen(opener: Label, candidates: list[Label], usual: Style | None) -> list[Label]:
    """The labels that belong to this task: those most like the reply's usual ones; several mean doubt."""

    def own_number(label: Label) -> bool:
        return label.number is None or opener.number is None or label.number == opener.number

    numbered = bool(usual and usual.numbered)
    tiers = (
        [x for x in candidates if x.style == usual and own_number(x)],
        [x for x in candidates if x.style.numbered == numbered and own_number(x)],
        [x for x in candidates if x.style == usual],
        [x for x in candidates if own_number(x)],
    )
    return next((tier for tier in tiers if tier), [])


def _foreign(
    opener: Label, output: Label, before: list[Label], inside: Sequence[Label], usual: dict[Kind, Style | None]
) -> bool:
    """True when a label that seems to be another task's stands in this one."""
    own = {output.line, *(label.line for label in before)}
    if output.style != usual["output"] and any(x.kind == "instruction" and x.line < output.line for x in inside):
        return True
    return any(x.line not in own and x.style == usual.get(x.kind) for x in inside)


def _between(lines: Sequence[str], label: Label, end: int) -> str:
    return "\n".join([label.rest, *lines[label.line + 1 : end]]).strip()


def _inline(lines: Sequence[str], opener: Label, end: int) -> Fields | None:
    """A task on one line: ``4. Instruction: ... 4. Input: ... 4. Output: ...``."""
    if opener.number is None:
        return None
    text = _between(lines, opener, end)
    parts = [m for m in _INLINE.finditer(text) if int(m[1]) == opener.number]
    kinds = [KINDS[m[2].casefold()] for m in parts]
    if kinds != ["input", "output"]:
        return None
    instruction = text[: parts[0].start()].strip()
    given, answer = text[parts[0].end() : parts[1].start()].strip(), text[parts[1].end() :].strip()
    return Fields(instruction, given, answer) if instruction else None
