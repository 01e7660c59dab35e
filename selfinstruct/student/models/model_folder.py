"""A model's folder: written whole, and looked at before any library reads it (safetensors there, and plain JSON).

A pickle can run code while it is read, whatever other files lie beside it, and an index can name any file there is.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selfinstruct.durable import publish, remove, unfinished
from selfinstruct.errors import ModelFileError, OutputError, RunLocked
from selfinstruct.student.prompt import Template, save_template

PROVENANCE = "selfinstruct_run.json"

_MOST_JSON_BYTES = 32 << 20  # the index of a model with hundreds of shards has a few
_SHARD = re.compile(r"[\w.+-]+\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def require_weights(folder: Path, name: str) -> None:
    """Raise ModelFileError unless the weights ``name`` ("model", "adapter_model") are whole safetensors files."""
    whole, index = folder / f"{name}.safetensors", folder / f"{name}.safetensors.index.json"
    if whole.exists():
        _require_whole(whole)
    elif index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ModelFileError(f"{index}: names no files of weights", hint="copy the model again")
        for shard in sorted({str(shard) for shard in shards.values()}):
            if not _SHARD.fullmatch(shard):
                raise ModelFileError(
                    f"{index}: names {shard[:80]!r}, and only .safetensors files of the same folder are read",
                    hint="get the .safetensors of the model",
                )
            _require_whole(folder / shard)
    else:
        _refuse(folder, name)


def write(
    target: Path, save_weights: Callable[[Path], object], *, tokenizer: Any, template: Template, provenance: Path,
    replaces: bool = False,
) -> None:  # fmt: skip
    """Write the folder ``target``: what ``save_weights`` puts into it, tokenizer, template, and the manifest of the
    run (``provenance``, where there is one).

    It appears whole or not at all. Only what ``replaces`` takes the place of a folder that is not empty. Raises
    OutputError when the disk refuses.
    """
    from safetensors import SafetensorError

    try:
        with work_folder(target) as work:
            save_weights(work)
            _name_end(work / "generation_config.json", template, tokenizer)
            tokenizer.save_pretrained(work)
            save_template(template, work)
            if provenance.is_file():
                shutil.copyfile(provenance, work / PROVENANCE)
            if target.exists() and replaces:
                shutil.rmtree(target)
            elif target.exists():
                target.rmdir()
            publish(work, target)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{target}: cannot be written ({error})", hint="free disk space") from error


@contextmanager
def work_folder(target: Path) -> Iterator[Path]:
    """A new hidden folder beside ``target`` for gigabytes that are not finished; nothing of it stays.

    Its name is always the same: what a killed process left there is removed, and a link in its place is not followed.
    RunLocked while another process works in it. Raises OSError.
    """
    work = unfinished(target)
    if work.is_dir() and not work.is_symlink():
        with _claimed(work, target):
            remove(work)
    else:
        remove(work)
    work.mkdir(parents=True)
    try:
        with _claimed(work, target):
            yield work
    finally:
        remove(work)


@contextmanager
def _claimed(work: Path, target: Path) -> Iterator[None]:
    """Hold a folder by a lock on itself, which leaves no file and dies with its holder."""
    descriptor = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise RunLocked(f"{target}: another process writes to it", hint="wait for it, or stop it") from None
    finally:
        os.close(descriptor)


def _name_end(path: Path, template: Template, tokenizer: Any) -> None:
    """Other programs stop where a model's generation settings say: with those of its base, they would go on behind
    the end of a reply that a chat template ends by another token."""
    if not path.exists() or not (template.eos or tokenizer.eos_token):
        return
    settings = dict(read_json(path))
    given = settings.get("eos_token_id")
    known = given if isinstance(given, list) else [] if given is None else [given]
    end = template.eos_id(tokenizer)
    if end not in known:
        settings["eos_token_id"] = [*known, end]
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8", newline="\n")


def read_json(path: Path) -> Mapping[str, Any]:
    """The JSON object in a file of a model. Raises ModelFileError."""
    try:
        if path.stat().st_size > _MOST_JSON_BYTES:
            raise ModelFileError(f"{path}: is too large for what it should be")
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ModelFileError(f"{path}: cannot be read (nested too deeply)") from None
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: cannot be read ({' '.join(str(error).split())[:300]})") from error
    if not isinstance(found, dict):
        raise ModelFileError(f"{path}: is not what it should be (no JSON object)")
    return found


def _require_whole(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):  # reads the header, and compares it with the file's size
            pass
    except (OSError, SafetensorError) as error:
        raise ModelFileError(f"{path}: is missing or damaged ({error})", hint="copy the model again") from error


def _refuse(folder: Path, name: str) -> None:
    found = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if found:
        raise ModelFileError(
            f"{folder}: its weights are pickles ({found[0]}), which can run code while they are read",
            hint="get the .safetensors of the model, or convert it yourself if you trust its maker",
        )
    raise ModelFileError(f"{folder}: holds no {name}.safetensors", hint="copy the weights there")
