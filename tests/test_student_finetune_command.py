# ruff: noqa: E402 - the packages are looked for first
"""``selfinstruct finetune``: what it prints, where it stops, how it exits."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the student needs the train extra")
pytest.importorskip("transformers", reason="the student needs the train extra")

import typer
from student_tiny import make_rows, other_model, tiny_model, write_rows
from typer.testing import CliRunner, Result

from selfinstruct.cli import finetune as command
from selfinstruct.dataset import store
from selfinstruct.errors import UsageError
from selfinstruct.student.examples import read
from selfinstruct.student.train.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("default")
app = typer.Typer()
app.callback()(lambda: None)
command.register(app)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("made")
    return str(write_rows(folder / "rows.jsonl", 20)), str(tiny_model(folder / "model"))


def finetune(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["finetune", *arguments])


def test_a_stopped_run_exits_4_and_the_same_command_ends_it(made: tuple[str, str], tmp_path: Path) -> None:
    rows, model = made
    flags = [rows, "--model", model, "-o", str(tmp_path / "run"), "--batch", "8", "--epochs", "1", "--json"]
    stopped = finetune(*flags, "--max-steps", "1")
    assert stopped.exit_code == 4
    assert "the same command resumes it" in stopped.stderr
    assert json.loads(stopped.stdout)["step"] == 1
    ended = finetune(*flags)
    assert ended.exit_code == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert json.loads(finetune(*flags).stdout)["loss"] == found["loss"] > 0
    assert (found["end"], found["step"], found["steps"]) == ("done", 3, 3)
    assert found["folder"] == str(tmp_path / "run" / "model")


def test_each_automatic_choice_is_said_with_its_reason(made: tuple[str, str], tmp_path: Path) -> None:
    rows, model = made
    said = finetune(rows, "--model", model, "-o", str(tmp_path / "run"), "--batch", "8", "--max-steps", "1").stderr
    assert "20 rows" in said
    assert "attention: sdpa (no flash: flash_attn is not installed; no varlen: it needs a GPU" in said
    assert "Adam moments in fp32" in said


def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(
    made: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, model = made
    step = Trainer.step

    def interrupted(self: Trainer, number: int) -> Any:
        if number == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", interrupted)
    ended = finetune(rows, "--model", model, "-o", str(tmp_path / "run"), "--batch", "8")
    assert ended.exit_code == 143
    assert [folder.name for folder in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-00000002"]


def test_the_plan_needs_no_model_and_no_data() -> None:
    shown = finetune("--plan")
    assert shown.exit_code == 0
    assert "141 GB  full" in shown.stdout
    fits = json.loads(finetune("--plan", "--json").stdout)["fits"]
    assert {fit["card_gb"] for fit in fits} == {12, 16, 24, 48, 80, 141}


def test_the_plan_reads_the_shape_of_a_model(made: tuple[str, str]) -> None:
    found = json.loads(finetune("--plan", "--model", made[1], "--json").stdout)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(made[1])
    assert found["parameters"] == sum(p.numel() for p in model.parameters())


def test_the_plan_honours_what_changes_the_memory() -> None:
    def planned(*flags: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(finetune("--plan", "--json", *flags).stdout)
        return found

    def largest(found: dict[str, Any], method: str = "full") -> dict[str, Any]:
        one: dict[str, Any] = next(f for f in found["fits"] if (f["card_gb"], f["method"]) == (141, method))
        return one

    usual = planned()
    assert largest(planned("--adam-state", "8bit"))["adam_state"] == "8bit" != largest(usual)["adam_state"]
    assert largest(planned("--checkpoint-layers", "32"))["checkpointed_layers"] == 32
    assert largest(planned("--checkpoint-layers", "99"))["checkpointed_layers"] == 32
    assert largest(planned("--tokens-per-micro-batch", "1000"))["tokens_per_micro_batch"] == 1000
    assert planned("--dtype", "fp32")["least"]["full"]["weights"] == 2 * usual["least"]["full"]["weights"]
    assert largest(planned("--lora-rank", "64"), "lora")["parts"]["adapters"] == (
        4 * largest(usual, "lora")["parts"]["adapters"]
    )


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("gemma2", {}, "final_logit_softcapping are not supported"),
        ("mixtral", {}, "num_local_experts are not supported"),
        ("gpt2", {}, "of type 'gpt2' cannot be predicted"),
        ("deepseek_v3", {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
                         "first_k_dense_replace": 0}, "not supported|cannot be predicted"),
    ],
)  # fmt: skip
def test_the_plan_gives_no_numbers_for_what_is_not_trained(
    tmp_path: Path, kind: str, changes: dict[str, Any], said: str
) -> None:
    ended = finetune("--plan", "--model", str(other_model(tmp_path, kind, **changes)))
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert re.search(said, ended.stderr), ended.stderr


@pytest.mark.parametrize("kind", ["nemotron", "starcoder2", "qwen2"])
def test_the_plan_counts_feed_forward_layers_of_two_maps_and_of_three(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = other_model(tmp_path, kind)
    found = json.loads(finetune("--plan", "--model", str(folder), "--json").stdout)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert found["parameters"] == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.02)


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        ([], 2, "finetune needs DATASET"),
        (["nowhere", "--model", "MODEL"], 2, "no such dataset or file"),
        (["ROWS", "--model", "./nowhere"], 3, "no model there"),
        (["ROWS", "--model", "MODEL", "--recipe", "best"], 2, "no recipe 'best'"),
        (["ROWS", "--model", "MODEL", "--template", "chat"], 2, "no chat template"),
        (["ROWS", "--model", "MODEL", "--max-length", "20"], 2, "fill 20 tokens"),
        (["ROWS", "--model", "MODEL", "--attention", "varlen"], 2, "needs a GPU"),
        (["ROWS", "--model", "MODEL", "--adam-state", "4bit"], 2, "no Adam state '4bit'"),
        (["ROWS", "--model", "MODEL", "--set", "warmth=1"], 2, "no setting 'warmth'"),
        (["ROWS", "--model", "MODEL", "--set", "lora_alpha=x"], 2, "lora_alpha is 'x'"),
        (["ROWS", "--model", "MODEL", "--lora-rank", "8"], 2, "lora_rank is given, and method full trains no adapters"),
        (["ROWS", "--model", "MODEL", "--set", "lora_alpha=8"], 2, "lora_alpha is given"),
        (["--plan", "--dtype", "fp8"], 2, "no dtype 'fp8'"),
        (["--plan", "--attention", "best"], 2, "no attention 'best'"),
        (["--plan", "--shard", "rows"], 2, "no way to shard 'rows'"),
        (["--plan", "--backend", "best"], 2, "no backend 'best'"),
        (["--plan", "--dtype", "fp32", "--adam-state", "8bit"], 2, "needs weights in bf16"),
    ],
)
def test_mistakes_are_told_with_a_remedy(
    made: tuple[str, str], tmp_path: Path, flags: list[str], code: int, said: str
) -> None:
    names = {"ROWS": made[0], "MODEL": made[1]}
    ended = finetune(*[names.get(flag, flag) for flag in flags], "-o", str(tmp_path / "run"), "--device", "cpu")
    assert ended.exit_code == code
    assert said in ended.stderr
    assert "hint: " in ended.stderr
    assert not (tmp_path / "run").exists()


def test_a_device_that_is_none_is_refused(made: tuple[str, str], tmp_path: Path) -> None:
    ended = finetune(made[0], "--model", made[1], "-o", str(tmp_path / "run"), "--device", "gpu")
    assert (ended.exit_code, "no device 'gpu'" in ended.stderr) == (2, True)


@pytest.mark.skipif(find_spec("tensorboard") is not None, reason="tensorboard is installed")
def test_a_missing_watcher_is_told_before_anything_is_made(made: tuple[str, str], tmp_path: Path) -> None:
    ended = finetune(made[0], "--model", made[1], "-o", str(tmp_path / "run"), "--tensorboard")
    assert (ended.exit_code, "needs tensorboard" in ended.stderr) == (3, True)
    assert not (tmp_path / "run").exists()


def test_any_number_of_a_recipe_can_be_set(made: tuple[str, str], tmp_path: Path) -> None:
    flags = [
        "--set",
        "warmup=0.5",
        "--set",
        "lora_targets=q_proj,v_proj",
        "--set",
        "loss_on_prompt=true",
        "--lr",
        "1e-3",
    ]
    run = tmp_path / "run"
    ended = finetune(made[0], "--model", made[1], "-o", str(run), "--method", "lora", "--max-steps", "1", *flags)
    assert ended.exit_code == 4, ended.stderr
    recipe = json.loads((run / "run.json").read_text())["recipe"]
    assert (recipe["warmup"], recipe["lora_targets"]) == (0.5, ["q_proj", "v_proj"])
    assert (recipe["loss_on_prompt"], recipe["lr"]) == (True, 1e-3)


def test_of_several_processes_one_reports(
    made: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    ended = finetune(made[0], "--model", made[1], "-o", str(tmp_path / "run"), "--epochs", "0.1", "--json")
    assert (ended.exit_code, ended.stdout) == (0, "")
    refused = finetune(made[0], "--model", made[1], "-o", made[1], "--json")
    assert (refused.exit_code, refused.stdout, refused.stderr) == (2, "", "")


def test_a_run_is_named_by_its_models_files_and_not_by_their_place(made: tuple[str, str], tmp_path: Path) -> None:
    flags = [made[0], "-o", str(tmp_path / "run"), "--batch", "8", "--epochs", "1"]
    moved = tmp_path / "model"
    shutil.copytree(made[1], moved)
    assert finetune(*flags, "--model", made[1], "--max-steps", "1").exit_code == 4
    assert finetune(*flags, "--model", str(moved), "--max-steps", "1").exit_code == 4
    tiny_model(moved, seed=1)  # the same shape, other weights
    ended = finetune(*flags, "--model", str(moved))
    assert (ended.exit_code, "model.weights" in ended.stderr) == (2, True)


def test_a_finished_run_is_a_model_to_start_from(made: tuple[str, str], tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert finetune(made[0], "--model", made[1], "-o", str(first), "--epochs", "0.1").exit_code == 0
    assert finetune(made[0], "--model", str(first), "-o", str(second), "--epochs", "0.1").exit_code == 0
    adapted = finetune(made[0], "--model", made[1], "-o", str(tmp_path / "a"), "--epochs", "0.1", "--method", "lora")
    assert adapted.exit_code == 0, adapted.stderr
    refused = finetune(made[0], "--model", str(tmp_path / "a"), "-o", str(tmp_path / "b"))
    assert (refused.exit_code, "merge it first" in refused.stderr) == (2, True)


def test_a_dataset_version_is_read_by_split_and_named_by_its_hashes(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    root = tmp_path / "dataset"
    root.mkdir()
    work = store.new_work_folder(root)
    shards = []
    for split, count in (("train", 5), ("validation", 2)):
        parquet.write_table(arrow.Table.from_pylist(make_rows(count)), work / "new.parquet")
        digest = hashlib.sha256((work / "new.parquet").read_bytes()).hexdigest()
        name = f"{split}-00000-of-00001-{digest[:12]}.parquet"
        size = (work / "new.parquet").rename(work / name).stat().st_size
        shards.append(store.Shard(split, name, count, size, digest))
    store.commit(root, work, 1, shards, {"teacher": "scripted"})
    found = read(f"{root}@v1")
    assert (len(found.train), len(found.validation)) == (5, 2)
    assert found.identity == {"dataset": "dataset", "version": "v1", "files": {s.name: s.sha256 for s in shards}}
    assert found.about["teacher"] == "scripted"
    with pytest.raises(UsageError, match="no version"):
        read(f"{root}@v9")
