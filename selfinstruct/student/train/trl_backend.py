"""``finetune --backend trl``: the same run by TRL's SFTTrainer, for who wants to compare or to build on TRL.

The same rows, ids, labels, order, recipe, manifest and files as the native backend, so that merge, infer, export and
serve take either run; on the same batches the losses are the same. Its batches are padded: of instruction rows, a
third to a half of the tokens are filler. It runs in one process. In bf16 it keeps fp32 weights and computes in bf16
(autocast). Its checkpoints are those of transformers: the weights in safetensors, the optimizer in a ``torch.save``
file that transformers reads without running code (``weights_only``).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback

from selfinstruct.errors import (
    DamagedFile,
    EnvironmentFault,
    MissingPackage,
    ModelFileError,
    OutputError,
    SelfInstructError,
    UsageError,
)
from selfinstruct.student.lock import held
from selfinstruct.student.models import model_folder
from selfinstruct.student.train import adapters, batches, manifest, result, watchers
from selfinstruct.student.train.assembly import said_of_validation
from selfinstruct.student.train.finetune import LOCK_FILE, Say
from selfinstruct.student.train.ledger import Ledger, Outcome, already
from selfinstruct.student.train.meter import Progress
from selfinstruct.student.train.parallel import Group
from selfinstruct.student.train.prepare import Prepared, prepare, quieten
from selfinstruct.student.train.recipes import Recipe, Runtime
from selfinstruct.student.train.signals import signals_noted
from selfinstruct.student.train.trainee import Trainee

if TYPE_CHECKING:
    from selfinstruct.student.train.trl_trainer import OrderedTrainer

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_STATE = "trainer_state.json"  # written last: a checkpoint without it was cut off
_NEEDED = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


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
    """As ``finetune.finetune``, by TRL. Raises what that raises, and MissingPackage without trl."""
    quieten()
    require()
    adapters.require(recipe.method)
    watchers.require(runtime)
    suited = _suited(runtime)
    manifest.require_own(run)
    say(f"reading and tokenising {data} ...")
    prepared = prepare(data, model, recipe, suited, Group(), run, native=False)
    try:
        with held(run, run / LOCK_FILE):
            manifest.freeze(run, _manifest(prepared))
            done = result.finished(run)
            if done is not None:
                return already(done, prepared)
            return _Run(run, prepared, runtime, say, on_progress).work()
    except torch.cuda.OutOfMemoryError as error:
        raise EnvironmentFault(
            f"the GPU's memory does not suffice for TRL ({str(error).split('. ')[0]})",
            hint="give --tokens-per-micro-batch N, --checkpoint-layers 1, or --backend native, which needs less. "
            "The last checkpoint is untouched, the same command goes on from it",
        ) from error


def require() -> None:
    """MissingPackage without trl, before anything slow begins."""
    if importlib.util.find_spec("trl") is None:
        raise MissingPackage("--backend trl needs trl", hint="pip install 'selfinstruct[trl]'")


def _suited(runtime: Runtime) -> Runtime:
    """The runtime with what TRL does by itself filled in; UsageError for what it cannot do."""
    processes, gpus = int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.device_count()
    if processes > 1:
        raise UsageError(f"--backend trl runs in one process, not in {processes}", hint="use --backend native")
    if runtime.device != "cpu" and gpus > 1:
        raise UsageError(f"--backend trl runs on one GPU, and sees {gpus}", hint="export CUDA_VISIBLE_DEVICES=0")
    for flag, value, known in (
        ("--attention", runtime.attention, "sdpa"), ("--adam-state", runtime.adam_state, "fp32"),
    ):  # fmt: skip
        if value not in ("auto", known):
            raise UsageError(f"--backend trl has no {flag} {value}", hint=f"leave {flag} out, or use --backend native")
    return replace(runtime, attention="sdpa", adam_state="fp32")


def _manifest(prepared: Prepared) -> dict[str, Any]:
    """The manifest of such a run: the native backend does not go on with it, nor this one with a native run."""
    import trl

    found = prepared.manifest()
    found["numerics"]["backend"] = "trl"
    found["versions"]["trl"] = str(trl.__version__)
    return found


class _Run(TrainerCallback):
    """A run in motion: TRL calls it back after every step."""

    def __init__(
        self, folder: Path, prepared: Prepared, runtime: Runtime, say: Say, on_progress: Callable[[Progress], None]
    ) -> None:
        from selfinstruct.student.train.trl_trainer import model_for, trainer_for

        self.folder, self.prepared, self.runtime = folder, prepared, runtime
        self.say = say
        self.last = prepared.steps
        self.stop_signal = 0
        self.began = False
        self.ledger = Ledger(folder, prepared, runtime, say=say, on_progress=on_progress)
        say("loading the model ...")
        model, self.handle = model_for(prepared)
        self.trainer: OrderedTrainer
        try:
            trained = model if self.handle is None else self.handle
            self.trainer, self.order = trainer_for(prepared, trained, folder, self)
        except (ValueError, ImportError, NotImplementedError) as error:
            raise UsageError(f"TRL refuses this run ({_short(error)})", hint="use --backend native") from error
        self._announce()

    def work(self) -> Outcome:
        """All remaining steps."""
        found = newest(self.folder)
        if found is not None:
            require_whole(found, "model" if self.handle is None else "adapter_model")
        start = 0 if found is None else _step_of(found)
        self.ledger.begin(start, sum(self._tokens_in(step) for step in range(start)))
        if found is not None:
            self.say(f"going on after step {start} of {self.prepared.steps}")
        if self.runtime.max_steps:
            self.last = min(self.last, start + self.runtime.max_steps)
        with signals_noted(self._note):
            self._train(found)
        reached = self.trainer.state.global_step
        if reached < self.prepared.steps:
            return self.ledger.outcome("signal" if self.stop_signal else "limit", reached, signal=self.stop_signal)
        return self._finish()

    def _train(self, resumed: Path | None) -> None:
        try:
            self.trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        except (torch.OutOfMemoryError, SelfInstructError):
            raise
        except Exception as error:  # a checkpoint that was cut off makes torch and transformers raise anything
            said = _short(error)
            if resumed is not None and not self.began:
                raise DamagedFile(f"{resumed}: cannot be read ({said})", hint=f"remove it: rm -r {resumed}") from error
            # torch's own writer says in words of its own that a disk is full.
            unwritten = any(word in said for word in ("PytorchStreamWriter", "inline_container"))
            if unwritten or isinstance(error, OSError | SafetensorError):
                raise OutputError(f"{self.folder}: cannot be written ({said})", hint="free disk space") from error
            raise

    def _note(self, number: int) -> None:
        self.stop_signal = number

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The checkpoint, if any, is loaded; the clock starts."""
        self.began = True
        if state.global_step == 0:
            self._evaluate(0)  # what the training starts from
        self.ledger.meter.start()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say which epoch's order the next rows come from."""
        self.order.epoch = state.global_step // self.ledger.each_epoch

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Decide about a checkpoint and about going on; the log, and so ``on_log``, comes in between."""
        done = state.global_step
        ends = done >= self.last or bool(self.stop_signal)
        control.should_training_stop = control.should_training_stop or ends
        control.should_save = done < self.prepared.steps and (ends or self.ledger.due(done, self.runtime.save_every))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say so."""
        self.say(f"step {state.global_step}: checkpoint")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Account for a step."""
        if not logs or "loss" not in logs:
            return  # TRL's summary at the end
        done = state.global_step
        loss, norm, lr = (float(logs[name]) for name in ("loss", "grad_norm", "learning_rate"))
        self.ledger.step(done, loss, norm, lr, self._tokens_in(done - 1))
        if self.ledger.due(done, self.runtime.eval_every):
            self._evaluate(done)

    def _tokens_in(self, step: int) -> int:
        train, recipe = self.prepared.train, self.prepared.recipe
        return int(train.lengths[batches.step_rows(len(train), recipe.batch, recipe.seed, step)].sum())

    def _evaluate(self, done: int) -> None:
        from selfinstruct.student.train.trl_trainer import validation_loss

        if self.prepared.validation:
            self.ledger.evaluated(done, validation_loss(self.trainer, self.prepared.validation))

    def _finish(self) -> Outcome:
        self.say("writing the model ...")
        model: Any = self.trainer.model
        if self.handle is None:
            model.to(self.prepared.dtype)
            model.config.dtype = self.prepared.dtype
        folder = result.save_model(
            self.folder, Trainee(model), self.handle, tokenizer=self.prepared.tokenizer,
            template=self.prepared.template, group=Group(), sharded=False,
        )  # fmt: skip
        outcome = self.ledger.outcome("done", self.prepared.steps, folder)
        for old in self.folder.glob("checkpoint-*"):
            if _CHECKPOINT.fullmatch(old.name):
                shutil.rmtree(old, ignore_errors=True)
        return outcome

    def _announce(self) -> None:
        """What runs, before it does."""
        train, recipe, args = self.prepared.train, self.prepared.recipe, self.trainer.args
        self.say(
            f"{len(train)} rows, {int(train.starts[-1])} tokens, {int(train.labels.sum())} labels; "
            f"{train.truncated} rows cut at {recipe.max_length} tokens, {train.dropped} left out"
        )
        if self.prepared.validation is not None:
            self.say(said_of_validation(self.prepared, self.prepared.validation))
        self.say(
            f"TRL, {self.prepared.steps} steps of {recipe.batch} rows in padded micro-batches of "
            f"{args.per_device_train_batch_size}, template {self.prepared.template.name}, method {recipe.method}, "
            f"on {self.prepared.device} in {str(self.prepared.dtype).removeprefix('torch.')}"
        )


def newest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, None without one."""
    found = [path for path in run.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name) and (path / _STATE).exists()]
    return max(found, key=_step_of, default=None)


def require_whole(checkpoint: Path, weights: str) -> None:
    """DamagedFile for a checkpoint that lacks a file: TRL would go on without it, with a fresh Adam or other rows."""
    hint = f"remove it: rm -r {checkpoint}"
    files = {path.name for path in checkpoint.iterdir()}
    lacking = [name for name in _NEEDED if name not in files]
    if not files & {f"{weights}.safetensors", f"{weights}.safetensors.index.json"}:
        lacking.append(f"{weights}.safetensors")
    if lacking:
        raise DamagedFile(f"{checkpoint}: lacks {', '.join(lacking)}", hint=hint)
    try:
        model_folder.require_weights(checkpoint, weights)
    except ModelFileError as error:
        raise DamagedFile(f"{checkpoint}: cannot be read ({error.message})", hint=hint) from error


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
