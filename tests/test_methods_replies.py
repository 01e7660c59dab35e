"""The reader's promise: every whole task of a reply in whatever shape, none merged with another, none cut short."""

from __future__ import annotations

import gzip
import json
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from selfinstruct.methods.replies import read
from selfinstruct.records import Completion, Finish, Reading

CORPUS = Path(__file__).parents[2] / "shared" / "data" / "alpaca_52k.jsonl.gz"

Task = tuple[str, str, str]  # instruction, input, output
LABELS = {
    "en": ("Instruction", "Input", "Output"),
    "task": ("Task", "Input", "Response"),
    "pt": ("Instrução", "Entrada", "Saída"),
    "es": ("Instrucción", "Entrada", "Salida"),
    "zh": ("指令", "输入", "输出"),
    "ja": ("指示", "入力", "出力"),
    "de": ("Anweisung", "Eingabe", "Ausgabe"),
    "fr": ("Consigne", "Entrée", "Sortie"),
    "it": ("Istruzione", "Input", "Uscita"),
    "ru": ("Задание", "Ввод", "Ответ"),
    "ko": ("지시", "입력", "출력"),
    "upper": ("INSTRUCTION", "INPUT", "OUTPUT"),
}
TASKS: list[Task] = [
    ("Name the capital of France.", "", "Paris is the capital of France."),
    ("Sort the words by length.", "pear\nfig\nbanana", "1. fig\n2. pear\n3. banana"),
    (
        "Write a short report about the river.",
        "Name: Douro",
        "### Summary\n\nIt is long.\n\n### Details\n\n- 897 km\n- wine",
    ),
    ("Give a Python function that adds two numbers.", "", "```python\n# adds\ndef add(a, b):\n    return a + b\n```"),
    ("Translate to Portuguese: good morning", "", "Bom dia: é assim que se diz.\n\nNote: “bom-dia” is the noun."),
    ("In which year did he retire?", "He was born in 1960 and\nworked 60 years.", "He retired in the year 2020."),
]


def reading(text: str, *, finish: Finish = "stop", prefix: str = "") -> Reading:
    return read(Completion(7, text, finish), prefix)


def triples(result: Reading) -> list[Task]:
    return [(d.instruction, "" if d.input == "<noinput>" else d.input, d.output) for d in result.drafts]


@dataclass(frozen=True)
class Shape:
    """How a made-up teacher writes labelled tasks."""

    labels: tuple[str, str, str] = LABELS["en"]
    number: str = "{n}. {label}"  # or "{label} {n}", "{label}"
    mark: str = "{label}:"  # or "**{label}:**", "### {label}" ...
    numbers: str = "from 4"
    between: str = "###\n"
    heading: str = ""
    inline: bool = False  # the content begins on the line of its label
    no_input: str = "<noinput>"
    chatter: str = ""
    fence: str = ""  # "whole", "task"

    def numbering(self, count: int) -> list[int]:
        sequences = {
            "from 4": range(4, 4 + count),
            "from 1": range(1, 1 + count),
            "restarted": [n % 3 + 1 for n in range(count)],
            "skipped": [n + 4 + (n > 1) + 2 * (n > 3) for n in range(count)],
            "repeated": [n + 4 - (n > 1) for n in range(count)],
            "all one": [1] * count,
        }
        return list(sequences[self.numbers])

    def label(self, kind: int, n: int) -> str:
        written = self.mark.format(label=self.number.format(n=n, label=self.labels[kind]))
        return written

    def task(self, task: Task, n: int) -> str:
        parts = []
        for kind, text in enumerate(task):
            text = text or (self.no_input if kind == 1 else "")
            joint = " " if (self.inline or kind == 0) and self.mark[-1] in ":：*" and "#" not in self.mark else "\n"
            parts.append(f"{self.label(kind, n)}{joint}{text}\n")
        body = "".join(parts)
        if self.fence == "task":
            body = f"```\n{body}```\n"
        return (self.heading.format(n=n) + "\n" if self.heading else "") + body

    def reply(self, tasks: Sequence[Task]) -> str:
        pieces = [self.task(task, n) for task, n in zip(tasks, self.numbering(len(tasks)), strict=True)]
        text = self.between.join(pieces)
        if self.fence == "whole":
            text = f"```markdown\n{text}```\n"
        return self.chatter + text


