"""One folder that runs anywhere: base and adapter merged, in safetensors, with tokenizer and template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from selfinstruct.errors import OutputError, UsageError
from selfinstruct.student.models import model_folder
from selfinstruct.student.models.source import locate
from selfinstruct.student.models.weights import load_tokenizer, load_weights, template_of
from selfinstruct.student.prompt import TEMPLATE_FILE


def merge(name: str, out: Path, *, dtype: str = "bf16", log: Callable[[str], None] = lambda _line: None) -> Path:
    """Merge the LoRA adapter of a fine-tuning run (or of an adapter folder) into its base, and write it to ``out``.

    A model without an adapter is written as it is: so a GGUF file becomes a folder. Done on the CPU in 32 bits where
    an adapter is added, so that rounding happens once. ``out`` appears whole or not at all; OutputError when it is
    there already, or is the folder of the command itself.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out}: is there already", hint="name another folder with -o")
    target = out.resolve()  # "." and ".." are no names
    if target == Path.cwd():  # the new folder takes the place of the old one, and the shell would stay in that
        raise OutputError(f"{out}: is the folder you are in, which cannot be replaced", hint="name a new one: -o NAME")
    import torch

    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if dtype not in kinds:
        raise UsageError(f"unknown dtype {dtype!r}", hint=f"one of {', '.join(kinds)}")
    source = locate(name)
    tokenizer = load_tokenizer(source)
    template = template_of(source, tokenizer)
    log(f"loading {source.base}")
    model = load_weights(source, dtype="fp32" if source.adapter else dtype, device="cpu")
    model = model.to(kinds[dtype])
    model.config.dtype = model.dtype
    log(f"writing {out}")
    if (source.words / TEMPLATE_FILE).is_file():
        tokenizer.chat_template = template.jinja(tokenizer)
    model_folder.write(
        target, model.save_pretrained, tokenizer=tokenizer, template=template,
        provenance=source.words / model_folder.PROVENANCE,
    )  # fmt: skip
    return out
