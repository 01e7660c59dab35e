"""TensorBoard and Weights & Biases: optional, asked for by a flag."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from selfinstruct.errors import MissingPackage
from selfinstruct.student.recipes import Runtime

Watcher = Callable[[Mapping[str, Any]], None]


def watchers(run: Path, runtime: Runtime) -> list[Watcher]:
    """One function for each service asked for; each takes the numbers of a step. MissingPackage without its package."""
    found: list[Watcher] = []
    if runtime.tensorboard:
        if importlib.util.find_spec("tensorboard") is None:
            raise MissingPackage("--tensorboard needs tensorboard", hint="pip install tensorboard")
        found.append(_tensorboard(run))
    if runtime.wandb:
        if importlib.util.find_spec("wandb") is None:
            raise MissingPackage("--wandb needs wandb", hint="pip install wandb")
        found.append(_wandb(run))
    return found


def _tensorboard(run: Path) -> Watcher:
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(run / "tensorboard"))

    def write(numbers: Mapping[str, Any]) -> None:
        for name, value in numbers.items():
            if name != "step" and value is not None:
                writer.add_scalar(name, value, numbers["step"])
        writer.flush()

    return write


def _wandb(run: Path) -> Watcher:
    import wandb  # type: ignore[import-not-found,unused-ignore]

    session: Any = wandb.init(project="selfinstruct", name=run.name, dir=str(run))

    def write(numbers: Mapping[str, Any]) -> None:
        session.log({name: value for name, value in numbers.items() if name != "step"}, step=numbers["step"])

    return write