SHAPES = {
    "stanford": Shape(),
    **{f"labels in {name}": Shape(labels=labels) for name, labels in LABELS.items()},
    **{f"numbers {how}": Shape(numbers=how) for how in ("from 1", "restarted", "skipped", "repeated", "all one")},
    **{
        f"separator {sep.strip() or 'blank line'!r}": Shape(between=sep)
        for sep in ("##\n", "#\n", "\n", "\n\n", "---\n", "\n---\n\n", "***\n", "* * *\n", "======\n", "\n###\n\n", "")
    },
    "bold": Shape(mark="**{label}:**", number="{label}", between="\n"),
    "bold, colon outside": Shape(mark="**{label}**:", number="{label}", between="\n---\n\n"),
    "bold, numbered": Shape(mark="**{label}:**"),
    "number before bold": Shape(number="**{label}:**", mark="{label}", between="\n"),
    "italic": Shape(mark="*{label}:*", number="{label}", between="\n"),
    "no numbers": Shape(number="{label}", between="\n"),
    "numbers after": Shape(number="{label} {n}", between="\n"),
    "numbers with brackets": Shape(number="{n}) {label}"),
    "headings as labels": Shape(mark="### {label}", number="{label}", between="\n---\n"),
    "headings with colon": Shape(mark="## {label}:", number="{label}", between="\n"),
    "full-width colon": Shape(mark="{label}：", labels=LABELS["zh"]),
    "full-width colon, no numbers": Shape(mark="{label}：", number="{label}", labels=LABELS["zh"], between="\n"),
    "quoted": Shape(mark="> {label}:", number="{label}", between="\n"),
    "bullets": Shape(mark="- **{label}:**", number="{label}", between="\n"),
    "same line": Shape(inline=True),
    "same line, blank lines between": Shape(inline=True, number="{label}", between="\n"),
    "chatter": Shape(chatter="Sure! Here are the tasks you asked for:\n\n"),
    "chatter and separator": Shape(chatter="Sure! Here are six tasks:\n\n###\n"),
    "chatter and rule": Shape(chatter="Claro, aqui estão as tarefas.\n\n---\n\n", between="\n---\n\n"),
    "task headings": Shape(number="{label}", heading="Task {n}", between="\n"),
    "task headings, bold": Shape(number="{label}", mark="**{label}:**", heading="**Task {n}**", between="\n"),
    "task headings, markdown": Shape(number="{label}", mark="**{label}:**", heading="## Task {n}", between="\n"),
    "task headings, markdown, colon": Shape(number="{label}", heading="### Task {n}:", between="\n---\n\n"),
    "tarefa headings": Shape(labels=LABELS["pt"], number="{label}", heading="### Tarefa {n}", between="\n"),
    "number headings": Shape(number="{label}", heading="{n}.", between="\n"),
    "fenced whole": Shape(fence="whole"),
    "fenced whole, blank lines": Shape(fence="whole", number="{label}", between="\n"),
    "fenced each": Shape(fence="task", between="\n"),
    "fenced each, no blank line": Shape(fence="task", number="{label}", between=""),
    "empty input": Shape(no_input=""),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_whole_task_is_read_whatever_the_shape(name: str) -> None:
    shape = SHAPES[name]
    tasks = [t for t in TASKS if not (shape.fence and "```" in t[2])]
    result = reading(shape.reply(tasks))
    assert triples(result) == tasks
    assert not result.losses


# --- random tasks in random shapes -----------------------------------------------------------------------------------

WORDS = (
    "the river café naïve 2020. $20. 3.5 São “quoted” x=1 a|b output: Input: the Task: Instruction: answer: e.g. "
    "**bold** `code` 日本語 مرحبا 🙂 # ## ### - * 19. 20. {} {curly} [x] \\n <b> label："
).split()
PLAIN_STARTS = ("", "- ", "* ", "1. ", "2) ", "10. ", "> ", "Note: ", "### ", "# ", "| a | ", "    ", "Q: ", "Step 3: ")
CODE = "```python\n# a comment\nfor i in range(3):\n    print(i)\n\n```"
TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1, max_size=30)
ANY = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)
# Tasks and shapes are made by a generator of their own: drawn one by one by hypothesis they take 50 times longer.
SEED = st.integers(0, 2**32)


