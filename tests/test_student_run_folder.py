# ruff: noqa: E402 - the packages are looked for first
"""Whose folder a run writes into, what it goes on from, and what it says of a disk that takes nothing."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the student needs the train extra")
pytest.importorskip("transformers", reason="the student needs the train extra")

from student_tiny import tiny_model, write_rows

from selfinstruct.errors import DamagedFile, IdentityError, OutputError, UsageError
from selfinstruct.student.examples import read
from selfinstruct.student.train import finetune
from selfinstruct.student.train.assembly import announce
from selfinstruct.student.train.ledger import Outcome
from selfinstruct.student.train.parallel import Group
from selfinstruct.student.train.prepare import prepare
from selfinstruct.student.train.recipes import Recipe, Runtime

pytestmark = pytest.mark.filterwarnings("default")
RECIPE = Recipe("test", batch=8, lr=3e-3, epochs=1, max_length=256, warmup=2)
CPU = Runtime(device="cpu")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 24)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny", tie_word_embeddings=True)


def train(rows: Path, model: Path, run: Path, recipe: Recipe = RECIPE, **how: Any) -> Outcome:
    said: Callable[[str], None] = how.pop("say", lambda _line: None)
    return finetune.finetune(str(rows), str(model), run, recipe, replace(CPU, **how), say=said)


def everything(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("foreign", ["model", "adapter", "checkpoint-best", "log.jsonl", "result.json"])
def test_a_folder_with_things_of_others_is_refused_and_left_as_it_was(
    rows: Path, model: Path, tmp_path: Path, foreign: str
) -> None:
    place = tmp_path / foreign
    place.write_text("{}\n") if place.suffix else shutil.copytree(model, place)
    before = everything(tmp_path)
    with pytest.raises(UsageError, match=f"holds {foreign} and no run.json") as caught:
        train(rows, model, tmp_path)
    assert "-o" in caught.value.hint
    assert everything(tmp_path) == before


def test_the_folder_of_the_model_itself_is_refused(rows: Path, model: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(model, own)
    before = everything(own)
    with pytest.raises(UsageError, match="is a model's own folder"):
        train(rows, own, own)
    assert everything(own) == before


def test_what_others_put_into_a_run_outlives_its_end(rows: Path, model: Path, tmp_path: Path) -> None:
    train(rows, model, tmp_path / "run", max_steps=1)
    for name in ("checkpoint-best", "checkpoint-500", ".checkpoint-mine.tmp"):
        (tmp_path / "run" / name).mkdir()
    assert train(rows, model, tmp_path / "run").end == "done"
    left = sorted(path.name for path in (tmp_path / "run").glob("*checkpoint-*"))
    assert left == [".checkpoint-mine.tmp", "checkpoint-500", "checkpoint-best"]


def test_a_checkpoint_without_its_last_file_is_told_and_replaced(rows: Path, model: Path, tmp_path: Path) -> None:
    run, said = tmp_path / "run", []
    whole = train(rows, model, tmp_path / "whole")
    train(rows, model, run, max_steps=1)
    (run / "checkpoint-00000001" / "state.json").unlink()
    again = train(rows, model, run, max_steps=1, say=said.append)
    assert any("checkpoint-00000001: has no state.json" in line for line in said)
    assert (run / "checkpoint-00000001" / "state.json").exists()
    assert (*again.losses, *train(rows, model, run).losses) == pytest.approx(whole.losses, rel=1e-6)


def test_a_checkpoint_without_the_manifest_is_not_resumed(rows: Path, model: Path, tmp_path: Path) -> None:
    train(rows, model, tmp_path / "run", max_steps=1)
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(UsageError, match=r"checkpoint-00000001, log.jsonl and no run.json"):
        train(rows, model, tmp_path / "run")


@pytest.mark.parametrize("changes", [{"updates": None}, {"step": 2}, {"world": "two"}, {"tokens": [1]}])
def test_a_position_that_makes_no_sense_is_a_damaged_file(
    rows: Path, model: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    train(rows, model, tmp_path / "run", max_steps=1)
    file = tmp_path / "run" / "checkpoint-00000001" / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(DamagedFile, match="checkpoint-00000001: cannot be read") as caught:
        train(rows, model, tmp_path / "run")
    assert "rm -r" in caught.value.hint


@pytest.mark.parametrize("text", ["{}", '{"evaluations": 5, "folder": "model"}', "[1]", "", '{"folder": "../x"}'])
def test_a_result_that_makes_no_sense_is_a_damaged_file(rows: Path, model: Path, tmp_path: Path, text: str) -> None:
    train(rows, model, tmp_path / "run", max_steps=1)
    (tmp_path / "run" / "result.json").write_text(text)
    with pytest.raises(DamagedFile, match=r"result.json: cannot be read") as caught:
        train(rows, model, tmp_path / "run")
    assert "rm " in caught.value.hint


def test_a_finished_run_without_its_model_is_not_called_done(rows: Path, model: Path, tmp_path: Path) -> None:
    ended = train(rows, model, tmp_path / "run")
    again = train(rows, model, tmp_path / "run")
    assert (again.end, again.losses, again.loss) == ("done", (), ended.losses[-1])
    shutil.rmtree(tmp_path / "run" / "model")
    with pytest.raises(DamagedFile, match="this run is done, and its model is gone"):
        train(rows, model, tmp_path / "run")


def test_a_tokenizer_with_more_words_than_the_model_is_told_with_a_row(rows: Path, tmp_path: Path) -> None:
    small = tiny_model(tmp_path / "small", vocab_size=60)
    with pytest.raises(UsageError, match=r"row 0 of the train rows \('.*' \.\.\.\) has the token \d+") as caught:
        train(rows, small, tmp_path / "run")
    assert "ends at 59" in caught.value.message
    assert not (tmp_path / "run").exists()


def test_rows_of_another_shape_are_told_with_their_columns(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    with pytest.raises(UsageError, match=r"has no text 'instruction' \(its columns: 'question', 'answer'\)"):
        read(str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize(
    ("value", "taken"), [("null", True), ('""', True), ("0", False), ("false", False), ("[]", False)]
)
def test_only_null_and_an_empty_text_are_no_input(tmp_path: Path, value: str, taken: bool) -> None:
    (tmp_path / "rows.jsonl").write_text(f'{{"instruction": "i", "input": {value}, "output": "o"}}\n')
    if taken:
        assert read(str(tmp_path / "rows.jsonl")).train[0].input == ""
    else:
        with pytest.raises(UsageError, match="has an 'input' that is no text"):
            read(str(tmp_path / "rows.jsonl"))


def test_a_log_that_the_disk_has_no_room_for_ends_the_run_with_its_name(
    rows: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(progress: Any) -> None:
        (tmp_path / "run" / "log.jsonl").unlink()
        (tmp_path / "run" / "log.jsonl").symlink_to("/dev/full")

    with pytest.raises(OutputError, match=r"run/log.jsonl: cannot be written \(No space left on device\)") as caught:
        finetune.finetune(str(rows), str(model), tmp_path / "run", RECIPE, CPU, on_progress=full)
    assert "free disk space" in caught.value.hint


def test_the_command_says_which_file_a_full_disk_refused(rows: Path, model: Path, tmp_path: Path) -> None:
    arguments = [str(rows), "--model", str(model), "-o", str(tmp_path / "run"), "--device", "cpu", "--json"]
    ended = subprocess.run(
        [sys.executable, "-c", "from selfinstruct.cli.main import run; run()", "finetune", *arguments],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500)),
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    said = f"{tmp_path / 'run' / 'run.json'}: cannot be written (File too large)"
    assert (ended.returncode, f"error: {said}" in ended.stderr) == (3, True), ended.stderr
    assert json.loads(ended.stdout)["error"] == said


def test_a_disk_that_is_full_at_the_end_costs_the_result_alone(
    rows: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = finetune.result.save_model

    def then_full(*arguments: Any, **options: Any) -> Any:
        folder = write(*arguments, **options)
        (tmp_path / "run" / ".result.json.tmp").mkdir()
        return folder

    monkeypatch.setattr("selfinstruct.student.train.result.save_model", then_full)
    with pytest.raises(OutputError, match=r"result\.json: cannot be written"):
        train(rows, model, tmp_path / "run", save_every=1)
    monkeypatch.undo()
    (tmp_path / "run" / ".result.json.tmp").rmdir()
    assert train(rows, model, tmp_path / "run").end == "done"


def test_small_moments_beside_fp32_weights_are_refused(rows: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--adam-state 8bit needs weights in bf16") as caught:
        train(rows, model, tmp_path / "run", adam_state="8bit")
    assert "--dtype bf16" in caught.value.hint
    assert not (tmp_path / "run").exists()


def test_a_run_that_began_when_they_were_not_refused_goes_on(rows: Path, model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(rows, model, run, max_steps=1)
    manifest = json.loads((run / "run.json").read_text())
    assert manifest["numerics"] == {"dtype": "float32", "adam_state": "fp32"}
    manifest["numerics"]["adam_state"] = "8bit"
    (run / "run.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="--adam-state bf16 needs"):
        train(rows, model, run, adam_state="bf16")
    assert train(rows, model, run, max_steps=1, adam_state="8bit").step == 2
    assert train(rows, model, run).end == "done"
    with pytest.raises(IdentityError, match=r"numerics.dtype: was .float32., is .bfloat16."):
        train(rows, model, run, dtype="bf16", adam_state="8bit")


def test_validation_rows_that_are_cut_or_left_out_are_counted(model: Path, tmp_path: Path) -> None:
    long = {"instruction": "count " * 60, "output": "no"}
    cut = {"instruction": "count", "output": "stars " * 60}
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in [*[cut] * 8, *[long] * 8]))
    chosen, said = replace(RECIPE, hold_out=8), []
    prepared = prepare(str(rows), str(model), chosen, CPU, Group(), tmp_path / "run")
    announce(prepared, said.append)
    kept = prepared.validation
    assert kept is not None
    assert 0 < len(kept) < 8
    assert f"{len(kept)} of them cut, {8 - len(kept)} left out" in " ".join(said)


def test_without_a_validation_row_left_there_is_no_validation_loss(model: Path, tmp_path: Path) -> None:
    rows, said = write_rows(tmp_path / "rows.jsonl", 16), []
    prepared = prepare(str(rows), str(model), replace(RECIPE, hold_out=4), CPU, Group(), tmp_path / "run")
    held = {row.instruction for row in prepared.source.train}
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    import numpy as np

    for number in np.random.default_rng(RECIPE.seed).permutation(16)[:4]:
        lines[number]["instruction"] = "count " * 60
    assert held
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ended = train(rows, model, tmp_path / "run", replace(RECIPE, hold_out=4), say=said.append)
    assert (ended.end, ended.evaluations) == ("done", ())
    assert "no validation loss: the prompts of all 4 rows fill 256 tokens (held out, seed 42)" in said


def test_a_diverged_run_is_begun_anew_elsewhere(rows: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="diverged") as caught:
        train(rows, model, tmp_path / "run", replace(RECIPE, lr=1e30, warmup=0, max_norm=0.0))
    assert "another folder (-o)" in caught.value.hint
