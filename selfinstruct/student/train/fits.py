"""``finetune --plan``: what a run is predicted to take, part by part, and what fits which card. No torch needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from selfinstruct.student.memory import CARDS, LLAMA_7B, Plan, Shape, choose, predict, weight_bytes
from selfinstruct.student.train.recipes import METHODS, Recipe, Runtime, moments

# Tokens of a large step of 128 Alpaca rows; the longest row is the recipe's limit.
_TOKENS_A_ROW = 140
_CARD_GB, _RAM_GB, _DISK_GB = 12, 16, 2  # of the claim
_NAMES = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}
_USUAL = Runtime()


@dataclass(frozen=True, slots=True)
class Fit:
    """How a method runs on a card; ``plan`` is None when it does not fit."""

    card_gb: int
    method: str
    plan: Plan | None


def known_shape(model: str | None, *, native: bool = True) -> tuple[str, Shape]:
    """(name, shape) of a model's folder or Hub name; LLaMA-7B when none is named.

    ModelFileError when unreadable, UsageError for a model that would not be trained, or whose memory is not known.
    """
    if model is None:
        return "LLaMA-7B", LLAMA_7B
    from selfinstruct.student.counting import counted_shape
    from selfinstruct.student.models.weights import load_config
    from selfinstruct.student.train.trainee import check_supported, located

    source = located(model)
    config = load_config(source)
    if native:
        check_supported(config)
    return source.name, counted_shape(config)


def fits(shape: Shape, recipe: Recipe, runtime: Runtime = _USUAL) -> list[Fit]:
    """The fastest way for each method on each card, with the recipe's batch and lengths, and what ``runtime`` sets."""
    found = []
    fp32 = runtime.dtype == "fp32"
    # The kernels that a layer can be compiled with take 16 bits alone.
    compiled = runtime.compile and not fp32 and runtime.attention in ("auto", "varlen", "flash")
    for card, size in CARDS.items():
        for method in METHODS:
            plan = choose(
                shape, method, size, step_tokens=_TOKENS_A_ROW * recipe.batch, longest=recipe.max_length,
                rank=recipe.lora_rank, targets=recipe.lora_targets, compiled=compiled and method != "qlora",
                adam_state=moments(runtime, fp32=fp32), bytes_per_number=4 if fp32 else 2,
                tokens=max(runtime.tokens, recipe.max_length) if runtime.tokens else 0,
                checkpointed_layers=min(runtime.checkpointed_layers, shape.layers),
            )  # fmt: skip
            found.append(Fit(card, method, plan))
    return found


def least(shape: Shape, method: str, recipe: Recipe, runtime: Runtime = _USUAL) -> Plan:
    """The least memory that a method can do with: one longest row at a time, all layers recomputed."""
    fp32 = runtime.dtype == "fp32"
    state = moments(runtime, fp32=fp32)
    smallest = "8bit" if method == "full" else "fp32"
    return predict(
        shape, method, tokens=recipe.max_length, adam_state=smallest if state == "auto" else state,
        checkpointed_layers=shape.layers, rank=recipe.lora_rank, targets=recipe.lora_targets,
        compiled=method != "qlora" and not fp32, bytes_per_number=4 if fp32 else 2,
    )  # fmt: skip


def as_text(name: str, shape: Shape, recipe: Recipe, runtime: Runtime = _USUAL) -> str:
    """The tables for a terminal."""
    lines = [f"{name}: {shape.parameters / 1e9:.2f}e9 parameters; at most {recipe.max_length} tokens a row, "
             f"{recipe.batch} rows a step; GB are 10^9 bytes", ""]  # fmt: skip
    lines += ["card    method  GB predicted  micro-batch  Adam  layers recomputed"]
    found = fits(shape, recipe, runtime)
    for fit in found:
        if fit.plan is None:
            lines.append(f"{fit.card_gb:3} GB  {fit.method:6}  does not fit")
        else:
            p = fit.plan
            depth, size = f"{p.checkpointed_layers} of {shape.layers}", p.total / 1e9
            lines.append(f"{fit.card_gb:3} GB  {fit.method:6}  {size:12.1f}  {p.tokens:11}  {p.adam_state:4}  {depth}")
    lines += ["", "least memory (one row at a time, every layer recomputed), GB by part:"]
    for method in METHODS:
        plan = least(shape, method, recipe, runtime)
        parts = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in plan.parts.items() if size >= 5e7)
        lines.append(f"  {method:6} {plan.total / 1e9:5.1f} = {parts}")
    return "\n".join([*lines, "", *the_claim(shape, recipe, found)])


def the_claim(shape: Shape, recipe: Recipe, found: list[Fit]) -> list[str]:
    """What is true of "7B in 16 GB RAM, a 12 GB GPU and 2 GB of disk", in this model's figures and those ``found``."""
    n = shape.parameters
    whole, half = 4 * n / 1e9, 2 * n / 1e9
    adapter = shape.lora_parameters(8, ("q_proj", "v_proj"))
    eight, four = weight_bytes(shape, "int8") / 1e9, weight_bytes(shape, "4bit") / 1e9
    memory = f"only when weights are read shard by shard (as here); whole in fp32 they are {whole:.0f} GB."
    if whole < _RAM_GB:
        memory = f"holds the weights, also whole in fp32: {whole:.1f} GB."
    kept = f"the model too: {four:.1f} GB in 4 bit, {half:.1f} GB in 16"
    if half > _DISK_GB:
        kept = f"the model in 4 bit alone: {four:.1f} GB, and {half:.1f} GB in 16"
    if four > _DISK_GB:
        kept = f"never the model: {four:.1f} GB in 4 bit, {half:.1f} GB in 16"
    return [
        'The often quoted "16 GB of RAM, a 12 GB GPU, 2 GB of disk":',
        f"  12 GB GPU   inference in 16 bit: {half:.1f} GB of weights alone; in 8 bit: {eight:.1f} GB; "
        f"in 4 bit: {four:.1f} GB. {_training(shape, recipe, found)}",
        f"  16 GB RAM   {memory}",
        f"  2 GB disk   holds an adapter (rank 8 on q and v: {4 * adapter / 1e6:.0f} MB in fp32) and the dataset, "
        f"{kept}.",
    ]


def _training(shape: Shape, recipe: Recipe, found: list[Fit]) -> str:
    """Which methods fit the 12 GB card, as the table says, and from how much memory on."""
    fitting = [fit.method for fit in found if fit.card_gb == _CARD_GB and fit.plan]
    from_size = [f"{_NAMES[method]} from {least(shape, method, recipe).total / 1e9:.1f} GB on" for method in fitting]
    if not fitting:
        return "Training: nothing fits."
    return f"Training: {', '.join(from_size)}{'' if len(fitting) == len(METHODS) else ', nothing else'}."


def as_json(name: str, shape: Shape, recipe: Recipe, runtime: Runtime = _USUAL) -> dict[str, Any]:
    """The same for programs; sizes in bytes."""
    return {
        "model": name,
        "parameters": shape.parameters,
        "fits": [
            {"card_gb": fit.card_gb, "method": fit.method, "fits": fit.plan is not None,
             **({} if fit.plan is None else {
                 "bytes": fit.plan.total, "parts": dict(fit.plan.parts), "tokens_per_micro_batch": fit.plan.tokens,
                 "adam_state": fit.plan.adam_state, "checkpointed_layers": fit.plan.checkpointed_layers})}
            for fit in fits(shape, recipe, runtime)
        ],
        "least": {method: dict(least(shape, method, recipe, runtime).parts) for method in METHODS},
    }  # fmt: skip