def made_line(rng: random.Random, starts: Sequence[str] = PLAIN_STARTS) -> str:
    start = rng.choice(starts)
    words = " ".join(rng.choices(WORDS, k=rng.randint(1, 8)))
    return f"{start}word {words}" if not start or rng.random() < 0.5 else f"{start}line of words"


def made_content(rng: random.Random, *, fences: bool) -> str:
    blocks = [lambda: made_line(rng), lambda: "", lambda: made_line(rng), *([lambda: CODE] if fences else [])]
    return "\n".join(rng.choice(blocks)() for _ in range(rng.randint(0, 8))).strip()


def made_tasks(rng: random.Random, count: int, *, fences: bool = True) -> list[Task]:
    tasks = []
    for _ in range(count):
        instruction = made_line(rng, ("", "", "Q: ", "1. ", "é "))
        if rng.random() < 0.15:
            instruction += "\n" + made_line(rng)
        tasks.append((instruction.strip(), made_content(rng, fences=fences), made_content(rng, fences=fences)))
    return tasks


def made_shape(rng: random.Random) -> Shape:
    one = rng.choice
    labels = one([*LABELS.values()])
    headings = ["", "", "Task {n}", "## Task {n}", "**Example {n}:**", "Tarefa {n}:"]
    return Shape(
        labels=labels,
        number=one(["{n}. {label}", "{n}) {label}", "{label} {n}", "{label}"]),
        mark=one(["{label}:", "{label}：", "**{label}:**", "**{label}**:", "### {label}:", "## {label}"]),
        numbers=one(["from 4", "from 1", "restarted", "skipped", "repeated", "all one"]),
        between=one(["###\n", "##\n", "\n", "\n\n", "---\n", "\n---\n\n", "***\n", "======\n"]),
        heading="" if labels[0] == "Task" else one(headings),  # nobody writes "Task 4" over "4. Task:"
        inline=one([False, True]),
        no_input=one(["<noinput>", ""]),
        chatter=one(["", "", "Sure! Here they are:\n\n", "Of course.\n\n---\n\n", "好的！\n\n###\n"]),
        fence=one(["", "", "whole", "task"]),
    )


FUZZ = settings(max_examples=150, deadline=None, derandomize=True)


@FUZZ
@given(SEED)
def test_random_tasks_in_random_shapes_are_read_back_whole(seed: int) -> None:
    rng = random.Random(seed)
    made = made_shape(rng)
    tasks = made_tasks(rng, rng.choice([1, 2, 3, 5, 8]), fences=not made.fence)
    text = made.reply(tasks)
    result = reading(text)
    assert triples(result) == tasks, text


LOOK_ALIKES = (
    "Input: x",
    "Output: y",
    "Instruction: do",
    "**Instruction:** q\n**Output:** r",
    "Answer: 4",
    "Response:",
    "### Output",
    "- Instruction 1: a\n- Instruction 2: b",
    "Example 2:\nInput: 3\nOutput: 5",
    "Instruction: a\nInput: b\nOutput: c",
    "1. Instruction: a\n1. Input: b\n1. Output: c",
    "# Task 3",
    "____",
)


@FUZZ
@given(SEED)
def test_a_task_that_holds_labels_is_read_whole_or_lost_with_a_reason(seed: int) -> None:
    rng = random.Random(seed)
    tasks = made_tasks(rng, rng.randint(4, 8))
    place = rng.randrange(len(tasks))
    lines = tasks[place][2].split("\n")
    lines.insert(rng.randint(0, len(lines)), rng.choice(LOOK_ALIKES))
    tasks[place] = (*tasks[place][:2], "\n".join(lines).strip())
    text = Shape().reply(tasks)
    result = reading(text)
    got = triples(result)
    assert [t for t in tasks if t in got] == got, text
    assert len(got) == len(tasks) or result.losses


# --- JSON ------------------------------------------------------------------------------------------------------------


def entry(task: Task) -> dict[str, str]:
    return dict(zip(("instruction", "input", "output"), task, strict=True))


def dumped(task: Task, **how: object) -> str:
    return json.dumps(entry(task), ensure_ascii=False, **how)  # type: ignore[arg-type]


