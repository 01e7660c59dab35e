"""Several processes, one a GPU, as torchrun starts them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from selfinstruct.errors import EnvironmentFault, SelfInstructError
from selfinstruct.student.train.sharing import Alone, Copies, States, Weights
from selfinstruct.student.train.trainee import Trainee

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Group:
    """This process among its fellows. ``world == 1``: alone, and nothing here does anything."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """True in the one process that writes and prints."""
        return self.rank == 0

    def wait(self) -> None:
        """Meet the others."""
        if self.world > 1:
            dist.barrier()

    def agree(self, work: Callable[[], _T]) -> _T:
        """What ``work`` gives, once it is done in all processes. An error of ours in any of them is raised in all: who
        waited for one that has ended would end with a traceback."""
        if self.world == 1:
            return work()
        given: Any = None
        error: SelfInstructError | None = None
        try:
            given = work()
        except SelfInstructError as caught:
            error = caught
        errors: list[SelfInstructError | None] = [None] * self.world
        dist.all_gather_object(errors, error)
        if error is not None:
            raise error
        for theirs in errors:
            if theirs is not None:
                raise theirs
        found: _T = given
        return found

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(value)
        return value


def join(device_type: str) -> Group:
    """Enter the group that torchrun announced in the environment; alone without one."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Group()
    if device_type == "cuda":
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if here > gpus:
            raise EnvironmentFault(f"{here} processes were started for {gpus} GPUs", hint=f"--nproc-per-node {gpus}")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        # The others wait while one writes the model: for a large one on a slow disk, more than the usual ten minutes.
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=timedelta(hours=2))
    return Group(dist.get_rank(), world, int(os.environ.get("LOCAL_RANK", "0")))


def lost(error: RuntimeError, group: Group) -> EnvironmentFault | None:
    """What to say in a process that waited for another one, which has ended and told why; None for other errors."""
    about_peers = isinstance(error, dist.DistError) or "gloo" in str(error).lower()
    if group.world == 1 or not about_peers:
        return None
    return EnvironmentFault(
        "another process of this run has ended", hint="it says why, or was killed; the same command goes on"
    )


def leave() -> None:
    """Leave the group."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def share(trainee: Trainee, group: Group, method: str, scheme: str) -> Alone:
    """How ``group`` shares the training of ``trainee``: adapters as copies, full training by ``scheme``."""
    if group.world == 1:
        return Alone()
    if method != "full":
        return Copies()
    return States(trainee, group.rank, group.world) if scheme == "states" else Weights(trainee, group.world)
