"""LoRA and QLoRA through peft; bitsandbytes only for the 4-bit base of QLoRA."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from selfinstruct.errors import MissingPackage, UsageError
from selfinstruct.student.recipes import Recipe


def require(method: str) -> None:
    """MissingPackage when a method's packages are not there, before anything slow begins."""
    if method in ("lora", "qlora") and importlib.util.find_spec("peft") is None:
        raise MissingPackage(f"--method {method} needs peft", hint="pip install 'selfinstruct[train]'")
    if method == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPackage("--method qlora needs bitsandbytes", hint="pip install 'selfinstruct[qlora]'")


def add(model: Any, recipe: Recipe, base: str) -> Any:
    """Freeze the model, put adapters on it (in place), and return peft's handle on them.

    Adapters are in the model's own dtype; the optimizer keeps their fp32 masters. peft's default, fp32 adapters,
    would cast every input of every adapted map to fp32.
    """
    from peft import LoraConfig, get_peft_model

    targets: Any = "all-linear" if "all-linear" in recipe.lora_targets else list(recipe.lora_targets)
    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    # peft would write the model's own idea of its name into the adapter: for a GGUF file that is only its folder.
    model.name_or_path = base
    try:
        handle = get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UsageError(
            f"no adapters can be put on this model ({error})",
            hint="name its linear layers: --set lora_targets=NAME,NAME",
        ) from error
    dtype = model.get_input_embeddings().weight.dtype
    for parameter in handle.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
        # A small card cuts a step into many micro-batches: added up in bfloat16, 117 of them were 1.3 % off.
        if hasattr(parameter, "grad_dtype"):  # since torch 2.10
            parameter.grad_dtype = torch.float32
    return handle
