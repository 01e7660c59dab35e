# ruff: noqa: E402 - the packages are looked for first
"""Steps equal those of a padded trainer, joined rows do not see each other, a resumed run equals an unbroken one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the student needs the train extra")
pytest.importorskip("transformers", reason="the student needs the train extra")

import numpy as np
from student_tiny import tiny_config, tiny_model, tiny_tokenizer, write_rows

from selfinstruct.errors import EnvironmentFault, IdentityError, MissingPackage, ModelFileError, UsageError
from selfinstruct.student.examples import read
from selfinstruct.student.models.merge import merge
from selfinstruct.student.prompt import ALPACA, load_template
from selfinstruct.student.train import adapters, attention, batches, checkpoint, finetune
from selfinstruct.student.train.assembly import announce, assemble
from selfinstruct.student.train.ledger import Outcome
from selfinstruct.student.train.loss import labelled_loss
from selfinstruct.student.train.optimizer import AdamSettings, SplitAdamW, learning_rate
from selfinstruct.student.train.parallel import Group
from selfinstruct.student.train.prepare import prepare
from selfinstruct.student.train.recipes import ATTENTION, Recipe, Runtime, recipe
from selfinstruct.student.train.tokens import Tokens, tokenise
from selfinstruct.student.train.trainee import load_model
from selfinstruct.student.train.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("default")
RECIPE = Recipe("test", batch=8, lr=3e-3, epochs=2, max_length=256, warmup=2, weight_decay=0.1)
CPU = Runtime(device="cpu")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 44)


@pytest.fixture(scope="module")
def tokens(rows: Path) -> Tokens:
    return tokenise(read(str(rows)).train, ALPACA, tiny_tokenizer(), max_length=RECIPE.max_length)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


def fresh_model(kernel: str = "sdpa") -> Any:
    from transformers import LlamaForCausalLM

    attention.register()
    torch.manual_seed(0)
    found = LlamaForCausalLM(tiny_config())
    found.set_attn_implementation(attention.PREFIX + kernel)
    return found


def trainer_of(tokens: Tokens, budget: int, **changes: Any) -> Trainer:
    trainee = assemble(fresh_model(), **changes)
    optimizer = SplitAdamW(trainee.named_trained(), AdamSettings(weight_decay=RECIPE.weight_decay))
    return Trainer(trainee, optimizer, tokens, RECIPE, steps=12, budget=budget)


def padded_losses(tokens: Tokens, steps: int, size: int = 4) -> list[float]:
    """A padded trainer: transformers' own loss on padded micro-batches and its choice of what decays, torch's AdamW,
    clipping, the same order."""
    from transformers import LlamaForCausalLM
    from transformers import Trainer as PaddedTrainer

    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config())
    decaying = set(PaddedTrainer.get_decay_parameter_names(None, model))
    assert 0 < len(decaying) < len(list(model.parameters()))
    groups = [
        {"params": [p for name, p in model.named_parameters() if (name in decaying) == decays], "weight_decay": decay}
        for decays, decay in ((True, RECIPE.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=RECIPE.lr)
    losses = []
    for step in range(steps):
        rows = batches.step_rows(len(tokens), RECIPE.batch, RECIPE.seed, step)
        labels_in_step, loss = int(tokens.labels[rows].sum()), 0.0
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            longest = int(tokens.lengths[part].max())
            ids, mask, labels = (torch.full((len(part), longest), fill) for fill in (2, 0, -100))
            for i, row in enumerate(part):
                own = torch.from_numpy(tokens.row(row).astype(np.int64))
                first = int(tokens.loss_from[row])
                ids[i, : len(own)], mask[i, : len(own)], labels[i, first : len(own)] = own, 1, own[first:]
            out = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=labels_in_step)
            out.loss.backward()
            loss += float(out.loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 12, RECIPE.lr, 2, "cosine")
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    return losses


@pytest.mark.parametrize("budget", [256, 100_000])
def test_step_losses_equal_those_of_a_padded_trainer(tokens: Tokens, budget: int) -> None:
    trainer = trainer_of(tokens, budget)
    ours = [trainer.step(step).read()[0] for step in range(8)]
    assert ours == pytest.approx(padded_losses(tokens, 8), rel=1e-5)


@pytest.mark.parametrize("kernel", ["sdpa", "flex"])
def test_joined_rows_give_the_logits_of_separate_rows(tokens: Tokens, kernel: str) -> None:
    trainee = assemble(fresh_model(kernel))
    batch = batches.join(tokens, [3, 1, 2], longest=256)
    with torch.no_grad():
        joined = trainee.hidden_states(batch)
        for place, row in enumerate([3, 1, 2]):
            alone = trainee.hidden_states(batches.join(tokens, [row], longest=256))
            start, end = int(batch.bounds[place]), int(batch.bounds[place + 1])
            torch.testing.assert_close(joined[start:end], alone[: end - start], rtol=1e-5, atol=1e-5)


def test_recomputed_layers_change_nothing(tokens: Tokens) -> None:
    plain, recomputed = trainer_of(tokens, 1024), trainer_of(tokens, 1024, checkpointed=1)
    wanted = [number for step in range(3) for number in plain.step(step).read()]
    assert [number for step in range(3) for number in recomputed.step(step).read()] == pytest.approx(wanted)
    assert [layer.gradient_checkpointing for layer in recomputed.trainee.layers()] == [True, False]


def test_chunked_loss_and_gradients_equal_the_full_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfinstruct.student.train.loss.CHUNK_ROWS", 7)
    torch.manual_seed(0)
    hidden, head = torch.randn(40, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    predicting, targets = torch.arange(3, 33), torch.randint(0, 50, (30,))
    full = torch.nn.functional.cross_entropy(hidden[predicting] @ head.T, targets, reduction="sum") / 99
    ours = labelled_loss(hidden, head, predicting, targets, 99)
    torch.testing.assert_close(ours, full)
    wanted = torch.autograd.grad(full * 3, (hidden, head))
    torch.testing.assert_close(torch.autograd.grad(ours * 3, (hidden, head)), wanted)


def test_a_micro_batch_without_labels_still_gives_gradients() -> None:
    hidden, head = torch.randn(4, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    empty = torch.zeros(0, dtype=torch.int64)
    loss = labelled_loss(hidden, head, empty, empty, 10)
    assert loss.item() == 0
    assert all(float(g.abs().sum()) == 0 for g in torch.autograd.grad(loss, (hidden, head)))


def train(rows: Path, model: Path, run: Path, chosen: Recipe = RECIPE, runtime: Runtime = CPU) -> Outcome:
    return finetune.finetune(str(rows), str(model), run, chosen, runtime)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_that_was_stopped_ends_as_the_unbroken_one(rows: Path, model: Path, tmp_path: Path, method: str) -> None:
    chosen = replace(RECIPE, method=method, lora_dropout=0.1, lora_rank=4, hold_out=4)
    whole = train(rows, model, tmp_path / "whole", chosen)
    first = train(rows, model, tmp_path / "broken", chosen, replace(CPU, max_steps=3))
    assert (first.end, first.step) == ("limit", 3)
    assert [p.name for p in (tmp_path / "broken").glob("checkpoint-*")] == ["checkpoint-00000003"]
    second = train(rows, model, tmp_path / "broken", chosen)
    assert second.end == "done"
    assert [*first.losses, *second.losses] == pytest.approx(list(whole.losses), rel=1e-6)
    assert second.evaluations[-1][1] == pytest.approx(whole.evaluations[-1][1], rel=1e-6)
    assert (whole.evaluations[0][0], second.evaluations[0][0] > 0) == (0, True)
    logged = [json.loads(line) for line in (tmp_path / "broken" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "loss" in line] == list(range(1, whole.steps + 1))
    assert not list((tmp_path / "broken").glob("checkpoint-*"))


def test_bf16_weights_with_exact_masters_resume_too(rows: Path, model: Path, tmp_path: Path) -> None:
    chosen, runtime = replace(RECIPE, epochs=1, lr=1e-2), replace(CPU, dtype="bf16", adam_state="8bit")
    whole = train(rows, model, tmp_path / "whole", chosen, runtime)
    first = train(rows, model, tmp_path / "broken", chosen, replace(runtime, max_steps=3))
    # "auto" goes on with the format that the run began with.
    second = train(rows, model, tmp_path / "broken", chosen, replace(runtime, adam_state="auto"))
    assert [*first.losses, *second.losses] == pytest.approx(list(whole.losses), rel=1e-6)
    assert whole.losses[-1] < whole.losses[0] * 0.9


def test_a_changed_run_is_refused_and_the_difference_named(rows: Path, model: Path, tmp_path: Path) -> None:
    train(rows, model, tmp_path / "run", RECIPE, replace(CPU, max_steps=1))
    with pytest.raises(IdentityError, match=r"recipe\.lr: was 0\.003, is 0\.001"):
        train(rows, model, tmp_path / "run", replace(RECIPE, lr=1e-3))
    more = write_rows(tmp_path / "rows.jsonl", 45)
    with pytest.raises(IdentityError, match=r"data\.rows: was 44, is 45"):
        train(more, model, tmp_path / "run")


def test_a_finished_run_is_not_trained_again(rows: Path, model: Path, tmp_path: Path) -> None:
    chosen = replace(RECIPE, epochs=0.3)
    train(rows, model, tmp_path / "run", chosen)
    again = train(rows, model, tmp_path / "run", chosen)
    assert (again.end, again.losses) == ("done", ())
    assert again.folder == tmp_path / "run" / "model"


def test_the_model_is_left_with_template_tokenizer_and_provenance(rows: Path, model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    outcome = train(rows, model, tmp_path / "run", replace(RECIPE, epochs=0.3))
    assert outcome.folder is not None
    assert load_template(outcome.folder) == ALPACA
    assert AutoTokenizer.from_pretrained(outcome.folder)("a")["input_ids"][0] == 1
    AutoModelForCausalLM.from_pretrained(outcome.folder)
    about = json.loads((outcome.folder / "selfinstruct_run.json").read_text())
    assert about["data"]["files"].keys() == {"rows.jsonl"}


def test_adapters_train_alone_and_merge(rows: Path, model: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    chosen = replace(RECIPE, method="lora", lr=1e-2, lora_rank=4)
    outcome = train(rows, model, tmp_path / "run", chosen)
    assert outcome.losses[-1] < outcome.losses[0]
    assert outcome.folder == tmp_path / "run" / "adapter"
    base = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.tensor([[1, 70, 80, 90]])
    adapted = peft.PeftModel.from_pretrained(base, outcome.folder)
    before = adapted(input_ids=ids).logits
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)
    # alpha / rank says how strong an adapter is; a file that lost it would merge to another model.
    assert json.loads((outcome.folder / "adapter_config.json").read_text())["lora_alpha"] == chosen.lora_alpha


@pytest.mark.parametrize(
    ("targets", "why"),
    [
        (("lm_head", "q_proj"), "'lm_head' is the output layer"),
        (("lm_head",), "'lm_head' is the output layer"),
        (("q_proj", "v_porj"), "'v_porj' names no linear layer of the model"),
        (("embed_tokens", "q_proj"), "'embed_tokens' names no linear layer"),
        (("",), "'' names no linear layer"),
        (("all-linear", "lm_head"), "all-linear stands alone"),
    ],
)
def test_adapters_that_would_not_learn_are_refused_before_the_run_is_written(
    rows: Path, model: Path, tmp_path: Path, targets: tuple[str, ...], why: str
) -> None:
    chosen = replace(RECIPE, method="lora", lora_targets=targets)
    with pytest.raises(UsageError, match=why) as caught:
        train(rows, model, tmp_path / "run", chosen)
    assert "q_proj, up_proj, v_proj" in caught.value.hint
    assert "lm_head" not in caught.value.hint
    with pytest.raises(UsageError, match=why):
        adapters.add(fresh_model(), chosen, str(model))
    # The same folder takes the run once the name is mended.
    mended = replace(chosen, lora_targets=("self_attn.q_proj", "v_proj"), lora_rank=4)
    assert train(rows, model, tmp_path / "run", mended, replace(CPU, max_steps=1)).step == 1


def test_an_adapter_is_not_merged_into_another_model_in_the_place_of_its_base(
    rows: Path, model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    base = Path(shutil.copytree(model, tmp_path / "base"))
    train(rows, base, tmp_path / "run", replace(RECIPE, method="lora", lora_rank=4))
    merge(str(tmp_path / "run"), tmp_path / "merged")
    other = tiny_model(tmp_path / "other", seed=9)
    shutil.copyfile(other / "model.safetensors", base / "model.safetensors")
    with pytest.raises(ModelFileError, match="trained on other weights"):
        merge(str(tmp_path / "run"), tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_a_damaged_checkpoint_is_told(rows: Path, model: Path, tmp_path: Path) -> None:
    train(rows, model, tmp_path / "run", RECIPE, replace(CPU, max_steps=1))
    folder = checkpoint.newest(tmp_path / "run")
    assert folder is not None
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(EnvironmentFault, match="cannot be read"):
        train(rows, model, tmp_path / "run")


def test_a_diverged_run_stops_with_the_remedy(rows: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="diverged") as caught:
        train(rows, model, tmp_path / "run", replace(RECIPE, lr=1e30, warmup=0, max_norm=0.0))
    assert "--lr" in caught.value.hint


def test_memory_that_does_not_suffice_is_explained(rows: Path, model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_args: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. More words.")

    monkeypatch.setattr(Trainer, "backward", full)
    with pytest.raises(EnvironmentFault, match="memory does not suffice") as caught:
        train(rows, model, tmp_path / "run")
    assert "--tokens-per-micro-batch" in caught.value.hint


def test_missing_packages_are_named_before_anything_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else object())
    with pytest.raises(MissingPackage, match="bitsandbytes") as caught:
        adapters.require("qlora")
    assert "pip install" in caught.value.hint


def test_4_bit_training_on_a_cpu_is_refused_before_anything_is_loaded(rows: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="needs a GPU") as caught:
        prepare(str(rows), str(model), replace(RECIPE, method="qlora"), CPU, Group(), tmp_path / "run")
    assert "--method lora" in caught.value.hint


def test_the_start_says_which_rows_validate(rows: Path, model: Path, tmp_path: Path) -> None:
    prepared = prepare(str(rows), str(model), replace(RECIPE, hold_out=4), CPU, Group(), tmp_path / "run")
    said: list[str] = []
    announce(prepared, said.append)
    assert "4 rows for the validation loss: held out, seed 42" in said
    split = replace(prepared.source, validation=prepared.source.train[:4])
    announce(replace(prepared, source=split), said.append)
    assert any("the dataset's validation split, so --hold-out 4 is not needed" in line for line in said)


def test_the_ladder_says_why_it_chose(model: Path) -> None:
    choice = attention.choose(torch.device("cpu"), torch.float32)
    assert choice.kernel == "sdpa"
    assert "no varlen: it needs a GPU" in choice.reason
    with pytest.raises(UsageError, match="it needs a GPU"):
        attention.choose(torch.device("cpu"), torch.float32, "varlen")
    loaded = load_model(str(model), dtype=torch.float32, kernel=choice, device=torch.device("cpu"))
    assert loaded.config._attn_implementation == "selfinstruct_sdpa"


def test_the_kernels_that_a_run_may_ask_for_are_those_of_the_ladder() -> None:
    assert ATTENTION == attention.KERNELS


def test_recipes_are_the_published_ones() -> None:
    stanford, lora = recipe("alpaca-7b"), recipe("alpaca-lora")
    assert (stanford.lr, stanford.batch, stanford.epochs, stanford.max_length, stanford.warmup) == (
        2e-5,
        128,
        3,
        512,
        0.03,
    )
    assert (lora.lora_rank, lora.lora_alpha, lora.lora_targets, lora.loss_on_prompt) == (
        8,
        16,
        ("q_proj", "v_proj"),
        True,
    )
    assert recipe(None, "lora").lr == 2e-4
    assert stanford.warmup_steps(1221) == 37
    assert recipe(None, lora_targets="q_proj,v_proj", loss_on_prompt="true", epochs="2").lora_targets == (
        "q_proj",
        "v_proj",
    )


@pytest.mark.parametrize(
    ("setting", "value"),
    [("batch", 0), ("epochs", float("inf")), ("epochs", float("nan")), ("epochs", "0"), ("lr", -1.0), ("seed", -1),
     ("seed", 2**32), ("schedule", "sine"), ("lora_dropout", 1.0), ("loss_on_prompt", "maybe"), ("hold_out", 1.5)],
)  # fmt: skip
def test_numbers_that_make_no_sense_are_refused_by_name(setting: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"{setting} is "):
        recipe(None, **{setting: value})


def test_the_schedule_is_the_transformers_one() -> None:
    from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

    for shape, made in (("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        schedule = made(optimizer, 5, 30)
        for step in range(30):
            assert learning_rate(step, 30, 0.5, 5, shape) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
            optimizer.step()
            schedule.step()
