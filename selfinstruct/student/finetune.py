"""A fine-tuning run from start to end, resumable at every step: ``finetune`` is what the command calls."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from selfinstruct.durable import write_text
from selfinstruct.errors import UsageError
from selfinstruct.student import adapters, checkpoint, manifest, parallel, result, watchers
from selfinstruct.student.assembly import announce, build, explained
from selfinstruct.student.batches import steps_per_epoch
from selfinstruct.student.checkpoint import Position
from selfinstruct.student.lock import held
from selfinstruct.student.meter import Meter, Progress, matmul_rate
from selfinstruct.student.parallel import Group
from selfinstruct.student.prepare import Prepared, prepare, quieten
from selfinstruct.student.recipes import Recipe, Runtime
from selfinstruct.student.signals import signals_noted
from selfinstruct.student.trainer import StepResult

Say = Callable[[str], None]
LOG_FILE, LOCK_FILE = "log.jsonl", ".lock"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: "done", "limit" (``max_steps`` of this command) or "signal"; only "done" leaves a model.

    ``losses`` are those of the steps of this command. ``evaluations`` pairs a step with the validation loss after it
    (0: before the first). ``peak`` is the highest GPU memory of tensors in bytes, loading included, 0 on a CPU.
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


def finetune(
    data: str,
    model: str,
    run: Path,
    recipe: Recipe,
    runtime: Runtime,
    *,
    say: Say = lambda _line: None,
    on_progress: Callable[[Progress], None] = lambda _progress: None,
) -> Outcome:
    """Fine-tune ``model`` on ``data`` into the folder ``run``, or go on with the run that is there.

    Raises UsageError (IdentityError for a run that began otherwise), EnvironmentFault for what must be mended
    outside, among them memory that does not suffice, with the remedy.
    """
    quieten()
    adapters.require(recipe.method)
    watchers.require(runtime)
    group = parallel.join("cuda" if runtime.device != "cpu" and torch.cuda.is_available() else "cpu")
    quiet: Say = say if group.leads else lambda _line: None
    try:
        quiet(f"reading and tokenising {data} ...")
        prepared = prepare(data, model, recipe, runtime, group, run)
        with held(run, run / LOCK_FILE) if group.leads else nullcontext():
            if group.leads:
                manifest.freeze(run, prepared.manifest())
            group.wait()
            done = result.finished(run)
            if done is not None:
                return already(run, done, prepared)
            return _Run(run, prepared, runtime, group, quiet, on_progress).work()
    except torch.cuda.OutOfMemoryError as error:
        raise explained(error, recipe) from error
    finally:
        parallel.leave()


class _Run:
    """The parts of a run in motion."""

    def __init__(
        self, folder: Path, prepared: Prepared, runtime: Runtime, group: Group, say: Say,
        on_progress: Callable[[Progress], None],
    ) -> None:  # fmt: skip
        self.folder, self.prepared, self.runtime, self.group = folder, prepared, runtime, group
        self.say, self.on_progress = say, on_progress
        self.losses: list[float] = []
        self.evaluations: list[tuple[int, float]] = []
        self.speed = 0.0
        self.tokens = 0
        self.stop_signal = 0
        announce(prepared, say)
        say("loading the model ...")
        self.trainer, self.handle = build(prepared, runtime, group)
        adapted = prepared.recipe.method != "full"
        flops = (4.0 if adapted else 6.0) * prepared.shape.parameters
        rate = matmul_rate(prepared.device)
        self.meter = Meter(flops, rate * group.world if rate else None)
        self.peak = 0
        self.watchers: list[watchers.Watcher] = watchers.watchers(folder, runtime) if group.leads else []

    def work(self) -> Outcome:
        """All remaining steps."""
        start = self._resume()
        if self.prepared.device.type == "cuda":
            loaded = torch.cuda.max_memory_allocated(self.prepared.device)
            self.say("rehearsing the longest step (and compiling) ...")
            step = self.trainer.rehearse(self.say, may_shrink=not self.runtime.tokens and self.group.world == 1)
            predicted, self.peak = self.prepared.plan.allocated, max(loaded, step)
            self.say(f"tensors took {step / 1e9:.2f} GB at the peak (predicted {predicted / 1e9:.2f} GB), "
                     f"{loaded / 1e9:.2f} GB while the model was loaded; training")  # fmt: skip
        last = self.prepared.steps
        if self.runtime.max_steps:
            last = min(last, start + self.runtime.max_steps)
        if start == 0:
            self._evaluate(0)  # what the training starts from
        self.meter.start()
        with signals_noted(self._note):
            reached = self._loop(start, last)
        if reached < self.prepared.steps:
            self._save(reached)
            return self._outcome("signal" if self.stop_signal else "limit", reached, None)
        return self._finish()

    def _note(self, number: int) -> None:
        self.stop_signal = number

    def _loop(self, start: int, last: int) -> int:
        """Steps ``start`` to ``last``; how many steps are done in all. A step is read while the next one computes."""
        waiting: StepResult | None = None
        for step in range(start, last):
            current = self.trainer.step(step)
            if waiting is not None:
                self._report(waiting)
            waiting = current
            done = step + 1
            evaluates, saves = self._due(done, self.runtime.eval_every), self._due(done, self.runtime.save_every)
            stops = self._stopped()
            if evaluates or saves or stops or done == last:
                self._report(waiting)
                waiting = None
            if evaluates and self.prepared.validation is not None:
                self._evaluate(done)
            if saves and done < self.prepared.steps:
                self._save(done)
            if stops:
                return done
        return last

    def _stopped(self) -> bool:
        """Whether any process was told to stop: all must leave the loop at the same step."""
        if self.group.world == 1:
            return bool(self.stop_signal)
        told = self.group.sum(torch.tensor(float(self.stop_signal), device=self.prepared.device)).item()
        # Only ever set here: a signal that came while the others were asked is for the next step to tell.
        if told and not self.stop_signal:
            self.stop_signal = signal.SIGTERM
        return bool(told)

    def _due(self, done: int, every: int) -> bool:
        """Whether something that happens every so many steps (0: at the end of each epoch) is due."""
        period = every or steps_per_epoch(len(self.prepared.train), self.prepared.recipe.batch)
        return done % period == 0 or done == self.prepared.steps

    def _resume(self) -> int:
        """Load the newest checkpoint, if any; the first step to take."""
        found = checkpoint.newest(self.folder)
        if found is None:
            trim_log(self.folder / LOG_FILE, -1, self.group)
            return 0
        position = checkpoint.restore(found, self.trainer.optimizer, self.group)
        self.tokens = position.tokens
        trim_log(self.folder / LOG_FILE, position.step, self.group)
        self.say(f"going on after step {position.step} of {self.prepared.steps}")
        return position.step

    def _save(self, done: int) -> None:
        self.trainer.share.settle()
        checkpoint.save(self.folder, Position(done, self.tokens), self.trainer.optimizer, self.group, say=self.say)

    def _report(self, finished: StepResult) -> None:
        """Account for a step: log, progress, a stop when the loss is no number any more."""
        loss, norm = finished.read()
        self.losses.append(loss)
        self.tokens += finished.tokens
        self.speed = self.meter.finished(finished.tokens)
        done = finished.step + 1
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise UsageError(
                f"step {done}: the loss is {loss}, its gradient's norm {norm}: training has diverged",
                hint="lower --lr, or lengthen the warmup (--set warmup=0.1); the last checkpoint is untouched",
            )
        progress = Progress(
            done, self.prepared.steps, done / steps_per_epoch(len(self.prepared.train), self.prepared.recipe.batch),
            loss, finished.lr, norm, self.tokens, self.speed, self.meter.mfu(self.speed),
            self.meter.seconds_a_step() * (self.prepared.steps - done),
        )  # fmt: skip
        if self.group.leads:
            numbers = {"step": done, "loss": loss, "lr": finished.lr, "grad_norm": norm, "tokens": self.tokens,
                       "tokens_per_second": round(self.speed, 1), "mfu": progress.mfu}  # fmt: skip
            self._write(numbers)
            self.on_progress(progress)

    def _evaluate(self, done: int) -> None:
        if self.prepared.validation is None:
            return
        loss = self.trainer.evaluate(self.prepared.validation)
        self.evaluations.append((done, loss))
        self.say(f"step {done}: validation loss {loss:.4f}")
        if self.group.leads:
            self._write({"step": done, "eval_loss": loss})

    def _write(self, numbers: dict[str, Any]) -> None:
        with (self.folder / LOG_FILE).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(numbers) + "\n")
        for watcher in self.watchers:
            watcher(numbers)

    def _finish(self) -> Outcome:
        self.say("writing the model ...")
        self.trainer.share.settle()
        folder = result.save_model(
            self.folder, self.trainer.trainee, self.handle, tokenizer=self.prepared.tokenizer,
            template=self.prepared.template, group=self.group, sharded=self.trainer.share.splits_weights,
        )  # fmt: skip
        outcome = self._outcome("done", self.prepared.steps, folder)
        if self.group.leads:
            write_text(self.folder / result.RESULT_FILE, json.dumps({
                "steps": outcome.steps, "loss": self.losses[-1] if self.losses else None,
                "evaluations": self.evaluations, "tokens": self.tokens, "tokens_per_second": self.speed,
                "mfu": outcome.mfu, "peak_bytes": outcome.peak, "folder": folder.name if folder else None,
            }) + "\n")  # fmt: skip
            checkpoint.remove_unfinished(self.folder)
            for old in self.folder.glob("checkpoint-*"):
                shutil.rmtree(old, ignore_errors=True)
        return outcome

    def _outcome(self, end: str, step: int, folder: Path | None) -> Outcome:
        cuda = self.prepared.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.prepared.device) if cuda else 0
        return Outcome(
            end, step, self.prepared.steps, tuple(self.losses), tuple(self.evaluations), self.speed,
            self.meter.mfu(self.speed), max(self.peak, peak), folder, self.stop_signal,
        )  # fmt: skip


def already(run: Path, done: dict[str, Any], prepared: Prepared) -> Outcome:
    """The outcome of a run that was done before."""
    return Outcome(
        "done", prepared.steps, prepared.steps, (), tuple((int(s), float(x)) for s, x in done.get("evaluations", [])),
        float(done.get("tokens_per_second") or 0.0), done.get("mfu"), int(done.get("peak_bytes") or 0),
        run / str(done.get("folder")),
    )  # fmt: skip


def trim_log(path: Path, step: int, group: Group) -> None:
    """Drop log lines of steps that will be taken again."""
    if not group.leads or not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if _step_of(line) <= step]
    write_text(path, "".join(line + "\n" for line in kept))


def _step_of(line: str) -> float:
    """The step of a line of the log; infinite for one that was cut off in mid-air."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
