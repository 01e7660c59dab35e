"""LoRA and QLoRA through peft; bitsandbytes only for the 4-bit base of QLoRA."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from selfinstruct.errors import MissingPackage, UsageError
from selfinstruct.student.train.recipes import Recipe


def require(method: str) -> None:
    """MissingPackage when a method's packages are not there, before anything slow begins."""
    if method in ("lora", "qlora") and importlib.util.find_spec("peft") is None:
        raise MissingPackage(f"--method {method} needs peft", hint="pip install 'selfinstruct[train]'")
    if method == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPackage("--method qlora needs bitsandbytes", hint="pip install 'selfinstruct[qlora]'")


def require_targets(config: Any, recipe: Recipe) -> None:
    """UsageError for adapters that cannot be put on a model of this configuration: before its weights are loaded."""
    from transformers import AutoModelForCausalLM

    if recipe.method == "full":
        return
    try:
        with torch.device("meta"):
            outline = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError):
        return  # whoever loads the model says why it cannot be
    _check_targets(outline, recipe.lora_targets)


def _check_targets(model: Any, targets: tuple[str, ...]) -> None:
    """UsageError unless each target names linear layers, and none the output layer.

    peft takes a name that matches nothing for as long as another one matches. Adapters on the output layer would
    never learn: the loss is formed from its weight alone.
    """
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    linear = {name: one for name, one in model.named_modules() if isinstance(one, torch.nn.Linear | Conv1D)}
    known = sorted({name.rpartition(".")[2] for name, one in linear.items() if one is not head})
    hint = f"known: all-linear, or some of {', '.join(known)}"
    if "all-linear" in targets:
        if len(targets) > 1:
            raise UsageError(f"lora_targets: all-linear stands alone, not in {','.join(targets)!r}", hint=hint)
        return
    for target in targets:
        named = [one for name, one in linear.items() if name == target or name.endswith(f".{target}")]
        if not named:
            raise UsageError(f"lora_targets: {target!r} names no linear layer of the model", hint=hint)
        if any(one is head for one in named):
            raise UsageError(
                f"lora_targets: {target!r} is the output layer, where adapters are not supported", hint=hint
            )


def add(model: Any, recipe: Recipe, base: str) -> Any:
    """Freeze the model, put adapters on it (in place), and return peft's handle on them. UsageError as
    ``require_targets``.

    Adapters are in the model's own dtype; the optimizer keeps their fp32 masters. peft's default, fp32 adapters,
    would cast every input of every adapted map to fp32.
    """
    from peft import LoraConfig, get_peft_model

    _check_targets(model, recipe.lora_targets)
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
