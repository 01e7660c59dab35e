"""The tolerant reader: a completion in, whole tasks out, and a reason for each task that was not whole.

It recognises labelled text (``labelled.py``) and JSON (an array, one object a line, one object, fenced or not) by
what the reply holds, not by what was asked for: teachers answer in the form they like.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from selfinstruct.methods.labelled import Fields, read_labelled
from selfinstruct.methods.labels import KINDS, find_labels
from selfinstruct.records import Completion, Draft, Loss, Reading

_MAX_BROKEN_OBJECTS = 200  # each costs a scan of what follows: bounds the time that hostile text can take
_MAX_PASSED = 20_000  # braces inside broken objects; each costs a look at what stands before
_JSON_KEYS = KINDS | {
    "prompt": "instruction",
    "question": "instruction",
    "query": "instruction",
    "context": "input",
    "completion": "output",
}
# Before an object that is no part of a broken one: a closing bracket, a comma; or a fence or a "Task 5" after such.
# (possessive throughout: hostile text must not make it try again)
_APART = re.compile(r"[\]},]\s*+(?:`{3,}+\w*\s*+|[#*\s]*+(?:\w++ )?\d++[.:)*]*+\s*+){0,4}$")
_SURROGATE = re.compile("[\ud800-\udfff]")


def read(completion: Completion, prefix: str = "") -> Reading:
    """Read the tasks out of ``completion``, which continues ``prefix`` (the open end of a raw prompt, "" in a chat).

    When the completion was cut at its token limit the last labelled task is dropped, whole as it may look.
    """
    text = _SURROGATE.sub("\ufffd", prefix + completion.text).replace("\r\n", "\n")
    tasks = _read_text(text, cut=completion.finish == "length")
    drafts: list[Draft] = []
    losses: list[Loss] = []
    for item_no, task in enumerate(tasks):
        if task.problem:
            losses.append(Loss(completion.request_no, item_no, task.problem))
            continue
        drafts.append(
            Draft(
                request_no=completion.request_no,
                item_no=item_no,
                instruction=task.instruction,
                input=task.input,
                output=task.output,
            )
        )
    if not tasks:
        losses.append(Loss(completion.request_no, 0, "no task in the reply" if text.strip() else "empty reply"))
    return Reading(tuple(drafts), tuple(losses))


def _read_text(text: str, *, cut: bool) -> list[Fields]:
    labels = find_labels(text.split("\n"))
    start = text.find("{")
    headings_alone = all(label.kind == "instruction" for label in labels)  # "## Task 1" above each JSON object
    if start >= 0 and (headings_alone or text.count("\n", 0, start) < labels[0].line):
        tasks = _read_json(text)
        if tasks:
            return tasks
    tasks = read_labelled(text, labels)
    if cut and tasks:
        tasks[-1] = Fields(problem="cut at the token limit")
    return tasks


@dataclass(slots=True)
class _Repeated:
    """A JSON object that names a key twice: two tasks run together."""

    keys: set[str]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Repeated:
    found = dict(pairs)
    return found if len(found) == len(pairs) else _Repeated(set(found))


# strict=False: a raw line break inside a string is the commonest slip of small models, and its meaning is plain.
_DECODER = json.JSONDecoder(strict=False, object_pairs_hook=_object)


def _read_json(text: str) -> list[Fields]:
    """Every JSON object in the text that has the keys of a task, in order; broken ones that began as one are lost."""
    tasks: list[Fields] = []
    position, broken, passed, inside = text.find("{"), 0, 0, False
    while position >= 0:
        if broken == _MAX_BROKEN_OBJECTS or passed == _MAX_PASSED:
            tasks += [Fields(problem="too many broken JSON objects")] if tasks else []
            break
        inside = inside and not _APART.search(text[max(0, position - 200) : position])
        if inside:
            passed += 1
            position = text.find("{", position + 1)
            continue
        try:
            found, end = _DECODER.raw_decode(text, position)
        except RecursionError:
            tasks.append(Fields(problem="JSON nested too deep"))
            break
        except ValueError:
            broken += 1
            if _begins_task(text, position):
                tasks.append(Fields(problem="broken JSON"))
                inside = True  # what its texts hold may look like tasks
            end = position + 1
        else:
            tasks.extend(_tasks_in(found))
        position = text.find("{", end)
    return tasks


def _begins_task(text: str, position: int) -> bool:
    """True when the broken object at ``position`` begins with an instruction: it was one task, not a list of them."""
    key = re.match(r'\{\s*"([^"\\]{1,40})"\s*:', text[position : position + 200])
    return bool(key and _JSON_KEYS.get(key[1].strip().casefold()) == "instruction")


def _tasks_in(found: object) -> list[Fields]:
    """The tasks in a decoded object: itself, or those in the list that it wraps."""
    if isinstance(found, _Repeated):
        named = {_JSON_KEYS.get(key.strip().casefold()) for key in found.keys}
        return [Fields(problem="a key stands twice in one JSON object")] if "instruction" in named else []
    if not isinstance(found, dict):
        return []
    parts: dict[str, Any] = {}
    for key, value in found.items():
        kind = _JSON_KEYS.get(key.strip().casefold())
        if kind and kind not in parts:
            parts[kind] = value
    if "instruction" in parts and not isinstance(parts["instruction"], list):
        return [_fields_of(parts)]
    return [task for value in found.values() if isinstance(value, list) for x in value for task in _tasks_in(x)]


def _fields_of(parts: dict[str, Any]) -> Fields:
    if "output" not in parts:
        return Fields(problem="no output in the JSON object")
    texts = {}
    for kind, value in (
        ("instruction", parts["instruction"]),
        ("input", parts.get("input")),
        ("output", parts["output"]),
    ):
        if value is None and kind == "input":
            value = ""
        if isinstance(value, int | float) and not isinstance(value, bool) and kind != "instruction":
            value = json.dumps(value)
        if not isinstance(value, str):
            return Fields(problem=f"the JSON {kind} is no text")
        texts[kind] = _SURROGATE.sub("\ufffd", value).strip()
    if not texts["instruction"]:
        return Fields(problem="no instruction")
    return Fields(texts["instruction"], texts["input"], texts["output"])
