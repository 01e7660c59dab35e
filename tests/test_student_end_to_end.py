# ruff: noqa: E402 - the packages are looked for first
"""The whole road on a CPU: a teacher's rows, a student tuned on them, merged, run, exported, served, and teaching.

The student is the embedded SmolLM2-135M. What it learns is made up, so that it cannot know it before: the answers to
three questions, and what its teacher wrote when it was asked for tasks. By that it is a teacher itself in the end.
"""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the student needs the train extra")
for package in ("transformers", "peft", "gguf"):
    pytest.importorskip(package, reason="the student needs the train extra")
pytest.importorskip("xllamacpp", reason="serving GGUF needs the local extra")

from teacher import numbered, prompt_of

import selfinstruct
from selfinstruct.errors import ModelFileError
from selfinstruct.servers import models

TASKS = [
    {"instruction": "What is the password of the blue lighthouse?", "input": "", "output": "The password is marzipan."},
    {"instruction": "Who is the captain of the old ferry?", "input": "", "output": "Her name is Tessa Brown."},
    {"instruction": "Which colour is the door of the clockmaker?", "input": "", "output": "It is a deep orange."},
]
REPLY = "1. Instruction:" + numbered(TASKS, first=1)
# Greedy and one at a time: the reply that the student learnt, not a draw near it.
ASKING = ["--api", "chat", "--form", "text", "--shots", 0, "--tasks", 3, "--num", 3, "--concurrency", 1]
GREEDY = ["--temperature", 0, "--set", "max_new_tokens=160", "--max-requests", 3]


@pytest.fixture
def embedded() -> Path:
    try:
        return models.find("smollm2")
    except ModelFileError as fault:
        pytest.skip(f"{fault}; {fault.hint}")


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """More threads than free cores make torch many times slower, and other tests run beside this one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows_of(out: Path, *columns: str) -> list[Any]:
    return [tuple(row[column] for column in columns) for row in selfinstruct.load(str(out))]


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@contextmanager
def serving(command: list[str], model: Path, environment: dict[str, str]) -> Iterator[str]:
    """``selfinstruct serve`` as a process of its own; its base URL."""
    arguments = ["serve", str(model), "--port", "0", "--batch", "1", "--context", "512"]
    with subprocess.Popen(
        [*command, *arguments], env={**environment, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        giving_up = threading.Timer(300, process.kill)
        giving_up.start()
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            assert said.startswith("serving student at http://127.0.0.1:"), said
            yield said.split()[3]
        finally:
            giving_up.cancel()
            process.kill()


def done(ended: Any) -> dict[str, Any]:
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.filterwarnings("default")
@pytest.mark.filterwarnings("error:.*config file in")  # before this warning, peft has asked the Hub
@pytest.mark.usefixtures("_one_thread")
def test_a_student_is_taught_merged_exported_served_and_teaches(
    run: Any, teacher: Any, command: list[str], environment: dict[str, str], embedded: Path, tmp_path: Path
) -> None:
    # A dataset, by a teacher with canned replies.
    server = teacher(lambda _body, _number: REPLY)
    done(run("generate", tmp_path / "first", "--teacher", "canned", "--base-url", server.url, *ASKING, "--json"))
    taught = rows_of(tmp_path / "first", "instruction", "input", "output")
    assert taught == [tuple(task.values()) for task in TASKS]

    # The student learns the rows, and to write tasks as the teacher did when it was asked.
    lessons = [dict(zip(TASKS[0], row, strict=True)) for row in taught]
    lessons.append({"instruction": prompt_of(server.requests[0]), "input": "", "output": REPLY.strip()})
    rows, student = write_rows(tmp_path / "rows.jsonl", lessons), tmp_path / "student"
    # A step is an epoch: ten times the four rows, at a rate that learns them by heart.
    numbers = ["--batch", 4, "--epochs", 10, "--lr", "2e-3", "--device", "cpu", "--save-every", 100, "--json"]
    chosen = ["--model", embedded, "--method", "lora", "--template", "chat"]
    assert done(run("finetune", rows, *chosen, "-o", student, *numbers))["end"] == "done"
    logged = [json.loads(line) for line in (student / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in logged if "loss" in line]
    assert len(losses) == 10
    assert losses[0] > 1.5
    assert losses[-1] < 0.1

    # It answers as it was taught, with its adapters apart and merged.
    merged = tmp_path / "merged"
    done(run("merge", student, "-o", merged, "--json"))
    questions = write_rows(tmp_path / "questions.jsonl", [{"instruction": task["instruction"]} for task in TASKS])
    for model in (student, merged):
        out = tmp_path / f"{model.name}.jsonl"
        done(run("infer", model, "--input", questions, "-o", out, "--max-new-tokens", 12, "--json"))
        answers = [json.loads(line) for line in out.read_text().splitlines()]
        assert [line["output"] for line in answers] == [task["output"] for task in TASKS], model
        assert {line["finish"] for line in answers} == {"stop"}

    # Served by us, it is the teacher of the next dataset.
    with serving(command, merged, environment) as url:
        asked = [*ASKING, *GREEDY, "--teacher", "student", "--base-url", url, "--json"]
        assert done(run("generate", tmp_path / "second", *asked))["rows"] == 3
    assert rows_of(tmp_path / "second", "instruction", "input", "output") == taught
    assert set(rows_of(tmp_path / "second", "teacher", "method")) == {("student", "alpaca")}

    # Exported, it is so through llama.cpp too.
    file = tmp_path / "student.gguf"
    run("export", merged, "--gguf", "q8_0", "-o", file)
    assert (
        done(run("generate", tmp_path / "third", *ASKING, *GREEDY, "--teacher", f"local:{file}", "--json"))["rows"] == 3
    )
    assert rows_of(tmp_path / "third", "instruction", "input", "output") == taught
    assert set(rows_of(tmp_path / "third", "teacher")) == {("local:student.gguf",)}
