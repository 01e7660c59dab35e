"""Several processes, one a GPU: started by torchrun, sharded by FSDP2 for full fine-tuning, copies for adapters."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

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


def shard(trainee: Trainee, *, keep_gathered: bool) -> None:
    """Split every parameter over all processes (FSDP2): layer by layer, then what is left.

    Weights stay in their dtype; the optimizer keeps the exact masters of its own shard. ``keep_gathered`` leaves the
    weights whole between the passes: a copy of them for half of the communication.
    """
    from torch.distributed.fsdp import fully_shard

    apply: Callable[..., Any] = fully_shard
    for layer in trainee.layers():
        apply(layer, reshard_after_forward=not keep_gathered)
    apply(trainee, reshard_after_forward=False)


def sum_gradients(trainee: Trainee, group: Group) -> None:
    """Add the gradients of copies: for adapters, whose gradients are a few MB."""
    if group.world == 1:
        return
    for _, parameter in trainee.named_trained():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter, dtype=getattr(parameter, "grad_dtype", None))
        dist.all_reduce(parameter.grad)
