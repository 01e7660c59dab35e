"""From a prepared run to a trainer: model, adapters, recomputation, compilation, sharding, optimizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from selfinstruct.errors import EnvironmentFault
from selfinstruct.student.train import adapters, exactness, parallel
from selfinstruct.student.train.optimizer import AdamSettings, SplitAdamW
from selfinstruct.student.train.parallel import Group
from selfinstruct.student.train.prepare import Prepared
from selfinstruct.student.train.recipes import Recipe, Runtime
from selfinstruct.student.train.tokens import Tokens
from selfinstruct.student.train.trainee import Trainee, load_model
from selfinstruct.student.train.trainer import Trainer


def build(prepared: Prepared, runtime: Runtime, group: Group) -> tuple[Trainer, Any]:
    """Load the model and everything around it: (trainer, peft's handle or None)."""
    recipe, plan = prepared.recipe, prepared.plan
    cuda = prepared.device.type == "cuda"
    model, handle = group.agree(lambda: _loaded(prepared))
    trainee = assemble(
        model, checkpointed=plan.checkpointed_layers,
        compiled=runtime.compile and cuda and prepared.kernel.compiles and recipe.method != "qlora",
    )  # fmt: skip
    share = parallel.share(trainee, group, recipe.method, plan.scheme)
    settings = AdamSettings(weight_decay=recipe.weight_decay, max_norm=recipe.max_norm, state=plan.adam_state)
    named = share.in_order(trainee.named_trained())
    optimizer = SplitAdamW(named, settings, share=share, compiled=runtime.compile and cuda)
    trainer = Trainer(
        trainee, optimizer, prepared.train, recipe,
        steps=prepared.steps, budget=plan.tokens, group=group, device=prepared.device,
    )  # fmt: skip
    return trainer, handle


def _loaded(prepared: Prepared) -> tuple[Any, Any]:
    """The model, looked at, with the adapters of its handle, if any."""
    recipe = prepared.recipe
    torch.manual_seed(recipe.seed)
    model = load_model(
        prepared.model, dtype=prepared.dtype, kernel=prepared.kernel, device=prepared.device,
        four_bit=recipe.method == "qlora",
    )  # fmt: skip
    handle = adapters.add(model, recipe, lasting(prepared.model)) if recipe.method != "full" else None
    exactness.require(Trainee(model), prepared.kernel, int(prepared.train.lengths.max()))
    return model, handle


def assemble(model: Any, *, checkpointed: int = 0, compiled: bool = False) -> Trainee:
    """Wrap a loaded model for training."""
    trainee = Trainee(model, compiled_loss=compiled)
    trainee.checkpoint_layers(checkpointed)
    if compiled:
        trainee.compile_layers()
    return trainee


def announce(prepared: Prepared, say: Callable[[str], None]) -> None:
    """Each automatic choice with its reason, before anything slow."""
    train, plan, recipe = prepared.train, prepared.plan, prepared.recipe
    say(
        f"{len(train)} rows, {int(train.starts[-1])} tokens, {int(train.labels.sum())} labels; "
        f"{train.truncated} rows cut at {recipe.max_length} tokens, {train.dropped} left out (prompts alone that long)"
    )
    if prepared.validation is not None:
        say(said_of_validation(prepared, prepared.validation))
    say(f"{prepared.steps} steps of {recipe.batch} rows, template {prepared.template.name}, method {recipe.method}")
    say(f"on {prepared.device} in {str(prepared.dtype).removeprefix('torch.')}; attention: {prepared.kernel.kernel} "
        f"({prepared.kernel.reason})")  # fmt: skip
    say(f"micro-batches of at most {plan.tokens} tokens, Adam moments in {plan.adam_state}, "
        f"{plan.checkpointed_layers} layers recomputed: {plan.reason}")  # fmt: skip


def said_of_validation(prepared: Prepared, rows: Tokens) -> str:
    """Which rows the validation loss is taken over, and what became of them."""
    recipe, own = prepared.recipe, bool(prepared.source.validation)
    unused = f", so --hold-out {recipe.hold_out} is not needed" if own and recipe.hold_out else ""
    where = f"the dataset's validation split{unused}" if own else f"held out, seed {recipe.seed}"
    if not len(rows):
        return f"no validation loss: the prompts of all {rows.dropped} rows fill {recipe.max_length} tokens ({where})"
    said = f"{len(rows)} rows for the validation loss: {where}"
    lost = f"; {rows.truncated} of them cut, {rows.dropped} left out (prompts alone that long)"
    return said + (lost if rows.truncated or rows.dropped else "")


def lasting(model: str) -> str:
    """A model's name that holds from any folder: adapters name their base by it."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def explained(error: torch.cuda.OutOfMemoryError, recipe: Recipe) -> EnvironmentFault:
    """Out of memory, with what helps."""
    ways = ["--tokens-per-micro-batch N (half of what was said at the start)", "--checkpoint-layers N"]
    if recipe.method == "full":
        ways += ["--adam-state 8bit", "--method lora"]
    elif recipe.method == "lora":
        ways.append("--method qlora")
    return EnvironmentFault(
        f"the GPU's memory does not suffice ({str(error).split('. ')[0]})",
        hint="give one of: " + "; ".join(ways) + ". The last checkpoint is untouched, the same command goes on from it",
    )
