"""What a finished run leaves: a model or an adapter with tokenizer, template and provenance beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from selfinstruct.student import model_folder
from selfinstruct.student.manifest import RUN_FILE
from selfinstruct.student.parallel import Group
from selfinstruct.student.prompt import Template
from selfinstruct.student.trainee import Trainee

MODEL, ADAPTER, RESULT_FILE = "model", "adapter", "result.json"


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

    None in processes that do not write. OutputError when the disk has no room for it.
    """
    weights = _gathered(trainee, group) if sharded else None
    if not group.leads:
        group.wait()
        return None
    target = run / (MODEL if handle is None else ADAPTER)

    def save_weights(work: Path) -> None:
        if handle is None:
            trainee.model.save_pretrained(work, state_dict=weights)
        else:
            # Left to itself, peft asks the Hub for the base's vocabulary, be the base a local file.
            handle.save_pretrained(work, save_embedding_layers=False)

    tokenizer.chat_template = template.jinja(tokenizer)  # other programs know nothing of our template
    model_folder.write(
        target, save_weights, tokenizer=tokenizer, template=template, provenance=run / RUN_FILE, replaces=True
    )
    group.wait()
    return target


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
