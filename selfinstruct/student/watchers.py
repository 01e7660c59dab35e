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
    require(runtime)
    asked = {_tensorboard: runtime.tensorboard, _wandb: runtime.wandb}
    return [opened(run) for opened, wanted in asked.items() if wanted]


def require(runtime: Runtime) -> None:
    """MissingPackage when a service's package is not there, before anything slow begins."""
    for package, wanted in (("tensorboard", runtime.tensorboard), ("wandb", runtime.wandb)):
        if wanted and importlib.util.find_spec(package) is None:
            raise MissingPackage(f"--{package} needs {package}", hint=f"pip install {package}")


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
