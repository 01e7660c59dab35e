# ruff: noqa: E402 - the packages are looked for first
"""What a run leaves on the disk, whatever ends it; and what it does beside another one."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the student needs the train extra")
pytest.importorskip("transformers", reason="the student needs the train extra")

import numpy as np
from student_tiny import tiny_model, write_rows

from selfinstruct.errors import OutputError, RunLocked
from selfinstruct.student.lock import held
from selfinstruct.student.models.merge import merge
from selfinstruct.student.train import attention, batches, finetune
from selfinstruct.student.train.ledger import Outcome
from selfinstruct.student.train.optimizer import AdamSettings, SplitAdamW
from selfinstruct.student.train.recipes import Recipe, Runtime
from selfinstruct.student.train.tokens import from_rows
from selfinstruct.student.train.trainee import Trainee, load_model
from selfinstruct.student.train.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("default")
RECIPE = Recipe("test", batch=8, lr=3e-3, epochs=1, max_length=256, warmup=2)
CPU = Runtime(device="cpu")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 24)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny", tie_word_embeddings=True)


def train(rows: Path, model: Path, run: Path, **how: Any) -> Outcome:
    return finetune.finetune(str(rows), str(model), run, RECIPE, replace(CPU, **how))


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Writes beyond ``size`` bytes of a file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_log_that_was_cut_off_in_a_line_does_not_stop_the_run(rows: Path, model: Path, tmp_path: Path) -> None:
    train(rows, model, tmp_path / "run", max_steps=1)
    with (tmp_path / "run" / "log.jsonl").open("a") as log:
        log.write('{"step": 2, "lo')
    assert train(rows, model, tmp_path / "run").end == "done"
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "loss" in line] == [1, 2, 3]


def test_what_a_killed_save_left_is_removed(rows: Path, model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(rows, model, run, max_steps=1)
    shutil.copytree(run / "checkpoint-00000001", run / ".checkpoint-00000007.tmp")
    train(rows, model, run, max_steps=1)
    assert sorted(path.name for path in run.glob("*checkpoint*")) == ["checkpoint-00000002"]
    (run / ".checkpoint-00000007.tmp").mkdir()
    train(rows, model, run)
    assert not list(run.glob("*checkpoint*"))


def test_a_full_disk_is_told_and_costs_nothing_but_the_save(rows: Path, model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(rows, model, run, max_steps=1)
    with files_limited_to(100_000), pytest.raises(OutputError, match="checkpoint-00000002: cannot be written"):
        train(rows, model, run, max_steps=1)
    with files_limited_to(100_000), pytest.raises(OutputError, match="model: cannot be written"):
        train(rows, model, run)
    assert train(rows, model, run).end == "done"
    with files_limited_to(100_000), pytest.raises(OutputError, match="merged: cannot be written"):
        merge(str(run), tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_second_process_on_a_run_is_turned_away(rows: Path, model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with held(run, run / finetune.LOCK_FILE), pytest.raises(RunLocked, match="another process"):
        train(rows, model, run)
    assert train(rows, model, run).end == "done"


def test_a_tuned_model_generates_with_its_cache(rows: Path, model: Path, tmp_path: Path) -> None:
    train(rows, model, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["use_cache"] is True


def test_validation_rows_may_be_longer_than_any_that_is_trained_on(model: Path) -> None:
    rng = np.random.default_rng(0)
    short, long = ([[1, *rng.integers(3, 320, size), 2] for size in sizes] for sizes in ((9, 12), (90, 150, 40)))
    sdpa = attention.Choice("sdpa", "asked for")
    trainee = Trainee(load_model(str(model), dtype=torch.float32, kernel=sdpa, device=torch.device("cpu")))
    tokens, others = (from_rows(part, [1] * len(part), eos=2, max_length=200) for part in (short, long))
    optimizer = SplitAdamW(trainee.named_trained(), AdamSettings())
    trainer = Trainer(trainee, optimizer, tokens, RECIPE, steps=1, budget=64)
    seen = [batch.longest for batch in trainer.micro_batches([0, 1, 2], others)]
    assert min(seen) >= 152  # the kernels read no row beyond what they are told is the longest
    with torch.no_grad():
        alone = trainee(batches.join(others, [0, 1, 2], longest=192), int(others.labels.sum()))
    assert trainer.evaluate(others) == pytest.approx(float(alone), rel=1e-5)
