"""What is settled before the first step: rows, tokens, template, schedule, and how to run within memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selfinstruct.errors import EnvironmentFault, UsageError
from selfinstruct.student import examples, memory
from selfinstruct.student.counting import counted_shape
from selfinstruct.student.models import weights
from selfinstruct.student.models.source import locate
from selfinstruct.student.prompt import Template, named_template
from selfinstruct.student.train import adapters, attention, batches, checkpoint, manifest
from selfinstruct.student.train.parallel import Group
from selfinstruct.student.train.recipes import Recipe, Runtime, moments, require_known
from selfinstruct.student.train.tokens import Tokens, tokenise, tokenizer_fingerprint
from selfinstruct.student.train.trainee import check_supported, located

# On a CPU nothing is gained by larger ones.
_CPU_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that could start now. ``validation`` is None where no rows are for it, and empty where none is left;
    ``shape`` is None where no memory is predicted, on a CPU."""

    data: str
    model: str
    recipe: Recipe
    tokenizer: Any
    template: Template
    train: Tokens
    validation: Tokens | None
    steps: int
    shape: memory.Shape | None
    config: Any
    device: torch.device
    dtype: torch.dtype
    kernel: attention.Choice
    plan: memory.Plan
    source: examples.Source

    def manifest(self) -> dict[str, Any]:
        """The run's manifest (see ``manifest.build``)."""
        import transformers

        return manifest.build(
            recipe=self.recipe,
            template=self.template,
            tokenizer_sha256=tokenizer_fingerprint(self.tokenizer),
            model=manifest.model_identity(locate(self.model), self.config),
            data=self.source.identity,
            train=self.train,
            validation=self.validation,
            steps=self.steps,
            numerics={"dtype": str(self.dtype).removeprefix("torch."), "adam_state": self.plan.adam_state},
            about=self.source.about,
            versions={"torch": str(torch.__version__), "transformers": transformers.__version__},
        )


def prepare(
    data: str, model: str, recipe: Recipe, runtime: Runtime, group: Group, run: Path, *, native: bool = True
) -> Prepared:
    """Read, tokenise, choose. Raises our errors for whatever would not work, before the weights are loaded.

    ``native``: with the loss and the joined rows of this package, which do not suit every model.
    """
    source = examples.read(data)
    base = located(model, four_bit=recipe.method == "qlora")
    tokenizer = weights.load_tokenizer(base)
    template = named_template(recipe.template, tokenizer)
    rows, held_out = _split(source, recipe)
    limits: dict[str, Any] = {"max_length": recipe.max_length, "loss_on_prompt": recipe.loss_on_prompt}
    train = tokenise(rows, template, tokenizer, **limits)
    if not len(train):
        raise UsageError(
            f"{data}: the prompts of all {len(rows)} rows fill {recipe.max_length} tokens", hint="raise --max-length"
        )
    validation = tokenise(held_out, template, tokenizer, **limits) if held_out else None
    device, dtype = place(runtime, group)
    if recipe.method == "qlora" and device.type == "cpu":
        raise EnvironmentFault("--method qlora: 4-bit training needs a GPU, and torch sees none here or is told not to "
                               "use it", hint="on a CPU: --method lora")  # fmt: skip
    config = weights.load_config(base)
    if native:
        check_supported(config)
    adapters.require_targets(config, recipe)
    kernel = attention.choose(device, dtype, runtime.attention, dropout=attention.dropout_of(config) if native else 0.0)
    for name, part, examples_of in (("train", train, rows), ("validation", validation, held_out)):
        if part:
            _require_words(part, config, lambda one: tokenise([one], template, tokenizer, **limits), examples_of, name)
    steps = max(1, round(recipe.epochs * batches.steps_per_epoch(len(train), recipe.batch)))
    runtime = _as_begun(run, runtime, dtype)
    shape = None if device.type == "cpu" else counted_shape(config)
    plan = plan_for(shape, recipe, runtime, train, device, dtype, kernel, group, steps)
    return Prepared(
        data, model, recipe, tokenizer, template, train, validation, steps, shape, config, device, dtype, kernel,
        plan, source,
    )  # fmt: skip


def place(runtime: Runtime, group: Group) -> tuple[torch.device, torch.dtype]:
    """The device and dtype of a run: this process's GPU in bfloat16 where there is one, else the CPU in fp32."""
    wanted = runtime.device
    require_known(runtime)
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise EnvironmentFault("--device cuda: torch sees no GPU here", hint="check nvidia-smi, or use --device cpu")
    device = torch.device(wanted, group.local_rank) if wanted == "cuda" else torch.device(wanted)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    names = {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32,
             "bf16": torch.bfloat16, "fp32": torch.float32}  # fmt: skip
    return device, names[runtime.dtype]


