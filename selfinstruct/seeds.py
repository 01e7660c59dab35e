"""Seed files: other people's and ours, read into seed tasks, with every bad line reported at once.

The public format is one JSON object a line with ``instruction`` and ``instances: [{input, output}]``; ``id``, ``name``
and ``is_classification`` are optional, and so is a flat ``input``/``output`` pair in place of ``instances``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfinstruct.errors import SeedFileError, UsageError
from selfinstruct.records import SeedTask

MAX_FILE_BYTES = 256 * 1024 * 1024
MAX_LINE_CHARS = 1_000_000
MAX_PROBLEMS_SHOWN = 50


def bundled(language: str) -> Path:
    """Return the seed file that ships for a language code; UsageError when there is none."""
    package = Path(__file__).resolve().parent
    for folder in (package / "seed_tasks", package.parent / "seed_tasks"):  # a wheel; a source checkout
        path = folder / f"{language}.jsonl"
        if path.is_file():
            return path
    raise UsageError(f"no seed tasks ship for language {language!r}", hint="pass your own with --seeds FILE")


def load(path: Path) -> list[SeedTask]:
    """Read a whole seed file.

    Raises SeedFileError naming every bad line as ``file:line: what; remedy``. A BOM and CRLF line ends are accepted,
    blank lines are skipped. One seed task is made per line, from its first instance.
    """
    tasks, problems = read(path)
    if not tasks and not problems:
        problems = [f"{path}: no tasks in it; write one JSON object a line"]
    if problems:
        shown = problems[:MAX_PROBLEMS_SHOWN]
        if len(problems) > len(shown):
            shown.append(f"... and {len(problems) - len(shown)} more")
        raise SeedFileError(
            f"{len(problems)} problem(s) in the seed file {path}",
            shown,
            hint=f"mend these lines, then run: selfinstruct seeds check {path}",
        )
    return tasks


def read(path: Path) -> tuple[list[SeedTask], list[str]]:
    """Read what can be read: the good tasks, and one text for each problem."""
    text, problem = _text_of(path)
    if problem:
        return [], [problem]
    tasks: list[SeedTask] = []
    problems: list[str] = []
    first_line: dict[str, int] = {}
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        parsed = _task_of(line.rstrip("\r"), number)
        if isinstance(parsed, str):
            problems.append(f"{where}: {parsed}")
            continue
        if parsed.task_id in first_line:
            before = first_line[parsed.task_id]
            problems.append(f"{where}: {_used_twice(parsed.task_id, line, before, lines[before - 1])}")
            continue
        first_line[parsed.task_id] = number
        tasks.append(parsed)
    return tasks, problems


def _used_twice(task_id: str, line: str, before: int, line_before: str) -> str:
    """What is wrong with two lines of one id. A line that has none is called by its number."""
    if "id" not in json.loads(line):
        return f"has no id, and the one that it would get, {task_id!r}, was used on line {before}; give it another"
    if "id" not in json.loads(line_before):
        return f"id {task_id!r} is what line {before}, which has none, is called; give each task its own"
    return f"id {task_id!r} was used on line {before}; give each task its own"


def digest(tasks: Sequence[SeedTask]) -> str:
    """SHA-256 (hex) of the tasks' content in order: the part of a run's identity that stands for its seeds."""
    content = [[t.task_id, t.instruction, t.input, t.output, t.is_classification] for t in tasks]
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()


def _text_of(path: Path) -> tuple[str, str]:
    """The file's text and "", or "" and what is wrong with the file as a whole."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_FILE_BYTES + 1)
    except IsADirectoryError:
        return "", f"{path}: is a folder; name a .jsonl file"
    except FileNotFoundError:
        return "", f"{path}: no such file; check the path"
    except OSError as error:
        return "", f"{path}: cannot be read ({error.strerror or error}); check its permissions"
    if len(raw) > MAX_FILE_BYTES:
        return "", f"{path}: larger than {MAX_FILE_BYTES // 2**20} MiB; this is no seed file"
    try:
        return raw.decode("utf-8-sig"), ""
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        return "", f"{path}:{line}: not UTF-8 (byte 0x{raw[error.start]:02x}); save the file as UTF-8"


def _task_of(line: str, number: int) -> SeedTask | str:
    """One line's seed task, or what is wrong with it and the remedy."""
    if len(line) > MAX_LINE_CHARS:
        return f"{len(line):,} characters in one line; the limit is {MAX_LINE_CHARS:,}"
    try:
        entry = json.loads(line, object_pairs_hook=_object)
    except _Twice as error:
        return f'"{error!s:.40}" is there twice; remove one of the two'
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg} at column {error.colno}); write one JSON object a line"
    except (RecursionError, ValueError):
        return "not JSON that can be read (nested too deep or a number too long); write one plain object a line"
    if not isinstance(entry, dict):
        return f"a JSON {type(entry).__name__}, not an object; write one JSON object a line"
    instance = _instance_of(entry)
    if isinstance(instance, str):
        return instance
    for name, value in (("instruction", entry.get("instruction")), *instance.items()):
        wrong = _text_problem(name, value, may_be_empty=name == "input")
        if wrong:
            return wrong
    if _has_half_characters(entry):
        return "holds half a character (a lone surrogate); write the whole character"
    flag = entry.get("is_classification", False)
    if not isinstance(flag, bool):
        return f"is_classification is {flag!r:.40}; write true or false"
    task_id = entry.get("id", f"seed_task_{number - 1}")
    if isinstance(task_id, bool) or not isinstance(task_id, str | int) or not str(task_id).strip():
        return f"id is {task_id!r:.40}; write a non-empty text"
    return SeedTask(str(task_id), entry["instruction"].strip(), instance["input"], instance["output"], flag)


class _Twice(ValueError):
    """A name is twice in one object: which of the values was meant?"""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Twice(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return found


def _has_half_characters(value: object) -> bool:
    """True when a text or a name anywhere in what JSON held is no UTF-8."""
    waiting = [value]
    while waiting:
        some = waiting.pop()
        if isinstance(some, str) and not some.isascii() and any("\ud800" <= c <= "\udfff" for c in some):
            return True
        if isinstance(some, list | dict):
            waiting += some
            waiting += some.values() if isinstance(some, dict) else ()
    return False


def _instance_of(entry: dict[str, Any]) -> dict[str, Any] | str:
    if "instruction" not in entry:
        return 'no "instruction"; every task needs one'
    if "instances" not in entry:
        if "output" not in entry:
            return 'no "instances"; write "instances": [{"input": ..., "output": ...}]'
        return {"input": entry.get("input", ""), "output": entry["output"]}
    instances = entry["instances"]
    if not isinstance(instances, list) or not instances or not isinstance(instances[0], dict):
        return '"instances" is not a list with an object in it; write [{"input": ..., "output": ...}]'
    if "output" not in instances[0]:
        return 'the first instance has no "output"; every task needs an answer'
    return {"input": instances[0].get("input", ""), "output": instances[0]["output"]}


def _text_problem(name: str, value: object, *, may_be_empty: bool) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f'"{name}" is not a number or text; write a text'
    if not isinstance(value, str):
        return f'"{name}" is a {type(value).__name__}, not a text; put it in quotes'
    if not may_be_empty and not value.strip():
        return f'"{name}" is empty; write a text'
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return f'"{name}" holds half a character (a lone surrogate); write the whole character'
    return ""
