"""The numbers of a fine-tuning run: two published recipes, and the settings that a run is made from.

``alpaca-7b`` is Stanford's (train.py and README), ``alpaca-lora`` is tloen's finetune.py. Their prompts differ by one
newline at the end, so each brings its own template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from selfinstruct.errors import UsageError

METHODS = ("full", "lora", "qlora")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What decides the result of a run. Frozen in its manifest.

    ``batch`` is in rows a step, ``max_length`` in tokens, ``warmup`` a share of all steps below 1 or a number of
    steps from 1 on. ``lora_targets`` are names of linear layers, ("all-linear",) for all of them.
    """

    name: str
    template: str = "alpaca"
    method: str = "full"
    batch: int = 128
    epochs: float = 3.0
    max_length: int = 512
    lr: float = 2e-5
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_norm: float = 1.0
    loss_on_prompt: bool = False
    hold_out: int = 0
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = ("all-linear",)
    seed: int = 42

    def checked(self) -> Recipe:
        """Itself; UsageError for a number that makes no sense."""
        wrong = [
            ("method", self.method in METHODS, f"one of {', '.join(METHODS)}"),
            ("schedule", self.schedule in ("cosine", "linear", "constant"), "cosine, linear or constant"),
            ("batch", self.batch >= 1, "at least 1"),
            ("epochs", self.epochs > 0, "more than 0"),
            ("max_length", self.max_length >= 8, "at least 8 tokens"),
            ("lr", self.lr > 0, "more than 0"),
            ("warmup", self.warmup >= 0, "0 or more"),
            ("hold_out", self.hold_out >= 0, "0 or more rows"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("max_norm", self.max_norm >= 0, "0 (no clipping) or more"),
            ("lora_rank", self.lora_rank >= 1, "at least 1"),
            ("lora_alpha", self.lora_alpha >= 1, "at least 1"),
            ("lora_dropout", 0 <= self.lora_dropout < 1, "in [0, 1)"),
        ]
        for field, right, wanted in wrong:
            if not right:
                raise UsageError(f"{field} is {getattr(self, field)!r}, and must be {wanted}")
        return self

    def warmup_steps(self, steps: int) -> int:
        """Steps of warmup in a run of ``steps``; a share is rounded up, as transformers does."""
        if self.warmup >= 1:
            return int(self.warmup)
        return -int(-self.warmup * steps // 1)


ALPACA_7B = Recipe("alpaca-7b")
ALPACA_LORA = Recipe(
    "alpaca-lora",
    template="alpaca-lora",
    method="lora",
    max_length=256,
    lr=3e-4,
    schedule="linear",
    warmup=100,
    loss_on_prompt=True,
    hold_out=2000,
    lora_rank=8,
    lora_alpha=16,
    lora_dropout=0.05,
    lora_targets=("q_proj", "v_proj"),
)
RECIPES = {recipe.name: recipe for recipe in (ALPACA_7B, ALPACA_LORA)}
# What a LoRA run without a named recipe learns with: adapters on all linear layers bear ten times the full rate.
_LORA_LR = 2e-4


def recipe(name: str | None, method: str | None = None, **changes: Any) -> Recipe:
    """A recipe by name, changed where the user says so (None: as the recipe has it)."""
    if name is not None and name not in RECIPES:
        raise UsageError(f"no recipe {name!r}", hint=f"known: {', '.join(RECIPES)}")
    found = RECIPES[name or "alpaca-7b"]
    if method is not None:
        found = replace(found, method=method)
    if name is None and found.method != "full":
        found = replace(found, lr=_LORA_LR)
    return replace(found, **{field: value for field, value in changes.items() if value is not None}).checked()


def assigned(assignments: Sequence[str]) -> dict[str, Any]:
    """Fields of a recipe from NAME=VALUE; lists are separated by commas. UsageError names what is wrong."""
    known = {name: value for name, value in asdict(ALPACA_7B).items() if name not in ("name", "method")}
    found: dict[str, Any] = {}
    for assignment in assignments:
        name, _, text = assignment.partition("=")
        if name not in known:
            raise UsageError(f"--set {assignment}: no such setting", hint=f"known: {', '.join(known)}")
        kind = type(known[name])
        try:
            if kind is bool:
                found[name] = {"true": True, "false": False}[text.lower()]
            else:
                found[name] = tuple(text.split(",")) if kind is tuple else kind(text)
        except (ValueError, KeyError):
            raise UsageError(
                f"--set {assignment}: must be of type {kind.__name__}", hint=f"for example --set {name}={known[name]}"
            ) from None
    return found


@dataclass(frozen=True, slots=True)
class Runtime:
    """How a run is carried out. Changes its speed and memory, not (beyond rounding) its result.

    ``dtype`` is "auto", "bf16" or "fp32". ``adam_state`` "auto" or one of ``optimizer.STATES``; ``tokens`` the most
    tokens in a micro-batch, 0 for what memory allows; ``checkpointed_layers`` -1 for what memory asks for.
    ``shard``, over several GPUs, is "auto", "states" (of Adam) or "weights" (too). ``save_every`` and ``eval_every``
    are in steps, 0 for each end of an epoch.
    """

    dtype: str = "auto"
    device: str = "auto"
    attention: str = "auto"
    adam_state: str = "auto"
    tokens: int = 0
    checkpointed_layers: int = -1
    compile: bool = True
    shard: str = "auto"
    save_every: int = 0
    eval_every: int = 0
    max_steps: int = 0
    tensorboard: bool = False
    wandb: bool = False
