"""What a finished run leaves: a model or an adapter with tokenizer, template and provenance beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from selfinstruct.errors import DamagedFile
from selfinstruct.student.models import model_folder
from selfinstruct.student.prompt import Template
from selfinstruct.student.train.manifest import RUN_FILE
from selfinstruct.student.train.parallel import Group
from selfinstruct.student.train.trainee import Trainee

MODEL, ADAPTER, RESULT_FILE = "model", "adapter", "result.json"


@dataclass(frozen=True, slots=True)
class Result:
    """What ``result.json`` says of a run that is done; ``folder`` holds its model or adapter."""

    folder: Path
    loss: float | None
    evaluations: tuple[tuple[int, float], ...]
    tokens_per_second: float
    mfu: float | None
    peak: int


def finished(run: Path) -> Result | None:
    """The result of a run that is done, None for one that is not. DamagedFile when it cannot be read, or when what it
    names is gone."""
    path = run / RESULT_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        name, loss, mfu = str(found["folder"]), found.get("loss"), found.get("mfu")
        if name not in (MODEL, ADAPTER):
            raise ValueError(f"it names the folder {name[:80]!r}")
        done = Result(
            run / name, None if loss is None else float(loss),
            tuple((int(step), float(value)) for step, value in found["evaluations"]),
            float(found.get("tokens_per_second") or 0.0), None if mfu is None else float(mfu),
            int(found.get("peak_bytes") or 0),
        )  # fmt: skip
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = f"{type(error).__name__}: {error}"
        raise DamagedFile(f"{path}: cannot be read ({said})", hint=f"remove it to train on: rm {path}") from error
    if not done.folder.is_dir():
        raise DamagedFile(
            f"{run}: this run is done, and its {name} is gone", hint=f"to train it again: rm {path}, or another -o"
        )
    return done


def save_model(
    run: Path, trainee: Trainee, handle: Any, *, tokenizer: Any, template: Template, group: Group, sharded: bool
) -> Path | None:
    """Write the model (``handle is None``) or the adapters; the folder appears whole.

    None in processes that do not write. OutputError when the disk has no room for it.
    """
    weights = _gathered(trainee, group) if sharded else None
    target = run / (MODEL if handle is None else ADAPTER)

    def save_weights(work: Path) -> None:
        if handle is None:
            trainee.model.save_pretrained(work, state_dict=weights)
        else:
            # Left to itself, peft asks the Hub for the base's vocabulary, be the base a local file.
            handle.save_pretrained(work, save_embedding_layers=False)

    def write() -> Path | None:
        if not group.leads:
            return None
        tokenizer.chat_template = template.jinja(tokenizer)  # other programs know nothing of our template
        model_folder.write(
            target, save_weights, tokenizer=tokenizer, template=template, provenance=run / RUN_FILE, replaces=True
        )
        return target

    return group.agree(write)


@torch.no_grad()
def _gathered(trainee: Trainee, group: Group) -> dict[str, torch.Tensor]:
    """Whole weights on the leading process's host memory, one at a time; {} in the others."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()  # a tied head is the embedding again
    for name, tensor in trainee.model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if group.leads:
            found[name] = whole.cpu()
    return found
