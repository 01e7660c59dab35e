"""Several processes, one a GPU, as torchrun starts them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from selfinstruct.student.sharing import Alone, Copies, States, Weights
from selfinstruct.student.trainee import Trainee


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
    if not dist.is_initialized():
        # The others wait while one writes the model: for a large one on a slow disk, more than the usual ten minutes.
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=timedelta(hours=2))
    return Group(dist.get_rank(), world, int(os.environ.get("LOCAL_RANK", "0")))


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
