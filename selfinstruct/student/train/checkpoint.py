"""Checkpoints of a run: weights, optimizer, random states and position, in safetensors and JSON, never pickle.

A checkpoint is a folder ``checkpoint-00000120`` that appears whole by a rename; the one before is removed after that.
The data position is the step itself, because the rows of a step follow from it. Each process of a sharded run writes
its own shard, so a sharded run is resumed by as many processes as it had.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from selfinstruct.durable import publish, write_text
from selfinstruct.errors import DamagedFile, OutputError
from selfinstruct.student.train.optimizer import SplitAdamW
from selfinstruct.student.train.parallel import Group

_NAME = re.compile(r"checkpoint-(\d{8})")
_FILE_BYTES = 4 << 30
STATE_FILE = "state.json"  # written last
# What several processes wrote parts of before checkpoints named it.
_BEFORE = "weights"


@dataclass(frozen=True, slots=True)
class Position:
    """How far a checkpointed run had come: finished steps, real tokens seen."""

    step: int
    tokens: int


def save(
    run: Path, position: Position, optimizer: SplitAdamW, group: Group, *,
    say: Callable[[str], None] = lambda _line: None,
) -> Path:  # fmt: skip
    """Write a checkpoint and remove older ones. OutputError when the disk has no room for it."""
    target = run / f"checkpoint-{position.step:08d}"
    if _whole(target):
        return target
    say(f"step {position.step}: checkpoint")
    work = run / f".{target.name}.tmp"

    def done(part: Callable[[], None], *, by_all: bool = False) -> None:
        """A part of it, by the leader or ``by_all``, before anybody begins the next one."""

        def mapped() -> None:
            try:
                if by_all or group.leads:
                    part()
            except (OSError, SafetensorError) as error:
                raise OutputError(f"{target}: cannot be written ({error})", hint="free disk space") from error

        group.agree(mapped)

    done(lambda: _begin(run, work, optimizer, group))
    done(lambda: _write_tensors(work, optimizer, group), by_all=True)
    done(lambda: _end(run, work, target, position, optimizer, group))
    return target


def _begin(run: Path, work: Path, optimizer: SplitAdamW, group: Group) -> None:
    """The folder to write to, on a disk that has room."""
    needed = sum(t.numel() * t.element_size() for _, t in _tensors(optimizer))
    remove_unfinished(run)
    work.mkdir(parents=True)
    free = shutil.disk_usage(run).free
    if free < needed * group.world * 1.02:
        raise OutputError(
            f"{run}: a checkpoint needs {needed * group.world / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            hint="free disk space, choose another -o, or save less often with --save-every",
        )


def _end(run: Path, work: Path, target: Path, position: Position, optimizer: SplitAdamW, group: Group) -> None:
    """The position beside the tensors, the folder's name, and the end of the checkpoints before."""
    state = {"step": position.step, "tokens": position.tokens, "updates": optimizer.steps, "world": group.world,
             "shard": optimizer.share.name}  # fmt: skip
    write_text(work / STATE_FILE, json.dumps(state) + "\n")
    if target.is_dir():  # what is left of one: ``incomplete``
        shutil.rmtree(target)
    publish(work, target)
    for other in _named(run):
        if other != target:
            shutil.rmtree(other, ignore_errors=True)


def remove_unfinished(run: Path) -> None:
    """Remove what processes that were killed while they saved have left: as large as a checkpoint each."""
    for work in run.glob(".checkpoint-*.tmp"):
        if _NAME.fullmatch(work.name[1:-4]):
            shutil.rmtree(work, ignore_errors=True)


def remove_all(run: Path) -> None:
    """Remove the checkpoints of a run that is done, and what was left of unfinished ones."""
    remove_unfinished(run)
    for old in _named(run):
        shutil.rmtree(old, ignore_errors=True)


def newest(run: Path) -> Path | None:
    """The newest checkpoint of a run, None without one."""
    found = _all(run)
    return found[-1] if found else None


def incomplete(run: Path) -> list[Path]:
    """Folders with a checkpoint's name that lack the file written last: nothing can go on from them."""
    return [path for path in _named(run) if not _whole(path)]


def scheme(run: Path) -> str:
    """Which parts the processes of a run's newest checkpoint wrote, a scheme's name; "" without one."""
    found = newest(run)
    try:
        state = json.loads((found / STATE_FILE).read_text(encoding="utf-8")) if found else {"world": 1}
        return str(state.get("shard", _BEFORE if int(state["world"]) > 1 else ""))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""  # ``restore`` says what is wrong with it


