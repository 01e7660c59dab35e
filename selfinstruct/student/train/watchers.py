"""TensorBoard and Weights & Biases: optional, asked for by a flag. A resumed run goes on in the same curves."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from selfinstruct.durable import write_text
from selfinstruct.errors import EnvironmentFault, MissingPackage
from selfinstruct.student.disk import writing
from selfinstruct.student.train.recipes import Runtime

Watcher = Callable[[Mapping[str, Any]], None]
ID_FILE = "wandb-id"
_ID = re.compile(r"[\w-]{1,128}")


def watchers(run: Path, runtime: Runtime) -> list[Watcher]:
    """One function for each service asked for; each takes the numbers of a step. MissingPackage without its package,
    EnvironmentFault when it will not begin, OutputError."""
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

    writer: Any = None

    def write(numbers: Mapping[str, Any]) -> None:
        nonlocal writer
        with writing(run / "tensorboard"):
            if writer is None:  # steps after a checkpoint are taken again: what was shown of them goes
                writer = SummaryWriter(str(run / "tensorboard"), purge_step=numbers["step"])
            _add(writer, numbers)

    return write


def _add(writer: Any, numbers: Mapping[str, Any]) -> None:
    for name, value in numbers.items():
        if name != "step" and value is not None:
            writer.add_scalar(name, value, numbers["step"])
    writer.flush()


def _wandb(run: Path) -> Watcher:
    import wandb  # type: ignore[import-not-found,unused-ignore]

    file = run / ID_FILE
    known = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
    before = {"id": known, "resume": "allow"} if _ID.fullmatch(known) else {}
    try:
        session: Any = wandb.init(project="selfinstruct", name=run.resolve().name, dir=str(run), **before)
    except Exception as error:  # errors of its own, by no system
        raise EnvironmentFault(
            f"--wandb: Weights & Biases does not begin ({' '.join(str(error).split())[:300]})",
            hint="wandb login, or export WANDB_API_KEY=..., or export WANDB_MODE=offline",
        ) from error
    with writing(file):
        write_text(file, f"{session.id}\n")

    def write(numbers: Mapping[str, Any]) -> None:
        session.log({name: value for name, value in numbers.items() if name != "step"}, step=numbers["step"])

    return write
