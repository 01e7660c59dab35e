"""Where a model lies: a folder, a fine-tuning run, a GGUF file, or a name on the Hub. Reads no weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfinstruct.errors import ModelFileError, UsageError
from selfinstruct.student.models import model_folder

_BLOCK, _BLOCKS = 4096, 1024
_SETTINGS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model lies, and what to call it.

    ``base`` is a folder, a .gguf file or a name on the Hub; ``adapter`` is a LoRA folder or None.
    """

    name: str
    base: str
    adapter: Path | None = None

    @property
    def gguf(self) -> Path | None:
        return Path(self.base) if self.base.endswith(".gguf") else None

    @property
    def words(self) -> Path:
        """The folder of template and tokenizer."""
        return self.adapter or (self.gguf.parent if self.gguf else Path(self.base))

    @property
    def _folders(self) -> list[Path]:
        return [folder for folder in (Path(self.base), self.adapter) if folder is not None and folder.is_dir()]

    def weights(self) -> list[list[Any]]:
        """Name, size and SHA-256 of each file of weights; of a large one, of 1,024 blocks that are evenly spread: every
        matrix of a model that was trained anew in this place differs."""
        files = [self.gguf] if self.gguf else [f for one in self._folders for f in sorted(one.glob("*.safetensors"))]
        return _identities(files) or [[self.base, 0, ""]]

    def fingerprint(self) -> list[list[Any]]:
        """The same of all files that decide what the model says."""
        named = [one / name for one in self._folders for name in _SETTINGS]
        return [*self.weights(), *_identities([file for file in named if file.is_file()])]


def _identities(files: Iterable[Path]) -> list[list[Any]]:
    return [[file.name, file.stat().st_size, _sampled(file)] for file in files]


def _sampled(file: Path) -> str:
    size = file.stat().st_size
    found = hashlib.sha256()
    with file.open("rb") as stream:
        if size <= _BLOCK * _BLOCKS:
            found.update(stream.read())
        for number in range(_BLOCKS if size > _BLOCK * _BLOCKS else 0):
            stream.seek((size - _BLOCK) * number // (_BLOCKS - 1))
            found.update(stream.read(_BLOCK))
    return found.hexdigest()


def locate(name: str) -> Source:
    """What MODEL means. Raises ModelFileError, with the reason, when nothing there can be loaded."""
    from selfinstruct.servers import models

    if name in models.SOURCES or name.startswith("hf:"):
        return Source(name, str(models.find(name)))
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # ~nobody/...
        raise UsageError(f"{name}: there is no such user", hint="write the whole path") from None
    if path.suffix == ".gguf":
        return Source(path.stem, str(models.check_gguf(path)))
    if not path.is_dir():
        if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise ModelFileError(
                f"{name}: no model there", hint="give a model's folder, a fine-tuning run, a .gguf file or owner/name"
            )
        return Source(name, name)
    for inner in ("model", "adapter"):
        if (path / inner).is_dir() and not (path / "config.json").exists():
            return _folder(path / inner, path.name)
    return _folder(path, path.name)


def _folder(path: Path, name: str) -> Source:
    adapter = path / "adapter_config.json"
    if adapter.exists():
        model_folder.require_weights(path, "adapter_model")
        base = str(model_folder.read_json(adapter).get("base_model_name_or_path") or "")
        if not base:
            raise ModelFileError(f"{adapter}: does not name its base model", hint="write base_model_name_or_path")
        return Source(name, _base_of(adapter, base), path)
    if (path / "run.json").exists():
        raise ModelFileError(f"{path}: this run has not ended yet", hint="go on with it: the same finetune command")
    if not (path / "config.json").exists():
        raise ModelFileError(f"{path}: holds no model (no config.json)", hint="give the folder of the model itself")
    model_folder.read_json(path / "config.json")
    model_folder.require_weights(path, "model")
    return Source(name, str(path))


def _base_of(adapter: Path, base: str) -> str:
    """Where the base model of an adapter lies; another adapter is none."""
    inside = Path(base)
    if not (inside / "adapter_config.json").exists() and not (inside / "adapter").is_dir():
        return locate(base).base
    raise ModelFileError(
        f"{adapter}: its base {base!r} is itself an adapter", hint="merge that one first: selfinstruct merge RUN -o DIR"
    )
