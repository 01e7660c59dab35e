"""The Alpaca method: prompts that depend on nothing but their inputs, and that the reader's own rules can read."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest

from selfinstruct.errors import UsageError
from selfinstruct.languages import LANGUAGES
from selfinstruct.methods.alpaca import Alpaca, Api, Form
from selfinstruct.records import Completion, Draft, Prompt, SeedTask
from selfinstruct.seeds import bundled, load

SEEDS = {code: load(bundled(code)) for code in LANGUAGES}
FORMS: tuple[Form, ...] = ("text", "schema", "short")
APIS: tuple[Api, ...] = ("chat", "completions")


@dataclass
class SeedsOnly:
    seeds: Sequence[SeedTask]

    def __len__(self) -> int:
        return 0

    def accepted(self, number: int) -> Draft:
        raise IndexError(number)


def method(code: str = "en", **changed: object) -> Alpaca:
    how = {"shots": 3, "tasks": 8, "form": "text", "api": "chat", "max_new_tokens": 1024, "with_seed": False} | changed
    return Alpaca(LANGUAGES[code], **how)  # type: ignore[arg-type]


def opening(made: Alpaca, seeds: Sequence[SeedTask], request_no: int = 0) -> Prompt:
    return made.opening(request_no, SeedsOnly(seeds), random.Random(f"1 {request_no}"))


def said(prompt: Prompt) -> str:
    return prompt.text if prompt.text is not None else prompt.messages[0]["content"]  # type: ignore[index]


@pytest.mark.parametrize("code", LANGUAGES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("shots", [0, 1, 3, 50])
def test_the_same_draw_gives_the_same_prompt(code: str, form: Form, api: Api, shots: int) -> None:
    made = method(code, form=form, api=api, shots=shots)
    seeds = SEEDS[code] * 4
    prompts = [opening(made, seeds, n) for n in (0, 1, 0)]
    assert prompts[0] == prompts[2]
    assert len(prompts[0].shown_ids) == shots
    assert shots == 0 or said(prompts[0]) != said(prompts[1])
    assert (prompts[0].text is None) == (api == "chat")
    assert (prompts[0].schema is None) == (form == "text")
    assert "{count}" not in said(prompts[0])
    assert "{{" not in said(prompts[0]).split("Tasks:")[0] or form == "short"


@pytest.mark.parametrize("code", LANGUAGES)
@pytest.mark.parametrize("shots", [0, 1, 3, 10])
def test_a_raw_reply_that_continues_the_open_label_reads_back(code: str, shots: int) -> None:
    made = method(code, api="completions", shots=shots)
    prompt = opening(made, SEEDS[code])
    assert prompt.text is not None
    assert prompt.text.endswith(prompt.prefix)
    instruction, input, output = LANGUAGES[code].labels
    assert prompt.prefix == f"{shots + 1}. {instruction}:"
    pieces = []
    for k in range(made.tasks_per_request):
        n, given = shots + 1 + k, LANGUAGES[code].no_input if k % 2 else f"given {k}"
        pieces.append(f"{n}. {instruction}: Task {k} of words\n{n}. {input}:\n{given}\n{n}. {output}:\nAnswer {k}\n")
    reply = "###\n".join(pieces).removeprefix(prompt.prefix)
    drafts = made.parse(prompt, Completion(0, reply, "stop")).drafts
    assert [(d.instruction, d.input, d.output) for d in drafts] == [
        (f"Task {k} of words", "" if k % 2 else f"given {k}", f"Answer {k}") for k in range(made.tasks_per_request)
    ]
    assert prompt.stop == (f"\n{shots + made.tasks_per_request + 1}. {instruction}:",)
    assert not any(stop in reply for stop in prompt.stop)


@pytest.mark.parametrize("code", LANGUAGES)
def test_the_demonstrations_of_a_prompt_are_readable_by_its_own_reader(code: str) -> None:
    made = method(code, api="completions", shots=5)
    prompt = opening(made, SEEDS[code])
    shown = {seed.task_id: seed for seed in SEEDS[code]}
    part = said(prompt).partition("###\n")[2].rpartition("###")[0]
    drafts = made.parse(replace(prompt, prefix=""), Completion(0, part, "stop")).drafts
    expected = [shown[name] for name in prompt.shown_ids]
    assert [(d.input, d.output) for d in drafts] == [(s.input.strip(), s.output.strip()) for s in expected]
    assert [d.instruction for d in drafts] == [" ".join(s.instruction.split()).rstrip(": ") for s in expected]


@pytest.mark.parametrize("form", ["schema", "short"])
def test_json_demonstrations_are_whole_seeds(form: Form) -> None:
    prompt = opening(method(form=form), SEEDS["en"])
    lines = [json.loads(line) for line in said(prompt).splitlines() if line.startswith('{"instruction": "')]
    shown = {seed.task_id: seed for seed in SEEDS["en"]}
    assert lines == [
        {"instruction": shown[x].instruction, "input": shown[x].input, "output": shown[x].output}
        for x in prompt.shown_ids
    ]


def test_seeds_with_colons_and_line_breaks_keep_the_form_of_the_prompt() -> None:
    seed = SeedTask("a", "Answer\nthis\n\n question: :", "two\nlines: here", "{braces} and: more\n", False)
    prompt = opening(method(shots=1), [seed])
    assert "1. Instruction: Answer this question\n1. Input:\ntwo\nlines: here\n1. Output:\n{braces} and: more" in said(
        prompt
    )


@pytest.mark.parametrize("form", FORMS)
def test_fewer_seeds_than_shots_is_a_usage_error(form: Form) -> None:
    with pytest.raises(UsageError, match=r"4 examples .* there are 3") as caught:
        opening(method(form=form, shots=4), [s for s in SEEDS["en"] if len(s.input + s.output) < 99][:3])
    assert "--shots" in caught.value.hint


def test_short_prompts_show_short_seeds_alone() -> None:
    long = SeedTask("long", "Do it now please", "", "word " * 100, False)
    with pytest.raises(UsageError, match=r"there are 0 seeds of at most \d+ words"):
        opening(method(form="short", shots=1), [long])


def test_a_sampling_seed_comes_from_the_draw_alone() -> None:
    made = method(with_seed=True)
    assert opening(method(), SEEDS["en"]).seed is None
    assert opening(made, SEEDS["en"], 1).seed == opening(made, SEEDS["en"], 1).seed
    assert opening(made, SEEDS["en"], 1).seed != opening(made, SEEDS["en"], 2).seed
    assert opening(made, SEEDS["en"], 1).shown_ids == opening(method(), SEEDS["en"], 1).shown_ids


def test_the_fingerprint_changes_with_what_changes_the_prompt() -> None:
    changes: list[dict[str, object]] = [
        {},
        {"shots": 4},
        {"tasks": 9},
        {"form": "schema"},
        {"form": "short"},
        {"api": "completions"},
        {"max_new_tokens": 99},
        {"code": "pt"},
    ]
    prints = [method(**change).fingerprint for change in changes]  # type: ignore[arg-type]
    assert len(set(prints)) == len(prints)
    assert method().fingerprint == prints[0]
    wording = replace(LANGUAGES["en"].wording, numbered="Other {count} words")
    other = replace(LANGUAGES["en"], wording=wording)
    made = Alpaca(other, shots=3, tasks=8, form="text", api="chat", max_new_tokens=1024, with_seed=False)
    assert made.fingerprint != prints[0]


def test_every_rule_it_names_is_a_rule() -> None:
    from selfinstruct.quality.filters import RULES

    assert set(method().rules) <= set(RULES)
