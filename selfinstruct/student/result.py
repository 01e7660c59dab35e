"""What a finished run leaves: a model or an adapter with tokenizer, template and provenance beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from selfinstruct.student.manifest import RUN_FILE
from selfinstruct.student.parallel import Group
from selfinstruct.student.prompt import Template, save_template
from selfinstruct.student.trainee import Trainee

MODEL, ADAPTER, RESULT_FILE = "model", "adapter", "result.json"


def folder_of(run: Path, method: str) -> Path:
    """Where a run of this method leaves what it learnt."""
    return run / (MODEL if method == "full" else ADAPTER)


def finished(run: Path) -> dict[str, Any] | None:
    """The result of a run that is done, None for one that is not."""
    try:
        found = json.loads((run / RESULT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def save_model(
    run: Path, trainee: Trainee, handle: Any, *, tokenizer: Any, template: Template, group: Group, sharded: bool
) -> Path | None:
    """Write the model (``handle is None``) or the adapters; the folder appears whole.

    None in processes that do not write.
    """
    weights = _gathered(trainee, group) if sharded else None
    if not group.leads:
        group.wait()
        return None
    target = run / (MODEL if handle is None else ADAPTER)
    work = run / f".{target.name}.tmp"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    if handle is None:
        trainee.model.save_pretrained(work, state_dict=weights)
    else:
        handle.save_pretrained(work)
    tokenizer.save_pretrained(work)
    save_template(template, work)
    shutil.copyfile(run / RUN_FILE, work / "selfinstruct_run.json")
    shutil.rmtree(target, ignore_errors=True)
    work.rename(target)
    group.wait()
    return target


@torch.no_grad()
def _gathered(trainee: Trainee, group: Group) -> dict[str, torch.Tensor]:
    """Whole weights on the leading process's host memory, one at a time; {} in the others."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in trainee.model.state_dict().items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if group.leads:
            found[name] = whole.cpu()
    return found
