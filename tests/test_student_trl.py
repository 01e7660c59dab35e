# ruff: noqa: E402 - the packages are looked for first
"""``finetune --backend trl``: the losses of the native backend on the same batches, the same files, resumed, silent."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the student needs the train extra")
pytest.importorskip("transformers", reason="the student needs the train extra")

from student_tiny import other_model, tiny_model, tiny_tokenizer, write_rows
from test_student_survival import files_limited_to

from selfinstruct.errors import DamagedFile, IdentityError, MissingPackage, OutputError, UsageError
from selfinstruct.student.examples import read
from selfinstruct.student.models.merge import merge
from selfinstruct.student.models.weights import load
from selfinstruct.student.prompt import ALPACA, load_template
from selfinstruct.student.train import finetune as native
from selfinstruct.student.train import trl_backend
from selfinstruct.student.train.ledger import Outcome
from selfinstruct.student.train.meter import Progress
from selfinstruct.student.train.recipes import Recipe, Runtime
from selfinstruct.student.train.tokens import tokenise

# The libraries below warn of names that they rename among themselves.
pytestmark = pytest.mark.filterwarnings("default")
# 40 rows in steps of 8: micro-batches of 4 (1,024 tokens of at most 256), epochs of 5 steps.
RECIPE = Recipe("test", batch=8, lr=3e-3, epochs=2, max_length=256, warmup=2, weight_decay=0.1, hold_out=4)
CPU = Runtime(device="cpu", tokens=1024)
with_trl = pytest.mark.skipif(
    trl_backend.importlib.util.find_spec("trl") is None, reason="needs trl: pip install 'selfinstruct[trl]'"
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 46)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


def train(rows: Path, model: Path, run: Path, recipe: Recipe = RECIPE, runtime: Runtime = CPU) -> Outcome:
    return trl_backend.finetune(str(rows), str(model), run, recipe, runtime)


@with_trl
@pytest.mark.parametrize("method", ["full", "lora"])
def test_losses_equal_those_of_the_native_backend(rows: Path, model: Path, tmp_path: Path, method: str) -> None:
    chosen = replace(RECIPE, method=method, lora_rank=4)
    ours = native.finetune(str(rows), str(model), tmp_path / "native", chosen, CPU)
    theirs = train(rows, model, tmp_path / "trl", chosen)
    assert theirs.steps == ours.steps == 12  # the last step of each epoch has 2 rows
    assert theirs.losses == pytest.approx(ours.losses, rel=1e-4)
    assert theirs.losses[:3] == pytest.approx(ours.losses[:3], rel=1e-6)
    assert dict(theirs.evaluations) == pytest.approx(dict(ours.evaluations), rel=1e-5)
    for field in ("step", "lr", "grad_norm", "tokens"):
        logged = [[line.get(field, 0.0) for line in log(tmp_path / name)] for name in ("native", "trl")]
        assert logged[1] == pytest.approx(logged[0], rel=1e-4), field


@with_trl
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_that_was_stopped_ends_as_the_unbroken_one(rows: Path, model: Path, tmp_path: Path, method: str) -> None:
    chosen = replace(RECIPE, method=method, lora_dropout=0.1, lora_rank=4)
    whole = train(rows, model, tmp_path / "whole", chosen)
    first = train(rows, model, tmp_path / "broken", chosen, replace(CPU, max_steps=8))
    assert (first.end, first.step, first.folder) == ("limit", 8, None)
    assert [path.name for path in (tmp_path / "broken").glob("checkpoint-*")] == ["checkpoint-8"]
    assert not list((tmp_path / "broken").glob("*/*.bin"))
    # What a kill left half written is passed over.
    (tmp_path / "broken" / "checkpoint-9").mkdir()
    second = train(rows, model, tmp_path / "broken", chosen)
    assert (second.end, len(second.losses)) == ("done", 4)
    assert [*first.losses, *second.losses] == pytest.approx(list(whole.losses), rel=1e-6)
    assert second.evaluations[-1] == pytest.approx(whole.evaluations[-1], rel=1e-6)
    assert [line.get("tokens") for line in log(tmp_path / "broken")] == [
        line.get("tokens") for line in log(tmp_path / "whole")
    ]
    assert not list((tmp_path / "broken").glob("checkpoint-*"))
    again = train(rows, model, tmp_path / "broken", chosen)
    assert (again.end, again.losses, again.folder) == ("done", (), second.folder)


@with_trl
def test_the_run_is_one_that_the_other_commands_take(rows: Path, model: Path, tmp_path: Path) -> None:
    outcome = train(rows, model, tmp_path / "run", replace(RECIPE, method="lora", epochs=0.5, lora_rank=4))
    folder = outcome.folder
    assert folder == tmp_path / "run" / "adapter"
    assert load_template(folder) == ALPACA
    about = json.loads((folder / "selfinstruct_run.json").read_text())
    assert (about["numerics"]["backend"], about["data"]["rows"]) == ("trl", 42)
    assert not [path for path in (tmp_path / "run").rglob("*") if path.suffix in (".bin", ".pt", ".pth")]
    merged = load(str(merge(str(tmp_path / "run"), tmp_path / "merged", dtype="fp32")))
    adapted = load(str(tmp_path / "run"))
    ids = torch.tensor([ALPACA.encode_prompt(merged.tokenizer, "count stars")])
    torch.testing.assert_close(merged.model(ids).logits, adapted.model(ids).logits, rtol=1e-4, atol=1e-4)


@with_trl
def test_trl_is_given_the_ids_and_labels_of_every_row_as_they_are(rows: Path) -> None:
    from selfinstruct.student.train.trl_trainer import Padded, as_dataset, micro_rows

    tokens = tokenise(read(str(rows)).train, ALPACA, tiny_tokenizer(), max_length=RECIPE.max_length)
    made = as_dataset(tokens)
    assert [row["input_ids"] for row in made] == [tokens.row(i).tolist() for i in range(len(tokens))]
    for i, row in enumerate(made):
        first = int(tokens.loss_from[i])
        assert row["labels"] == [-100] * first + row["input_ids"][first:]
    batch = Padded(7)([{"input_ids": [3, 4], "labels": [-100, 4]}, {"input_ids": [5], "labels": [5]}])
    assert batch["input_ids"].tolist() == [[3, 4], [5, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [[-100, 4], [5, -100]]
    assert [micro_rows(128, 4096, longest) for longest in (512, 300, 9000)] == [8, 8, 1]


@with_trl
def test_a_run_is_not_gone_on_with_by_the_other_backend(rows: Path, model: Path, tmp_path: Path) -> None:
    train(rows, model, tmp_path / "run", RECIPE, replace(CPU, max_steps=1))
    with pytest.raises(IdentityError, match=r"numerics\.backend"):
        native.finetune(str(rows), str(model), tmp_path / "run", RECIPE, CPU)


@with_trl
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(rows: Path, model: Path, tmp_path: Path) -> None:
    def interrupted(progress: Progress) -> None:
        if progress.step == 2:
            signal.raise_signal(signal.SIGTERM)

    ended = trl_backend.finetune(str(rows), str(model), tmp_path / "run", RECIPE, CPU, on_progress=interrupted)
    assert (ended.end, ended.step, ended.signal) == ("signal", 3, signal.SIGTERM)
    assert trl_backend.newest(tmp_path / "run") == tmp_path / "run" / "checkpoint-3"


@with_trl
def test_a_damaged_checkpoint_is_told(rows: Path, model: Path, tmp_path: Path) -> None:
    train(rows, model, tmp_path / "run", RECIPE, replace(CPU, max_steps=1))
    file = tmp_path / "run" / "checkpoint-1" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DamagedFile, match="checkpoint-1: cannot be read"):
        train(rows, model, tmp_path / "run")


@with_trl
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
def test_a_checkpoint_that_lacks_a_file_is_not_gone_on_from(rows: Path, model: Path, tmp_path: Path, name: str) -> None:
    train(rows, model, tmp_path / "run", RECIPE, replace(CPU, max_steps=1))
    (tmp_path / "run" / "checkpoint-1" / name).unlink()
    with pytest.raises(DamagedFile, match=name) as caught:
        train(rows, model, tmp_path / "run")
    assert "rm -r" in caught.value.hint


@with_trl
def test_a_disk_that_is_full_in_the_middle_of_a_checkpoint_is_told(rows: Path, model: Path, tmp_path: Path) -> None:
    weights = (model / "model.safetensors").stat().st_size
    # The weights fit, and Adam's moments, twice their size, do not.
    with files_limited_to(weights * 3 // 2), pytest.raises(OutputError, match="run: cannot be written"):
        train(rows, model, tmp_path / "run", RECIPE, replace(CPU, max_steps=1))


@with_trl
def test_what_trl_refuses_is_an_error_of_ours(
    rows: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(*_arguments: Any, **_options: Any) -> Any:
        raise ValueError("Your setup doesn't support this.")

    monkeypatch.setattr("selfinstruct.student.train.trl_trainer.SFTConfig", refusing)
    monkeypatch.setattr("selfinstruct.student.train.trl_trainer.settings", refusing)
    with pytest.raises(UsageError, match=r"TRL refuses this run \(Your setup") as caught:
        train(rows, model, tmp_path / "run")
    assert "--backend native" in caught.value.hint


@with_trl
@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "mixtral"])
def test_models_that_the_native_loss_does_not_suit_train_on_a_cpu(rows: Path, tmp_path: Path, kind: str) -> None:
    other = other_model(tmp_path / kind, kind)
    with pytest.raises(UsageError, match="not supported by fine-tuning") as caught:
        native.finetune(str(rows), str(other), tmp_path / "run", RECIPE, CPU)
    assert "--backend trl" in caught.value.hint
    outcome = train(rows, other, tmp_path / "trl", replace(RECIPE, epochs=1))
    assert outcome.end == "done"
    assert outcome.losses[-1] < outcome.losses[0]


@with_trl
def test_a_diverged_run_stops_with_the_remedy(rows: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="diverged"):
        train(rows, model, tmp_path / "run", replace(RECIPE, lr=1e30, warmup=0, max_norm=0.0))


@with_trl
@pytest.mark.parametrize(
    ("changes", "said"), [({"attention": "flash"}, "no --attention flash"), ({"adam_state": "8bit"}, "no --adam-state")]
)
def test_what_trl_cannot_do_is_refused(
    rows: Path, model: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        train(rows, model, tmp_path / "run", RECIPE, replace(CPU, **changes))


@with_trl
def test_several_processes_are_refused(
    rows: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="one process, not in 2"):
        train(rows, model, tmp_path / "run")


def test_a_missing_package_is_named_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "trl" else object())
    with pytest.raises(MissingPackage, match="needs trl") as caught:
        trl_backend.require()
    assert caught.value.hint == "pip install 'selfinstruct[trl]'"


def test_a_backend_that_is_not_there_is_told_with_those_that_are(
    run: Any, rows: Path, model: Path, tmp_path: Path
) -> None:
    ended = run("finetune", rows, "--model", model, "-o", tmp_path / "run", "--backend", "best")
    assert ended.returncode == 2
    assert "no backend 'best'" in ended.stderr
    assert "known: native, trl" in ended.stderr
    assert not (tmp_path / "run").exists()


_WATCHED = """
import sys
def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        print("network:", event, arguments[1:3] if event == "socket.connect" else arguments[:2], file=sys.stderr)
sys.addaudithook(hook)
from selfinstruct.cli.main import run
run()
"""


@with_trl
def test_the_command_prints_the_outcome_alone_and_tells_nobody(
    rows: Path, model: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    outside = {name: value for name, value in environment.items() if name not in ("CI", "HF_HUB_OFFLINE")}
    arguments = [str(rows), "--model", str(model), "-o", str(tmp_path / "run"), "--batch", "8", "--device", "cpu"]
    ended = subprocess.run(
        [sys.executable, "-c", _WATCHED, "finetune", *arguments, "--backend", "trl", "--max-steps", "1", "--json"],
        env={**outside, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    assert ended.returncode == 4, ended.stderr
    found = json.loads(ended.stdout)
    assert (found["end"], found["step"], found["steps"]) == ("limit", 1, 18)
    assert "the same command resumes it" in ended.stderr
    assert "network:" not in ended.stderr


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