def plan_for(
    shape: memory.Shape | None, recipe: Recipe, runtime: Runtime, train: Tokens, device: torch.device,
    dtype: torch.dtype, kernel: attention.Choice, group: Group, steps: int,
) -> memory.Plan:  # fmt: skip
    """How to run on this device, without a ``shape`` by what is asked for alone; EnvironmentFault with the remedy when
    nothing would fit."""
    longest = int(train.lengths.max())
    if shape is None:
        state = "fp32" if runtime.adam_state == "auto" else runtime.adam_state
        way = memory.SCHEMES[0] if runtime.shard == "auto" else runtime.shard
        tokens, depth = max(runtime.tokens or _CPU_TOKENS, longest), max(0, runtime.checkpointed_layers)
        return memory.Plan(recipe.method, state, tokens, depth, {}, way, "on a CPU")
    options: dict[str, Any] = {
        "compiled": runtime.compile and kernel.compiles and recipe.method != "qlora",
        "rank": recipe.lora_rank,
        "targets": recipe.lora_targets,
        "world": group.world if recipe.method == "full" else 1,
        "scheme": runtime.shard,
        "bytes_per_number": 4 if dtype == torch.float32 else 2,
    }
    most, share = batches.heaviest(train.lengths, train.labels, recipe.batch, recipe.seed, steps, group.world)
    free = torch.cuda.mem_get_info(device)[0] + memory.BEGUN
    found = memory.choose(
        shape, recipe.method, free,
        step_tokens=most, longest=longest, adam_state=runtime.adam_state,
        tokens=max(runtime.tokens, longest) if runtime.tokens else 0,
        checkpointed_layers=min(runtime.checkpointed_layers, shape.layers), label_share=share, **options,
    )  # fmt: skip
    if found is None:
        raise EnvironmentFault(
            f"--method {recipe.method} of this model does not fit the {free / 1e9:.0f} GB that are free on the GPU",
            hint="see what would: selfinstruct finetune --plan; or try --method lora, --method qlora",
        )
    return found


def _require_words(
    tokens: Tokens, config: Any, tokens_of: Callable[[examples.Example], Tokens], rows: Sequence[examples.Example],
    split: str,
) -> None:  # fmt: skip
    """UsageError, with the first row that shows it, for a tokenizer that knows more words than the model."""
    words = getattr(config, "vocab_size", None)
    if words is None or int(tokens.ids.max()) < words:
        return
    for number, row in enumerate(rows):
        found = tokens_of(row)
        largest = int(found.ids.max()) if len(found) else 0
        if largest >= words:
            raise UsageError(
                f"row {number} of the {split} rows ({row.instruction[:60]!r} ...) has the token {largest}, "
                f"and the model's vocabulary ends at {words - 1}: tokenizer and weights do not belong together",
                hint="copy the tokenizer of this very model into its folder",
            )


def _split(source: examples.Source, recipe: Recipe) -> tuple[list[examples.Example], list[examples.Example]]:
    """Rows to train on and rows held out: the dataset's own validation split, else ``hold_out`` seeded random rows."""
    if source.validation or not recipe.hold_out:
        return list(source.train), list(source.validation)
    if recipe.hold_out >= len(source.train):
        raise UsageError(f"cannot hold out {recipe.hold_out} of {len(source.train)} rows", hint="lower --hold-out")
    order = np.random.default_rng(recipe.seed).permutation(len(source.train))
    held = set(order[: recipe.hold_out].tolist())
    train = [row for number, row in enumerate(source.train) if number not in held]
    return train, [source.train[number] for number in sorted(held)]


def _as_begun(run: Path, runtime: Runtime, dtype: torch.dtype) -> Runtime:
    """A resumed run keeps the moments' format and the parts that it began with, where "auto" would choose anew."""
    if runtime.shard == "auto":
        runtime = replace(runtime, shard=checkpoint.scheme(run) or "auto")
    begun = str(manifest.begun(run, "numerics").get("adam_state") or "auto")
    return replace(runtime, adam_state=moments(runtime, fp32=dtype == torch.float32, begun=begun))


def quieten() -> None:
    """Settings of the libraries below that a training process wants, unless the user has set them."""
    # Micro-batches differ in length: without this the allocator's blocks fit none of the next step's tensors.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