JSON_SHAPES = {
    "array": lambda ts: json.dumps([entry(t) for t in ts]),
    "indented array": lambda ts: json.dumps([entry(t) for t in ts], indent=2, ensure_ascii=False),
    "lines": lambda ts: "\n".join(dumped(t) for t in ts),
    "blank lines between": lambda ts: "\n\n".join(dumped(t, indent=1) for t in ts),
    "commas between": lambda ts: ",\n".join(dumped(t) for t in ts),
    "wrapped": lambda ts: json.dumps({"tasks": [entry(t) for t in ts]}),
    "fenced": lambda ts: f"```json\n{json.dumps([entry(t) for t in ts], indent=2)}\n```",
    "fenced each": lambda ts: "\n\n".join(f"```json\n{dumped(t)}\n```" for t in ts),
    "chatter around": lambda ts: f"Here they are:\n\n{json.dumps([entry(t) for t in ts])}\n\nAnything else?",
    "numbered": lambda ts: "\n".join(f"{n}. {dumped(t)}" for n, t in enumerate(ts, 1)),
    "headings": lambda ts: "\n\n".join(f"## Task {n}\n{dumped(t)}" for n, t in enumerate(ts, 1)),
    "raw line breaks": lambda ts: "\n".join(dumped(t).replace("\\n", "\n") for t in ts),
    "upper-case keys": lambda ts: "\n".join(dumped(t).replace('"instruction"', '"Instruction"') for t in ts),
    "other words": lambda ts: "\n".join(
        dumped(t)
        .replace('"instruction":', '"instrução":')
        .replace('"input":', '"entrada":')
        .replace('"output":', '"saída":')
        for t in ts
    ),
}


@pytest.mark.parametrize("name", JSON_SHAPES)
def test_every_json_task_is_read_whatever_the_shape(name: str) -> None:
    result = reading(JSON_SHAPES[name](TASKS))
    assert triples(result) == TASKS
    assert not result.losses


@FUZZ
@given(st.lists(st.tuples(TEXT, ANY, ANY), min_size=1, max_size=5), st.sampled_from([*JSON_SHAPES][:8]))
def test_any_text_in_json_is_read_back(tasks: list[Task], name: str) -> None:
    tasks = [(i.strip() or "x", g.strip(), o.strip()) for i, g, o in tasks]
    result = reading(JSON_SHAPES[name](tasks).replace("\r\n", "\n"))
    expected = [(i, g.replace("\r\n", "\n"), o.replace("\r\n", "\n")) for i, g, o in tasks]
    assert [
        (d.instruction, d.input.replace("\r\n", "\n"), d.output.replace("\r\n", "\n")) for d in result.drafts
    ] == expected


@pytest.mark.parametrize(
    ("text", "kept", "reason"),
    [
        ('[{"instruction": "a b", "input": "", "output": "c"}, {"instruction": "d", "inp', 1, "broken JSON"),
        ('{"instruction": "a", "input": ""}', 0, "no output in the JSON object"),
        ('{"instruction": "", "output": "b"}', 0, "no instruction"),
        ('{"instruction": "a", "output": ["b"]}', 0, "the JSON output is no text"),
        ('{"instruction": "a", "output": null}', 0, "the JSON output is no text"),
        ('{"instruction": "a", "input": {"x": 1}, "output": "b"}', 0, "the JSON input is no text"),
        (
            '{"instruction": "a", "output": "b", "instruction": "c", "output": "d"}',
            0,
            "a key stands twice in one JSON object",
        ),
        ('{"instruction": ' * 100_000, 0, "JSON nested too deep"),
    ],
)
def test_each_json_loss_has_a_reason(text: str, kept: int, reason: str) -> None:
    result = reading(text)
    assert len(result.drafts) == kept
    assert [loss.reason for loss in result.losses] == [reason]


def test_one_broken_json_task_costs_no_other() -> None:
    broken = '{"instruction": "Say "hi" now", "input": "", "output": "hi"}'
    for joint in ("\n", ",\n", "\n```\n\n```json\n"):
        text = joint.join([dumped(TASKS[0]), broken, dumped(TASKS[1]), dumped(TASKS[2])])
        result = reading(text)
        assert triples(result) == TASKS[:3], joint
        assert [loss.reason for loss in result.losses] == ["broken JSON"]


def test_a_task_quoted_inside_broken_json_is_no_task() -> None:
    text = '{"instruction": "Show a task.", "input": "", "output": "{"instruction": "a", "output": "b"}"}\n' + dumped(
        TASKS[0]
    )
    result = reading(text)
    assert triples(result) == TASKS[:1]
    assert [loss.reason for loss in result.losses] == ["broken JSON"]


