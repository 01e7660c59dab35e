"""Where a model lies: a folder, a fine-tuning run, a GGUF file, or a name on the Hub. Reads no weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfinstruct.errors import ModelFileError, UsageError
from selfinstruct.student import model_folder

_END_BYTES = 1 << 20


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

    def fingerprint(self) -> list[list[Any]]:
        """Name, size and SHA-256 of both ends of each weight file: a folder that was trained anew is another model."""
        folders = [folder for folder in (Path(self.base), self.adapter) if folder is not None and folder.is_dir()]
        files = [self.gguf] if self.gguf else [file for one in folders for file in sorted(one.glob("*.safetensors"))]
        found: list[list[Any]] = [] if files else [[self.base, 0, ""]]
        for file in files:
            size = file.stat().st_size
            with file.open("rb") as stream:
                ends = stream.read(_END_BYTES)
                stream.seek(max(0, size - _END_BYTES))
                ends += stream.read()
            found.append([file.name, size, hashlib.sha256(ends).hexdigest()])
        return found


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
