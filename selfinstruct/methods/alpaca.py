"""The Stanford Alpaca method: one request shows a few seed tasks and asks for many whole tasks.

Our own wording, three forms: ``text`` (numbered, as the paper's), ``schema`` (JSON, for endpoints that accept a JSON
schema) and ``short`` (one JSON task a request: a 135M model gives three times more usable tasks per CPU minute so).
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from selfinstruct.errors import UsageError
from selfinstruct.languages import Language
from selfinstruct.methods.base import PoolView
from selfinstruct.methods.replies import read
from selfinstruct.records import Completion, Prompt, Reading, SeedTask

Form = Literal["text", "schema", "short"]
Api = Literal["chat", "completions"]

_READER = 2  # raise it when the reader, or a rule on what it reads, would make other rows of an old reply
_SHORT_SEED_WORDS = 60  # small models copy the length of what they see, and each prompt is read anew
_SHORT_MAX_CHARS = {"instruction": 200, "input": 200, "output": 300}  # what the token limit can hold
_RULES = (
    "length",
    "forbidden_word",
    "forbidden_start",
    "punctuation_start",
    "foreign_start",
    "no_output",
    "echo",
    "leak",
    "unfinished",
)


def _task_schema(limits: dict[str, int]) -> dict[str, Any]:
    fields = {
        name: {"type": "string", **({"maxLength": limits[name]} if limits else {})}
        for name in ("instruction", "input", "output")
    }
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


_SHORT_SCHEMA = _task_schema(_SHORT_MAX_CHARS)
_LIST_SCHEMA = {
    "type": "object",
    "properties": {"tasks": {"type": "array", "items": _task_schema({})}},
    "required": ["tasks"],
    "additionalProperties": False,
}


class Alpaca:
    """Shows ``shots`` seeds and asks for ``tasks`` new tasks; demonstrations come from the seeds alone."""

    name = "alpaca"
    rules = _RULES

    def __init__(
        self, language: Language, *, shots: int, tasks: int, form: Form, api: Api, max_new_tokens: int, with_seed: bool
    ) -> None:
        """``with_seed`` puts a sampling seed of its own into every prompt, for servers that honour it."""
        self._language = language
        self._shots = shots
        self._form = form
        self._api = api
        self._max_new_tokens = max_new_tokens
        self._with_seed = with_seed
        self.tasks_per_request = 1 if form == "short" else tasks

    @property
    def fingerprint(self) -> str:
        wording = self._language.wording
        text = (
            wording.short if self._form == "short" else wording.schema if self._form == "schema" else wording.numbered
        )
        parts = [
            text,
            wording.continue_numbered,
            *self._language.labels,
            self._language.no_input,
            self._form,
            self._api,
            f"{self._shots} {self.tasks_per_request} {self._max_new_tokens} {_READER} {_SHORT_SEED_WORDS}",
        ]
        return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]

    def opening(self, request_no: int, pool: PoolView, rng: random.Random) -> Prompt:
        shown = self._draw(pool.seeds, rng)
        text, prefix = self._render(shown)
        chat = self._api == "chat"
        return Prompt(
            request_no=request_no,
            method=self.name,
            messages=({"role": "user", "content": text},) if chat else None,
            text=None if chat else text,
            prefix=prefix,
            stop=self._stop(),
            max_new_tokens=self._max_new_tokens,
            schema=_SHORT_SCHEMA if self._form == "short" else _LIST_SCHEMA if self._form == "schema" else None,
            shown_ids=tuple(seed.task_id for seed in shown),
            seed=rng.getrandbits(31) if self._with_seed else None,
        )

    def parse(self, prompt: Prompt, completion: Completion) -> Reading:
        reading = read(completion, prompt.prefix)
        asked = self._language.no_input  # the marker that the prompt asks for; other ways to say it are repaired later
        drafts = tuple(replace(d, input="") if d.input.lower() == asked else d for d in reading.drafts)
        return replace(reading, drafts=drafts)

    def _draw(self, seeds: Sequence[SeedTask], rng: random.Random) -> list[SeedTask]:
        if self._form == "short":
            seeds = [seed for seed in seeds if _words(seed) <= _SHORT_SEED_WORDS]
        if len(seeds) < self._shots:
            kind = f"seeds of at most {_SHORT_SEED_WORDS} words" if self._form == "short" else "seeds"
            raise UsageError(
                f"{self._shots} examples a prompt are asked for, and there are {len(seeds)} {kind}",
                hint="add seed tasks, or lower --shots",
            )
        return rng.sample(seeds, self._shots)

    def _render(self, shown: Sequence[SeedTask]) -> tuple[str, str]:
        """The prompt's text, and the part at its end that a raw completion continues."""
        wording, count = self._language.wording, self.tasks_per_request
        if self._form != "text":
            lines = "".join(_json_line(seed) for seed in shown)
            return (wording.short if self._form == "short" else wording.schema.format(count=count)) + lines, ""
        first = len(shown) + 1
        tasks = "".join(f"###\n{self._numbered(k, seed)}" for k, seed in enumerate(shown, start=1))
        head = wording.numbered.format(count=count) + tasks + "###"
        if self._api == "chat":
            return head + wording.continue_numbered.format(first=first, last=first + count - 1), ""
        opened = f"{first}. {self._language.labels[0]}:"
        return f"{head}\n{opened}", opened

    def _numbered(self, number: int, seed: SeedTask) -> str:
        instruction, input, output = self._language.labels
        asked = re.sub(r"\s+", " ", seed.instruction).rstrip(": ")
        given = seed.input or self._language.no_input
        return f"{number}. {instruction}: {asked}\n{number}. {input}:\n{given}\n{number}. {output}:\n{seed.output}\n"

    def _stop(self) -> tuple[str, ...]:
        """Raw completions do not end by themselves. At a line's start only: Stanford's "20." cut years and prices."""
        if self._api == "chat":
            return ()
        if self._form == "text":
            return (f"\n{self._shots + self.tasks_per_request + 1}. {self._language.labels[0]}:",)
        return ("\n{",) if self._form == "short" else ()


def _words(seed: SeedTask) -> int:
    return len(seed.instruction.split()) + len(seed.input.split()) + len(seed.output.split())


def _json_line(seed: SeedTask) -> str:
    task = {"instruction": seed.instruction, "input": seed.input, "output": seed.output}
    return json.dumps(task, ensure_ascii=False) + "\n"
