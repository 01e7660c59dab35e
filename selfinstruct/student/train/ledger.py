"""The account of a run, whichever backend trains: losses, tokens, speed, the log file, and how the run ended."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from selfinstruct.durable import write_text
from selfinstruct.errors import UsageError
from selfinstruct.student.disk import writing
from selfinstruct.student.train import result, watchers
from selfinstruct.student.train.batches import steps_per_epoch
from selfinstruct.student.train.meter import Meter, Progress, matmul_rate
from selfinstruct.student.train.prepare import Prepared
from selfinstruct.student.train.recipes import Runtime

LOG_FILE = "log.jsonl"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: "done", "limit" (``max_steps`` of this command) or "signal"; only "done" leaves a model.

    ``losses`` are those of the steps of this command, ``loss`` is the last one of all. ``evaluations`` pairs a step
    with the validation loss after it (0: before the first). ``peak`` is the highest GPU memory of tensors in bytes,
    loading included, 0 on a CPU.
    """

    end: str
    step: int
    steps: int
    losses: tuple[float, ...]
    evaluations: tuple[tuple[int, float], ...]
    tokens_per_second: float
    mfu: float | None
    peak: int
    folder: Path | None
    signal: int = 0
    loss: float | None = None


class Ledger:
    """What a run in motion has done so far. Of several processes only the one that ``writes`` keeps files."""

    def __init__(
        self, folder: Path, prepared: Prepared, runtime: Runtime, *, processes: int = 1, writes: bool = True,
        say: Callable[[str], None], on_progress: Callable[[Progress], None],
    ) -> None:  # fmt: skip
        self.folder, self.prepared, self.writes = folder, prepared, writes
        self.say, self.on_progress = say, on_progress
        self.tokens, self.peak = 0, 0
        self.losses: list[float] = []
        self.evaluations: list[tuple[int, float]] = []
        self.each_epoch = steps_per_epoch(len(prepared.train), prepared.recipe.batch)
        rate = matmul_rate(prepared.device)
        parameters = prepared.shape.parameters if prepared.shape else 0  # unknown on a CPU, which has no rate either
        flops = (6.0 if prepared.recipe.method == "full" else 4.0) * parameters
        self.meter = Meter(flops, rate * processes if rate else None)
        self.speed = 0.0
        self._watchers: list[watchers.Watcher] = watchers.watchers(folder, runtime) if writes else []

    def begin(self, step: int, tokens: int) -> None:
        """Go on after ``step`` steps with ``tokens`` tokens: lines of later steps leave the log, since they will be
        taken again."""
        self.tokens = tokens
        path = self.folder / LOG_FILE
        if not self.writes or not path.exists():
            return
        last = step or -1  # the validation loss before the first step is taken again too
        with writing(path):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            write_text(path, "".join(f"{line}\n" for line in lines if _step_of(line) <= last))

    def due(self, done: int, every: int) -> bool:
        """Whether something that happens every so many steps (0: at the end of each epoch) is due."""
        return done % (every or self.each_epoch) == 0 or done == self.prepared.steps

    def step(self, done: int, loss: float, norm: float, lr: float, tokens: int) -> None:
        """Account for step ``done`` (from 1) and show it; UsageError when its loss is no number any more."""
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise UsageError(
                f"step {done}: the loss is {loss}, its gradient's norm {norm}: training has diverged",
                hint="begin anew in another folder (-o) with a lower --lr, or a longer warmup (--set warmup=0.1): the "
                "last checkpoint may hold what has diverged",
            )
        self.losses.append(loss)
        self.tokens += tokens
        self.speed = self.meter.finished(tokens)
        mfu, steps = self.meter.mfu(self.speed), self.prepared.steps
        if self.writes:
            self._write({"step": done, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": self.tokens,
                         "tokens_per_second": round(self.speed, 1), "mfu": mfu})  # fmt: skip
            left = self.meter.seconds_a_step() * (steps - done)
            self.on_progress(
                Progress(done, steps, done / self.each_epoch, loss, lr, norm, self.tokens, self.speed, mfu, left)
            )

    def evaluated(self, done: int, loss: float) -> None:
        """Account for the validation loss after step ``done`` (0: before the first)."""
        self.evaluations.append((done, loss))
        self.say(f"step {done}: validation loss {loss:.4f}")
        if self.writes:
            self._write({"step": done, "eval_loss": loss})

    def outcome(self, end: str, step: int, folder: Path | None = None, signal: int = 0) -> Outcome:
        """How the run ended; of one that is done, also for who asks later (``already``)."""
        device = self.prepared.device
        seen = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        found = Outcome(
            end, step, self.prepared.steps, tuple(self.losses), tuple(self.evaluations), self.speed,
            self.meter.mfu(self.speed), max(self.peak, seen), folder, signal, self.losses[-1] if self.losses else None,
        )  # fmt: skip
        if end == "done" and self.writes:
            path = self.folder / result.RESULT_FILE
            with writing(path):
                write_text(path, json.dumps({
                    "steps": found.steps, "loss": found.loss,
                    "evaluations": self.evaluations, "tokens": self.tokens, "tokens_per_second": self.speed,
                    "mfu": found.mfu, "peak_bytes": found.peak, "folder": folder.name if folder else None,
                }) + "\n")  # fmt: skip
        return found

    def _write(self, numbers: Mapping[str, Any]) -> None:
        path = self.folder / LOG_FILE
        with writing(path), path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(numbers) + "\n")
        for watcher in self._watchers:
            watcher(numbers)


def already(done: result.Result, prepared: Prepared) -> Outcome:
    """The outcome of a run that was done before."""
    return Outcome(
        "done", prepared.steps, prepared.steps, (), done.evaluations, done.tokens_per_second, done.mfu, done.peak,
        done.folder, loss=done.loss,
    )  # fmt: skip


def _step_of(line: str) -> float:
    """The step of a line of the log; infinite for one that was cut off in mid-air."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
