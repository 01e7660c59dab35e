"""A fine-tuning run from start to end, resumable at every step: ``finetune`` is what the command calls."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from selfinstruct.student.lock import held
from selfinstruct.student.train import adapters, checkpoint, manifest, parallel, result, watchers
from selfinstruct.student.train.assembly import announce, build, explained
from selfinstruct.student.train.checkpoint import Position
from selfinstruct.student.train.ledger import Ledger, Outcome, already
from selfinstruct.student.train.meter import Progress
from selfinstruct.student.train.parallel import Group
from selfinstruct.student.train.prepare import Prepared, prepare, quieten
from selfinstruct.student.train.recipes import Recipe, Runtime
from selfinstruct.student.train.signals import signals_noted
from selfinstruct.student.train.trainer import StepResult

Say = Callable[[str], None]
LOCK_FILE = ".lock"


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
        group.agree(lambda: manifest.require_own(run))
        quiet(f"reading and tokenising {data} ...")
        prepared = group.agree(lambda: prepare(data, model, recipe, runtime, group, run))
        with ExitStack() as stack:

            def claim() -> None:
                if group.leads:
                    stack.enter_context(held(run, run / LOCK_FILE))
                    manifest.freeze(run, prepared.manifest())

            group.agree(claim)
            done = group.agree(lambda: result.finished(run))
            if done is not None:
                return already(done, prepared)
            return _Run(run, prepared, runtime, group, quiet, on_progress).work()
    except torch.cuda.OutOfMemoryError as error:
        told = explained(error, recipe)
        if not group.leads:  # the leader, which reports for all, cannot know it
            say(f"process {group.rank}: {told.message}")
        raise told from error
    except RuntimeError as error:
        if (lost := parallel.lost(error, group)) is not None:
            raise lost from error
        raise
    finally:
        parallel.leave()


class _Run:
    """The parts of a run in motion."""

    def __init__(
        self, folder: Path, prepared: Prepared, runtime: Runtime, group: Group, say: Say,
        on_progress: Callable[[Progress], None],
    ) -> None:  # fmt: skip
        self.folder, self.prepared, self.runtime, self.group = folder, prepared, runtime, group
        self.say = say
        self.stop_signal = 0
        announce(prepared, say)
        self.ledger = group.agree(lambda: Ledger(
            folder, prepared, runtime, processes=group.world, writes=group.leads, say=say, on_progress=on_progress
        ))  # fmt: skip
        say("loading the model ...")
        self.trainer, self.handle = build(prepared, runtime, group)

    def work(self) -> Outcome:
        """All remaining steps."""
        start = self._resume()
        if self.prepared.device.type == "cuda":
            loaded = torch.cuda.max_memory_allocated(self.prepared.device)
            self.say("rehearsing the longest step (and compiling) ...")
            step = self.trainer.rehearse(self.say, may_shrink=not self.runtime.tokens and self.group.world == 1)
            predicted, self.ledger.peak = self.prepared.plan.allocated, max(loaded, step)
            self.say(f"tensors took {step / 1e9:.2f} GB at the peak (predicted {predicted / 1e9:.2f} GB), "
                     f"{loaded / 1e9:.2f} GB while the model was loaded; training")  # fmt: skip
        last = self.prepared.steps
        if self.runtime.max_steps:
            last = min(last, start + self.runtime.max_steps)
        if start == 0:
            self._evaluate(0)  # what the training starts from
        self.ledger.meter.start()
        with signals_noted(self._note):
            reached = self._loop(start, last)
        if reached < self.prepared.steps:
            self._save(reached)
            return self.ledger.outcome("signal" if self.stop_signal else "limit", reached, signal=self.stop_signal)
        return self._finish()

    def _note(self, number: int) -> None:
        self.stop_signal = number

    def _loop(self, start: int, last: int) -> int:
        """Steps ``start`` to ``last``; how many steps are done in all. A step is read while the next one computes."""
        waiting: StepResult | None = None
        before: StepResult | None = None
        for step in range(start, last):
            self.trainer.tells = bool(self.stop_signal)
            current = self.trainer.step(step)
            if waiting is not None:
                self._report(waiting)
            waiting = current
            done = step + 1
            due = self.ledger.due
            evaluates, saves = due(done, self.runtime.eval_every), due(done, self.runtime.save_every)
            stops = self._stopped(before)
            before = current
            if evaluates or saves or stops or done == last:
                self._report(waiting)
                waiting = None
            if evaluates:
                self._evaluate(done)
            if saves and done < self.prepared.steps:
                self._save(done)
            if stops:
                return done
        return last

    def _stopped(self, before: StepResult | None) -> bool:
        """Whether to leave the loop. Of several processes all leave it at the same step: one after the step with which
        any of them told the others of its signal."""
        if self.group.world == 1:
            return bool(self.stop_signal)
        told = before is not None and before.told()
        if told and not self.stop_signal:
            self.stop_signal = signal.SIGTERM
        return told

    def _resume(self) -> int:
        """Load the newest checkpoint, if any; the first step to take."""
        found, position = checkpoint.newest(self.folder), Position(0, 0)
        for cut_off in checkpoint.incomplete(self.folder):
            self.say(f"{cut_off}: has no {checkpoint.STATE_FILE}, so it is passed over, and replaced by the next one")
        if found is not None:
            position = checkpoint.restore(found, self.trainer.optimizer, self.group)
            self.say(f"going on after step {position.step} of {self.prepared.steps}")
        self.group.agree(lambda: self.ledger.begin(position.step, position.tokens))
        return position.step

    def _save(self, done: int) -> None:
        self.trainer.share.settle()
        position = Position(done, self.ledger.tokens)
        checkpoint.save(self.folder, position, self.trainer.optimizer, self.group, say=self.say)

    def _report(self, finished: StepResult) -> None:
        loss, norm = finished.read()
        self.ledger.step(finished.step + 1, loss, norm, finished.lr, finished.tokens)

    def _evaluate(self, done: int) -> None:
        if self.prepared.validation:
            self.ledger.evaluated(done, self.trainer.evaluate(self.prepared.validation))

    def _finish(self) -> Outcome:
        self.say("writing the model ...")
        self.trainer.share.settle()
        folder = result.save_model(
            self.folder, self.trainer.trainee, self.handle, tokenizer=self.prepared.tokenizer,
            template=self.prepared.template, group=self.group, sharded=self.trainer.share.splits_weights,
        )  # fmt: skip
        outcome = self.group.agree(lambda: self.ledger.outcome("done", self.prepared.steps, folder))
        if self.group.leads:
            checkpoint.remove_all(self.folder)
        return outcome
