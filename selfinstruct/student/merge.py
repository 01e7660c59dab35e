"""One folder that runs anywhere: base and adapter merged, in safetensors, with tokenizer and template."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from selfinstruct.durable import publish
from selfinstruct.errors import OutputError, UsageError
from selfinstruct.student.prompt import TEMPLATE_FILE, save_template
from selfinstruct.student.result import PROVENANCE
from selfinstruct.student.weights import load_tokenizer, load_weights, locate, template_of


def merge(name: str, out: Path, *, dtype: str = "bf16", log: Callable[[str], None] = lambda _line: None) -> Path:
    """Merge the LoRA adapter of a fine-tuning run (or of an adapter folder) into its base, and write it to ``out``.

    A model without an adapter is written as it is: so a GGUF file becomes a folder. Done on the CPU in 32 bits where
    an adapter is added, so that rounding happens once. ``out`` appears whole or not at all; OutputError when it is
    there already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out}: is there already", hint="name another folder with -o")
    import torch
    from safetensors import SafetensorError

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
    work = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        model.save_pretrained(work)
        if (source.words / TEMPLATE_FILE).is_file():
            tokenizer.chat_template = template.jinja(tokenizer)
        tokenizer.save_pretrained(work)
        save_template(template, work)
        if (source.words / PROVENANCE).is_file():
            shutil.copyfile(source.words / PROVENANCE, work / PROVENANCE)
        if out.exists():
            out.rmdir()
        publish(work, out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(work, ignore_errors=True)
        raise OutputError(f"{out}: cannot be written ({error})", hint="free some space") from error
    return out