def test_a_number_as_a_json_answer_is_its_text() -> None:
    assert triples(reading('{"instruction": "Add 2 and 2.", "input": null, "output": 4}')) == [
        ("Add 2 and 2.", "", "4")
    ]


def test_json_inside_a_labelled_answer_is_content() -> None:
    tasks = [("Show a JSON task.", "", dumped(TASKS[0])), TASKS[1]]
    assert triples(reading(Shape().reply(tasks))) == tasks


# --- Stanford's rule -------------------------------------------------------------------------------------------------


def stanford(reply: str, *, cut: bool = False, first: int = 4) -> list[Task]:
    """Stanford Alpaca's parser, said again in our words, without its filters."""
    pieces = re.split("###", f"{first}. Instruction:{reply}")
    tasks = []
    for number, piece in enumerate(pieces[:-1] if cut else pieces, start=first):
        parts = re.split(rf"{number}\.\s+(Instruction|Input|Output):", piece)
        if len(parts) == 7:
            given = parts[4].strip()
            tasks.append((parts[2].strip(), "" if given.lower() == "<noinput>" else given, parts[6].strip()))
    return tasks


def clean(text: str) -> str:
    """The text without what Stanford's rule trips over."""
    return re.sub("###|Instruction:|Input:", "", text).strip()


def continued(tasks: Sequence[Task]) -> str:
    return Shape().reply(tasks).removeprefix("4. Instruction:")


@FUZZ
@given(SEED, st.booleans())
def test_clean_stanford_replies_are_read_as_stanford_does(seed: int, cut: bool) -> None:
    rng = random.Random(seed)
    tasks = [
        (clean(instruction), clean(given), clean(output))
        for instruction, given, output in made_tasks(rng, rng.randint(1, 16))
    ]
    text = continued(tasks)
    got = triples(reading(text, prefix="4. Instruction:", finish="length" if cut else "stop"))
    assert got == stanford(text, cut=cut) == (tasks[:-1] if cut else tasks)


@pytest.mark.slow
@pytest.mark.skipif(not CORPUS.exists(), reason="the released 52K is not beside this checkout")
def test_the_52k_in_stanfords_format_is_read_as_stanford_does_but_for_merged_rows() -> None:
    leak = re.compile(r"^\s*\d{1,3}\. (?:Instruction|Input|Output):", re.MULTILINE)
    with gzip.open(CORPUS, "rt", encoding="utf-8") as stream:
        rows = [tuple(json.loads(line).values()) for line in stream]
    clean = split = 0
    for start in range(0, len(rows), 16):
        text = continued(rows[start : start + 16])
        theirs, ours = stanford(text), triples(reading(text, prefix="4. Instruction:"))
        if any(leak.search(field) for row in theirs for field in row):
            split += 1
            assert not any(leak.search(field) for row in ours for field in row)
            assert all(any(mine in row or mine[2] in row[2] for row in theirs) for mine in ours)
        else:
            clean += 1
            assert ours == theirs
    assert (clean, split) == (3223, 28)


# --- edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stanford", "bold", "task headings", "numbers all one", "fenced whole"])
def test_a_cut_reply_loses_its_last_task_whole_as_it_may_look(name: str) -> None:
    tasks = [t for t in TASKS if "```" not in t[2]]
    result = reading(SHAPES[name].reply(tasks), finish="length")
    assert triples(result) == tasks[:-1]
    assert [loss.reason for loss in result.losses] == ["cut at the token limit"]


@pytest.mark.parametrize("name", SHAPES)
def test_one_task_alone_is_read_whatever_the_shape(name: str) -> None:
    shape = replace(SHAPES[name])
    assert triples(reading(shape.reply(TASKS[:1]))) == TASKS[:1]


@pytest.mark.parametrize("name", ["stanford", "bold", "no numbers", "headings as labels", "full-width colon"])
def test_a_reply_cut_anywhere_gives_only_whole_tasks(name: str) -> None:
    text = SHAPES[name].reply(TASKS)
    for end in range(len(text)):
        got = triples(reading(text[:end], finish="length"))
        assert got == TASKS[: len(got)], text[:end]