def restore(folder: Path, optimizer: SplitAdamW, group: Group) -> Position:
    """Load a checkpoint into the optimizer and its parameters, and set the random states; where to go on."""
    position, optimizer.steps = group.agree(lambda: _read(folder, optimizer, group))
    for parameter in optimizer.parameters.values():
        optimizer.share.updated(parameter)  # parts of it came from this file, the others from their processes
    optimizer.share.all_updated()
    optimizer.share.settle()
    return position


def _read(folder: Path, optimizer: SplitAdamW, group: Group) -> tuple[Position, int]:
    """This process's part of a checkpoint, put where it belongs; its position, and the updates until then."""
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        position, updates = Position(int(state["step"]), int(state["tokens"])), int(state["updates"])
        world, parts = int(state["world"]), str(state.get("shard", _BEFORE if optimizer.share.name else ""))
        if f"checkpoint-{position.step:08d}" != folder.name:
            raise ValueError(f"{STATE_FILE} says that it is of step {position.step}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedFile(f"{folder}: cannot be read ({error})", hint=f"remove it: rm -r {folder}") from error
    if world != group.world:
        raise OutputError(
            f"{folder}: was written by {world} processes, and this run has {group.world}",
            hint=f"resume with {world}: torchrun --nproc-per-node {world} ...",
        )
    if parts != optimizer.share.name:
        raise OutputError(f"{folder}: was written with --shard {parts}", hint=f"resume with --shard {parts}")
    wanted = dict(_tensors(optimizer))
    seen = set()
    for file in sorted(folder.glob(f"rank{group.rank:03d}-*.safetensors")):
        try:
            with safe_open(file, "pt", device="cpu") as stored:
                for name in stored.keys():  # noqa: SIM118 - not a mapping
                    _put(wanted, name, stored.get_tensor(name), file)
                    seen.add(name)
        except (SafetensorError, OSError) as error:
            raise DamagedFile(f"{file}: cannot be read ({error})", hint=f"remove {folder}") from error
    missing = set(wanted) - seen
    if missing:
        raise DamagedFile(f"{folder}: lacks {len(missing)} tensors ({min(missing)} ...)", hint=f"remove {folder}")
    return position, updates


@torch.no_grad()
def _put(wanted: dict[str, torch.Tensor], name: str, stored: torch.Tensor, file: Path) -> None:
    """Copy a stored tensor where it belongs."""
    if name == "random/cpu":
        torch.set_rng_state(stored)
    elif name == "random/cuda":
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(stored)
    elif name not in wanted or wanted[name].shape != stored.shape or wanted[name].dtype != stored.dtype:
        raise DamagedFile(f"{file}: holds {name}, which does not fit this model", hint="choose another folder with -o")
    else:
        wanted[name].copy_(stored)


def _tensors(optimizer: SplitAdamW) -> Iterator[tuple[str, torch.Tensor]]:
    """All that a run has learnt: trained weights and optimizer state, this process's part."""
    for name, parameter in optimizer.parameters.items():
        yield f"weight/{name}", optimizer.share.weight(parameter)
    for name, tensor in optimizer.state_tensors().items():
        yield f"state/{name}", tensor


def _write_tensors(work: Path, optimizer: SplitAdamW, group: Group) -> None:
    """Write in files of about 4 GB: the host's memory holds one file at a time."""
    random = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["random/cuda"] = torch.cuda.get_rng_state()
    part: dict[str, torch.Tensor] = {**random}
    size = number = 0
    for name, tensor in _tensors(optimizer):
        part[name] = tensor.detach().cpu().contiguous()
        size += tensor.numel() * tensor.element_size()
        if size >= _FILE_BYTES:
            save_file(part, work / f"rank{group.rank:03d}-{number:05d}.safetensors")
            part, size, number = {}, 0, number + 1
    if part:
        save_file(part, work / f"rank{group.rank:03d}-{number:05d}.safetensors")


def _all(run: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return [path for path in _named(run) if _whole(path)]


def _named(run: Path) -> list[Path]:
    """Folders with a checkpoint's name, oldest first: nobody else's are looked at, and none of theirs removed."""
    return sorted(path for path in run.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir())


def _whole(folder: Path) -> bool:
    return (folder / STATE_FILE).is_file()
