"""``infer``: a model answers every row of a file."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selfinstruct.cli import options
from selfinstruct.cli.console import errors_shown, interruptions_told, result, result_json, say

if TYPE_CHECKING:
    from selfinstruct.student.infer.infer import Outcome

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A model's folder, a fine-tuning run, a .gguf file, smollm2, or owner/name."),
]
Template = Annotated[
    str | None, typer.Option(help="alpaca, alpaca-lora, chat [the one stored with the model, else chat, else alpaca].")
]
Dtype = Annotated[str, typer.Option(help="auto (bf16 on a GPU, fp32 on a CPU), bf16, fp16, fp32.")]
Quant = Annotated[str | None, typer.Option(help="8bit or 4bit weights (bitsandbytes).")]
Temperature = Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")]
Batch = Annotated[int | None, typer.Option(help="At most so many rows at a time [what the memory holds].")]
Compile = Annotated[
    bool | None, typer.Option("--compile/--no-compile", help="torch.compile the layers [for large jobs on a GPU].")
]

_EXAMPLES = """Examples:

  selfinstruct infer outputs/run --input questions.jsonl -o answers.jsonl

  \b
  selfinstruct infer outputs/merged --input outputs/alpaca@v2 \\
      -o answers.parquet --temperature 0.7

  selfinstruct infer outputs/merged --plan"""


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command(epilog=_EXAMPLES)(infer)


def infer(
    model: Model,
    input: Annotated[
        str | None, typer.Option(metavar="FILE", help="Rows with instruction and input: a file or DATASET[@v].")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="OUT", help="A .jsonl or .parquet file.")] = None,
    split: Annotated[str, typer.Option(help="Split of a dataset.")] = "train",
    engine: Annotated[str, typer.Option(help="auto (vLLM where it is installed), vllm, transformers.")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(help="Longest reply, in tokens.")] = 512,
    temperature: Temperature = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that reach this share.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Drop tokens less likely than this share of the likeliest.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Random seed of the draws.")] = 0,
    template: Template = None,
    dtype: Dtype = "auto",
    quant: Quant = None,
    batch: Batch = None,
    context: Annotated[int | None, typer.Option(help="Longest prompt and reply together [the model's own].")] = None,
    compile_layers: Compile = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show what fits which card; load nothing.")] = False,
    json: options.Json = False,
) -> None:
    """Answer every row of FILE with MODEL, and go on where a killed command stopped."""
    with errors_shown(as_json=json):
        if plan:
            _plan(model, max_new_tokens, as_json=json)
            return
        from selfinstruct.errors import UsageError

        if input is None or out is None:
            raise UsageError("--input and -o are needed", hint="selfinstruct infer MODEL --input FILE -o answers.jsonl")
        if Path(input).resolve() == out.resolve():
            raise UsageError(f"-o {out} is the input", hint="name another file for the answers")
        from selfinstruct.student.infer import questions
        from selfinstruct.student.packages import require_packages

        require_packages()
        from selfinstruct.student.infer.infer import InferOptions
        from selfinstruct.student.infer.infer import infer as answer

        rows = questions.read(input, split)
        how = InferOptions(
            max_new_tokens, temperature, top_p, min_p, seed,
            template, engine, dtype, quant, batch, compile_layers, context,
        )  # fmt: skip
        bar = _Bar()
        with interruptions_told(shlex.join(["selfinstruct", *sys.argv[1:]])):
            try:
                outcome = answer(model, rows, out, how, log=bar.say, on_progress=bar.show)
            finally:
                bar.close()
        _report(out, outcome, as_json=json)


def _report(out: Path, outcome: Outcome, *, as_json: bool) -> None:
    rate = outcome.new_tokens / outcome.seconds if outcome.seconds else 0.0
    if as_json:
        result_json(
            {
                "out": str(out),
                "rows": outcome.rows,
                "answered": outcome.answered,
                "too_long": outcome.too_long,
                "new_tokens": outcome.new_tokens,
                "seconds": round(outcome.seconds, 3),
                "peak_bytes": outcome.peak,
            }
        )
        return
    result(
        f"{out}: {outcome.rows} rows, {outcome.answered} answered now, {outcome.new_tokens} new tokens "
        f"in {outcome.seconds:.0f} s ({rate:.0f} tokens/s with loading)"
    )
    if outcome.too_long:
        result(f"{outcome.too_long} prompts left no room for a reply (finish: too_long)")


def _plan(model: str, max_new_tokens: int, *, as_json: bool) -> None:
    from selfinstruct.student.packages import require_packages

    require_packages()
    from dataclasses import asdict

    from selfinstruct.student import memory
    from selfinstruct.student.infer import infer_plan
    from selfinstruct.student.models import source, weights

    shape = memory.shape_of(weights.load_config(source.locate(model)))
    plans = infer_plan.table(shape, columns=256 + max_new_tokens)
    if as_json:
        result_json([{**asdict(plan), "total": plan.total} for plan in plans])
        return
    for line in infer_plan.shown(shape, plans):
        result(line)


class _Bar:
    """A bar on a terminal, a line every ten seconds elsewhere; log lines in both cases."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._shown = time.monotonic()

    def show(self, done: int, rows: int, tokens: int) -> None:
        if self._bar is None and sys.stderr.isatty():
            from tqdm.auto import tqdm

            self._bar = tqdm(total=rows, initial=done, unit="row", file=sys.stderr, dynamic_ncols=True)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{tokens} tokens", refresh=False)
            self._bar.update(done - self._bar.n)
        elif time.monotonic() - self._shown > 10:
            self._shown = time.monotonic()
            say(f"{done} of {rows} rows, {tokens} new tokens")

    def say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        say(line)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
