"""``finetune``: train a student on a dataset, or say what that would take."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selfinstruct.cli import options
from selfinstruct.cli.console import errors_shown, leave_last, result, result_json, say

if TYPE_CHECKING:
    from selfinstruct.student.train.ledger import Outcome
    from selfinstruct.student.train.meter import Progress
    from selfinstruct.student.train.recipes import Recipe, Runtime

_EXAMPLES = """Examples:

  \b
  selfinstruct finetune outputs/first --model models/llama-7b \\
      -o runs/alpaca --recipe alpaca-7b

  \b
  selfinstruct finetune rows.jsonl --model HuggingFaceTB/SmolLM2-135M \\
      -o runs/lora --method lora

  selfinstruct finetune --plan --model models/llama-7b

  \b
  torchrun --nproc-per-node 2 $(which selfinstruct) \\
      finetune outputs/first --model models/llama-7b -o runs/two"""


Rows = Annotated[
    str | None, typer.Argument(metavar="DATASET[@v]|FILE", help="A dataset folder, or .jsonl, .json, .csv, .parquet.")
]
Run = Annotated[
    Path | None, typer.Option("--run", "-o", metavar="RUN", help="Folder of the run; the same command resumes it.")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any other setting: warmup, schedule, weight_decay, lora_alpha, lora_targets...",
    ),
]
Shard = Annotated[
    str, typer.Option(help="Over several GPUs: auto (by memory), states (of Adam; faster), weights (too; smaller).")
]
Plan = Annotated[
    bool,
    typer.Option(
        "--plan",
        help="Print the predicted memory and what fits one GPU, for every method; train nothing. DATASET, -o, "
        "--method, --shard and what changes no memory are not used.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command(epilog=_EXAMPLES)(finetune)


def finetune(
    data: Rows = None,
    model: Annotated[
        str | None, typer.Option(help="A model's folder, a run of full training, a .gguf file, smollm2, or owner/name.")
    ] = None,
    run: Run = None,
    method: Annotated[str | None, typer.Option(help="full, lora, qlora [full, or the recipe's].")] = None,
    recipe: Annotated[str | None, typer.Option(help="alpaca-7b (Stanford's numbers), alpaca-lora.")] = None,
    template: Annotated[str | None, typer.Option(help="alpaca, alpaca-lora, chat [the recipe's].")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the rows [3].")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows a step, over all GPUs [128].")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate [2e-5; adapters 2e-4].")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest row in tokens; longer ones are cut [512].")] = None,
    hold_out: Annotated[
        int | None, typer.Option(help="Rows for the validation loss, if the data has no such split [0].")
    ] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Rank of the adapters [16].")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the order of rows, of adapters and dropout [42].")] = None,
    dtype: Annotated[str, typer.Option(help="auto, bf16 (with exact fp32 masters), fp32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cuda, cpu.")] = "auto",
    attention: Annotated[str, typer.Option(help="auto, flash, varlen, flex, sdpa.")] = "auto",
    adam_state: Annotated[str, typer.Option(help="Adam's moments: auto (by memory), fp32, bf16, 8bit.")] = "auto",
    tokens_per_micro_batch: Annotated[int, typer.Option(help="0: what memory allows.", min=0)] = 0,
    checkpoint_layers: Annotated[int, typer.Option(help="Layers computed twice; -1: as memory asks.", min=-1)] = -1,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints; 0: each epoch.", min=0)] = 0,
    eval_every: Annotated[int, typer.Option(help="Steps between validation losses; 0: each epoch.", min=0)] = 0,
    max_steps: Annotated[int, typer.Option(help="Stop after so many steps of this command; resumable.", min=0)] = 0,
    compile_: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the layers on a GPU.")] = True,
    shard: Shard = "auto",
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard's files into RUN.")] = False,
    wandb: Annotated[bool, typer.Option("--wandb", help="Send the figures to Weights & Biases.")] = False,
    backend: Annotated[str, typer.Option(help="native, or trl (TRL's SFTTrainer, if it is installed).")] = "native",
    plan: Plan = False,
    settings: Set = None,
    json: options.Json = False,
) -> None:
    """Fine-tune a model on a dataset: the same steps as a padded trainer, without the padding.

    The run resumes with the same command. It needs the train extra: pip install 'selfinstruct[train]'.
    """
    with errors_shown(as_json=json, silent=not _reports()):
        from selfinstruct.student.train import recipes

        named = {"template": template, "epochs": epochs, "batch": batch, "lr": lr, "max_length": max_length,
                 "hold_out": hold_out, "lora_rank": lora_rank, "seed": seed}  # fmt: skip
        given = {**options.assigned(settings), **options.given(named)}
        chosen = recipes.recipe(recipe, method, **given)
        runtime = recipes.Runtime(
            dtype, device, attention, adam_state, tokens_per_micro_batch, checkpoint_layers, compile_, shard,
            save_every, eval_every, max_steps, tensorboard, wandb,
        )  # fmt: skip
        recipes.require_known(runtime)
        if plan:
            return _plan(data, model, chosen, runtime, backend, as_json=json)
        recipes.require_used(chosen, given)
        _train(data, model, run, chosen, runtime, backend, as_json=json)


def _plan(
    data: str | None, model: str | None, recipe: Recipe, runtime: Runtime, backend: str, *, as_json: bool
) -> None:
    """Print what the run would take."""
    from selfinstruct.student.train import fits

    _require_backend(backend)
    if data is not None:
        say(f"--plan looks at no rows: {data} is not used")
    if model is not None:
        from selfinstruct.student.packages import require_packages

        require_packages()
    name, shape = fits.known_shape(model, native=backend == "native")
    if as_json:
        result_json(fits.as_json(name, shape, recipe, runtime))
    else:
        result(fits.as_text(name, shape, recipe, runtime))


def _train(
    data: str | None, model: str | None, run: Path | None, recipe: Recipe, runtime: Runtime, backend: str, *,
    as_json: bool,
) -> None:  # fmt: skip
    """Train, report, and exit with the right code."""
    from selfinstruct.errors import UsageError

    if not (data and model and run):
        raise UsageError("finetune needs DATASET, --model and -o RUN", hint="selfinstruct finetune --help")
    work, line = _backend(backend), _Line()
    outcome = work(data, model, run, recipe, runtime, say=line.say, on_progress=line)
    command = "the same command resumes it"
    code = {"done": 0, "limit": 4, "signal": 128 + (outcome.signal or 2)}[outcome.end]
    if not _reports():
        leave_last(code)
    if as_json:
        result_json(_as_json(outcome, code))
    elif outcome.end == "done":
        losses = f", validation loss {outcome.evaluations[-1][1]:.4f}" if outcome.evaluations else ""
        result(f"{outcome.folder}: trained, {outcome.step} steps{losses}")
        if outcome.folder is not None and recipe.method != "full":
            result(f"merge it:  selfinstruct merge {shlex.quote(str(run))} -o {shlex.quote(str(run / 'merged'))}")
    if code:
        say(f"stopped after step {outcome.step} of {outcome.steps}, with a checkpoint: {command}")
        sys.stdout.flush()
        raise typer.Exit(code)


def _reports() -> bool:
    """Whether this process prints how the run ended: one of several does, which torchrun numbers."""
    return os.environ.get("RANK", "0") == "0"


def _require_backend(name: str) -> None:
    """UsageError for a backend that does not exist."""
    from selfinstruct.errors import UsageError

    if name not in ("native", "trl"):
        raise UsageError(f"no backend {name!r}", hint="known: native, trl")


def _backend(name: str) -> Callable[..., Outcome]:
    """What trains. The packages it needs are looked for first."""
    from selfinstruct.student.packages import require_packages

    _require_backend(name)
    require_packages()
    if name == "trl":
        from selfinstruct.student.train import trl_backend

        return trl_backend.finetune
    from selfinstruct.student.train import finetune as native

    return native.finetune


def _as_json(outcome: Outcome, code: int) -> dict[str, Any]:
    return {
        "end": outcome.end,
        "step": outcome.step,
        "steps": outcome.steps,
        "loss": outcome.loss,
        "evaluations": [{"step": step, "loss": loss} for step, loss in outcome.evaluations],
        "tokens_per_second": outcome.tokens_per_second,
        "mfu": outcome.mfu,
        "peak_bytes": outcome.peak,
        "folder": str(outcome.folder) if outcome.folder else None,
        "exit_code": code,
    }


class _Line:
    """The progress line: rewritten in place on a terminal, one every ten seconds elsewhere."""

    def __init__(self) -> None:
        self._shown = 0.0

    def say(self, text: str) -> None:
        """A line of its own, in the place of the progress line."""
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr)
        say(text)

    def __call__(self, progress: Progress) -> None:
        last = progress.step == progress.steps
        if sys.stderr.isatty():
            print(f"\r\x1b[K{progress.line()}", end="\n" if last else "", file=sys.stderr, flush=True)
        elif last or time.monotonic() - self._shown > 10:
            self._shown = time.monotonic()
            say(progress.line())