def test_a_leaked_task_is_read_apart_or_both_are_lost() -> None:
    for leak in ("##\n6. ", "#\n6. ", "///\n6. ", "\n\n6. ", "6. "):
        inner = leak + "Instruction: B\n6. Input:\n<noinput>\n6. Output:\nb"
        tasks = [("A task", "", "a"), ("C task", "", f"c\n{inner}"), ("D task", "", "d"), ("E task", "", "e")]
        got = triples(reading(Shape().reply(tasks)))
        assert set(got) <= {
            ("A task", "", "a"),
            ("C task", "", "c"),
            ("B", "", "b"),
            ("D task", "", "d"),
            ("E task", "", "e"),
        }
        assert ("A task", "", "a") in got


@pytest.mark.parametrize(
    ("text", "reason"), [("", "empty reply"), (" \n", "empty reply"), ("I cannot help.", "no task in the reply")]
)
def test_a_reply_without_tasks_has_a_reason(text: str, reason: str) -> None:
    result = reading(text)
    assert not result.drafts
    assert [(loss.request_no, loss.reason) for loss in result.losses] == [(7, reason)]


def test_drafts_and_losses_carry_their_place_in_the_reply() -> None:
    text = Shape().reply(TASKS).replace("5. Output:", "5. Something:")
    result = reading(text)
    assert [d.item_no for d in result.drafts] == [0, 2, 3, 4, 5]
    assert [(loss.item_no, loss.reason) for loss in result.losses] == [(1, "no output label")]


def test_windows_line_ends_are_read_as_line_ends() -> None:
    assert triples(reading(Shape().reply(TASKS).replace("\n", "\r\n"))) == TASKS


def test_half_characters_are_replaced_and_text_can_be_stored() -> None:
    result = reading(Shape().reply([("Say \ud800 it", "", "a\udfff")]))
    assert triples(result) == [("Say \ufffd it", "", "a\ufffd")]
    assert triples(reading('{"instruction": "Say \\ud800", "output": "b"}')) == [("Say \ufffd", "", "b")]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(
        st.one_of(
            st.text(),
            st.sampled_from(
                [
                    "1. Instruction:",
                    "\n",
                    "Input:",
                    "**Output:**",
                    "###",
                    "```",
                    '{"instruction":',
                    "}",
                    "Task 3",
                    "---",
                ]
            ),
        )
    ).map("".join)
)
@example("Instruction")
@example("### Task 1\n{}")
def test_any_text_is_read_without_an_exception_and_with_a_reason(text: str) -> None:
    for finish in ("stop", "length"):
        result = reading(text, finish=finish)
        assert result.drafts or result.losses
        assert all(d.instruction.strip() == d.instruction != "" for d in result.drafts)


HOSTILE = [
    "{",
    "[",
    "-",
    "*",
    "#",
    "1",
    "\n",
    "`",
    "\x00",
    "\ud800",
    "> ",
    "- ",
    "** ",
    "###\n",
    "```\n",
    "1. Instruction:",
    "1. Instruction:\n",
    "Output:\n",
    '{"instruction": "',
    '{"instruction":',
    "Task 1\n",
    "1. Instruction: a\n1. Output: b\n",
]


def timed(text: str) -> float:
    start = time.process_time()
    reading(text)
    return time.process_time() - start


@pytest.mark.parametrize(
    "unit",
    ["]" + "1" * 198 + "x{", "]" + "# " * 99 + "{", ", a 1" * 30 + "{", "]```{", "{", ']{"a":', "]\n" * 90 + "{"],
)
def test_hostile_text_inside_a_broken_object_is_read_in_linear_time(unit: str) -> None:
    begun = '{"instruction": "Explain tides.", "output": "half a "text"}\n'
    assert timed(begun + (unit * 400_000)[:400_000]) < 4
    assert reading(begun + (unit * 400_000)[:400_000]).losses[0].reason == "broken JSON"


@pytest.mark.parametrize("unit", HOSTILE)
def test_hostile_text_is_read_in_linear_time(unit: str) -> None:
    assert timed((unit * 100_000)[:100_000]) < 1.5


@pytest.mark.slow
@pytest.mark.parametrize("unit", HOSTILE)
def test_a_megabyte_of_hostile_text_is_read_within_five_seconds(unit: str) -> None:
    assert timed((unit * 1_000_000)[:1_000_000]) < 5
