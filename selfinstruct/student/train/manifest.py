"""The frozen manifest of a run: everything that its losses depend on, and where its data came from.

``RUN/run.json`` is written at the start. A run is resumed only with the same manifest; what differs is named. It goes
with the model at the end, so that a student can tell which dataset version, filters and teacher made it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from selfinstruct.durable import write_text
from selfinstruct.errors import DamagedFile, IdentityError, UsageError
from selfinstruct.student.disk import writing
from selfinstruct.student.models.source import Source
from selfinstruct.student.prompt import Template
from selfinstruct.student.train.recipes import Recipe
from selfinstruct.student.train.tokens import Tokens

RUN_FILE = "run.json"
FORMAT = 1
# Compared on resume; the rest ("about", "versions") is for the reader.
FROZEN = ("format", "recipe", "data", "template", "tokenizer", "model", "schedule", "numerics")
# What a run replaces, rewrites or removes in its folder, and what makes a folder a model.
_WRITTEN = ("model", "adapter", "checkpoint-*", "log.jsonl", "result.json")
_A_MODEL = ("config.json", "adapter_config.json")


def build(
    *,
    recipe: Recipe,
    template: Template,
    tokenizer_sha256: str,
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    train: Tokens,
    validation: Tokens | None,
    steps: int,
    numerics: Mapping[str, Any],
    about: Mapping[str, Any],
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """The manifest of a run that is about to start."""
    counts = {"rows": len(train), "tokens": int(train.starts[-1]), "labels": int(train.labels.sum())}
    return json.loads(json.dumps({  # type: ignore[no-any-return]
        "format": FORMAT,
        "recipe": asdict(recipe),
        "data": {
            **data,
            **counts,
            "truncated": train.truncated,
            "dropped": train.dropped,
            "validation_rows": len(validation) if validation is not None else 0,
            "tokens_sha256": train.fingerprint(),
        },
        "template": {**asdict(template), "sha256": template.fingerprint()},
        "tokenizer": {"sha256": tokenizer_sha256},
        "model": model,
        "schedule": {
            "shape": recipe.schedule, "peak": recipe.lr, "steps": steps, "warmup": recipe.warmup_steps(steps),
        },
        "numerics": numerics,
        "about": about,
        "versions": versions,
    }))  # fmt: skip


def model_identity(source: Source, config: Any) -> dict[str, Any]:
    """A model by its name, configuration and weight files, wherever they lie (on the Hub: by the revision)."""
    shape = json.dumps({k: v for k, v in sorted(config.to_dict().items()) if k in _SHAPE_FIELDS}, default=str)
    return {
        "name": source.name,
        "revision": getattr(config, "_commit_hash", None),
        "config_sha256": hashlib.sha256(shape.encode()).hexdigest(),
        "weights": source.weights(),
    }


# Fields of a configuration that change what a model computes; others (versions, paths) change by themselves.
_SHAPE_FIELDS = frozenset(
    "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "vocab_size rms_norm_eps rope_theta rope_parameters hidden_act tie_word_embeddings attention_bias".split()
)


def require_own(run: Path) -> None:
    """UsageError for a folder that is a model, or that holds what a run would replace and no run of ours wrote."""
    hint = "choose another folder with -o: a new one, or an empty one"
    if found := [name for name in _A_MODEL if (run / name).exists()]:
        raise UsageError(f"{run}: is a model's own folder (it holds {found[0]})", hint=hint)
    foreign = sorted(path.name for pattern in _WRITTEN for path in run.glob(pattern))
    if foreign and not (run / RUN_FILE).exists():
        raise UsageError(
            f"{run}: holds {', '.join(foreign[:3])} and no {RUN_FILE}: no run of selfinstruct wrote it, or its "
            f"{RUN_FILE} was removed", hint=hint,
        )  # fmt: skip


def freeze(run: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of a new run, or compare with the one that is there.

    IdentityError names every field that differs. UsageError for a folder of somebody else's, OutputError.
    """
    path = run / RUN_FILE
    require_own(run)
    if not path.exists():
        with writing(path):
            write_text(path, json.dumps(manifest, indent=2, ensure_ascii=False, sort_keys=True) + "\n")
        return
    before = _as_done(load(run))
    changed = [line for field in FROZEN for line in _differences(before.get(field), manifest.get(field), field)]
    if changed:
        shown = [*changed[:8], *([f"... and {len(changed) - 8} more"] if len(changed) > 8 else [])]
        raise IdentityError(
            "\n".join([f"{run}: holds a run that began otherwise", *shown]),
            hint="give what it began with, or another folder with -o",
        )


def load(run: Path) -> dict[str, Any]:
    """The manifest of a run; DamagedFile when it cannot be read."""
    path = run / RUN_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedFile(f"{path}: cannot be read ({error})", hint="choose another folder with -o") from error
    if not isinstance(found, dict):
        raise DamagedFile(f"{path}: is no manifest", hint="choose another folder with -o")
    return found


def begun(run: Path, field: str) -> Mapping[str, Any]:
    """A field of the manifest of the run that is there; {} without one."""
    found = load(run).get(field) if (run / RUN_FILE).exists() else None
    return found if isinstance(found, dict) else {}


def _as_done(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest with what was done where older versions wrote what was asked for: beside weights in fp32, Adam's
    moments were in fp32 always."""
    numerics = manifest.get("numerics")
    if isinstance(numerics, dict) and numerics.get("dtype") == "float32" and "adam_state" in numerics:
        return {**manifest, "numerics": {**numerics, "adam_state": "fp32"}}
    return manifest


def _differences(before: Any, now: Any, where: str) -> list[str]:
    """``field: before, now`` for every leaf that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted({*before, *now})
        return [line for name in names for line in _differences(before.get(name), now.get(name), f"{where}.{name}")]
    if before == now:
        return []
    return [f"  {where}: was {_short(before)}, is {_short(now)}"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."
