"""The numbers of a fine-tuning run: two published recipes, and the settings that a run is made from.

``alpaca-7b`` is Stanford's (train.py and README), ``alpaca-lora`` is tloen's finetune.py. Their prompts differ by one
newline at the end, so each brings its own template.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from selfinstruct.errors import UsageError
from selfinstruct.student.memory import SCHEMES, STATE_BYTES

METHODS = ("full", "lora", "qlora")
ATTENTION = ("flash", "varlen", "flex", "sdpa")


def _listed(targets: Any) -> Any:
    return targets.split(",") if isinstance(targets, str) else targets


@checked_dataclass(frozen=True, slots=True)
class Recipe:
    """What decides the result of a run. Frozen in its manifest. pydantic's ValidationError for what makes no sense.

    ``batch`` is in rows a step, ``max_length`` in tokens, ``warmup`` a share of all steps below 1 or a number of
    steps from 1 on; ``max_norm`` 0 is no clipping. ``lora_targets`` are names of linear layers, ("all-linear",) for
    all of them.
    """

    name: str
    template: str = "alpaca"
    method: Literal["full", "lora", "qlora"] = "full"
    batch: Annotated[int, Field(ge=1)] = 128
    epochs: Annotated[float, Field(gt=0, le=1000)] = 3.0
    max_length: Annotated[int, Field(ge=8)] = 512
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2e-5
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.03
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    max_norm: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    loss_on_prompt: bool = False
    hold_out: Annotated[int, Field(ge=0)] = 0
    lora_rank: Annotated[int, Field(ge=1)] = 16
    lora_alpha: Annotated[int, Field(ge=1)] = 32
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    lora_targets: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ("all-linear",)
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42

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
    """A recipe by name, changed where the user says so (None: as the recipe has it; texts are read as numbers are
    written, lists are separated by commas). UsageError names what is wrong."""
    if name is not None and name not in RECIPES:
        raise UsageError(f"no recipe {name!r}", hint=f"known: {', '.join(RECIPES)}")
    known = [field.name for field in fields(Recipe) if field.name not in ("name", "method")]
    for change in changes:
        if change not in known:
            raise UsageError(f"no setting {change[:80]!r}", hint=f"known: {', '.join(known)}")
    found = RECIPES[name or "alpaca-7b"]
    given: dict[str, Any] = {field: value for field, value in changes.items() if value is not None}
    if method is not None:
        given["method"] = method
    if name is None and method not in (None, "full"):
        given.setdefault("lr", _LORA_LR)
    try:
        return replace(found, **given)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        raise UsageError(
            f"{field} is {str(first['input'])[:80]!r}: {first['msg'].lower()}",
            hint=f"{found.name} has {getattr(found, field)!r}; see selfinstruct finetune --help",
        ) from None


def require_used(chosen: Recipe, given: Mapping[str, Any]) -> None:
    """UsageError for settings of adapters where none are trained: the run would be another one than was meant."""
    idle = [name for name, value in given.items() if name.startswith("lora_") and value is not None]
    if chosen.method == "full" and idle:
        raise UsageError(
            f"{', '.join(idle)} is given, and method full trains no adapters", hint="--method lora, or leave it out"
        )


@dataclass(frozen=True, slots=True)
class Runtime:
    """How a run is carried out. Changes its speed and memory, not (beyond rounding) its result.

    ``dtype`` is "auto", "bf16" or "fp32". ``adam_state`` "auto" or one of ``memory.STATE_BYTES``; ``tokens`` the most
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


def require_known(runtime: Runtime) -> None:
    """UsageError for a name of a device, dtype, kernel, format or scheme that does not exist, with those that do."""
    for what, given, known in (
        ("device", runtime.device, ("cuda", "cpu")),
        ("dtype", runtime.dtype, ("bf16", "fp32")),
        ("attention", runtime.attention, ATTENTION),
        ("Adam state", runtime.adam_state, tuple(STATE_BYTES)),
        ("way to shard", runtime.shard, SCHEMES),
    ):
        if given not in ("auto", *known):
            raise UsageError(f"no {what} {given!r}", hint=f"known: auto, {', '.join(known)}")


def moments(runtime: Runtime, *, fp32: bool, begun: str = "auto") -> str:
    """The format of Adam's moments, or "auto": beside weights in ``fp32`` they are in fp32.

    UsageError for who asks for others there, unless the run ``begun`` with that before it was refused: it did the same.
    """
    if not fp32:
        return begun if runtime.adam_state == "auto" else runtime.adam_state
    if runtime.adam_state not in ("auto", "fp32", begun):
        raise UsageError(
            f"--adam-state {runtime.adam_state} needs weights in bf16, and here they are in fp32",
            hint="leave --adam-state out, or give --dtype bf16",
        )
    return "fp32"
