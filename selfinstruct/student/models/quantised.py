"""Weights in 8 or 4 bits, through bitsandbytes."""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING, Any

from selfinstruct.errors import MissingPackage, UsageError

if TYPE_CHECKING:
    import torch

QUANTS = ("8bit", "4bit")


def asked_for(quant: str, place: torch.device, *, gguf: bool) -> Any:
    """What ``--quant`` means for loading; UsageError or MissingPackage where it cannot be had."""
    import torch

    if quant not in QUANTS:
        raise UsageError(f"unknown --quant {quant!r}", hint=f"one of {', '.join(QUANTS)}")
    if gguf:
        raise UsageError("--quant does not go with a GGUF file", hint="give the model's safetensors folder")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPackage(f"--quant {quant} needs bitsandbytes", hint="pip install 'selfinstruct[qlora]'")
    if place.type != "cuda":
        raise UsageError(f"--quant {quant} needs a GPU", hint="on a CPU run a GGUF file through llama.cpp")
    return settings(quant, torch.bfloat16)


def settings(quant: str, dtype: torch.dtype) -> Any:
    """bitsandbytes' settings: 8 bits, or NF4 with double quantisation (0.52 bytes a number), computed in ``dtype``."""
    import transformers

    made: Any = transformers.BitsAndBytesConfig
    if quant == "8bit":
        # It tells of its cast to float16 at every product: 71,680 lines for 96 short answers of a 7B.
        said = logging.getLogger("bitsandbytes.autograd._functions")
        if said.level == logging.NOTSET:
            said.setLevel(logging.ERROR)
        return made(load_in_8bit=True)
    return made(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
