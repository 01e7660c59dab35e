"""The shape of a model, held against the model itself: a prediction from a wrong count would be a wrong promise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from selfinstruct.errors import UsageError
from selfinstruct.student.memory import Shape, shape_of

# Of all parameters: biases and the norms of queries and keys, which a shape leaves out, are far less.
_TOLERANCE = 0.02


def counted_shape(config: Any) -> Shape:
    """The shape in a transformers configuration; UsageError where it does not account for the model's parameters, as
    with several experts, or layers of a make of their own."""
    try:
        shape = shape_of(config)
    except UsageError as error:
        raise UsageError(error.message, hint=f"{error.hint}; on a CPU (--device cpu) training needs none") from error
    parameters = _parameters(config)
    for maps in (3, 2):
        found = replace(shape, maps=maps)
        if abs(found.parameters - parameters) <= _TOLERANCE * parameters:
            return found
    raise UsageError(
        f"the memory of this model of type {config.model_type!r} cannot be predicted: it has {parameters} parameters, "
        f"and one of its widths and layers would have {shape.parameters}",
        hint="that of LLaMA, Mistral, Qwen, SmolLM and alike can; on a CPU (--device cpu) training needs none",
    )


def _parameters(config: Any) -> int:
    """Parameters of the model, laid out without memory for them."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever a model's own code raises for a configuration that it does not like
        said = " ".join(str(error).split())[:200]
        raise UsageError(
            f"the memory of models of type {config.model_type!r} cannot be predicted ({type(error).__name__}: {said})"
        ) from error
    return sum(parameter.numel() for parameter in model.parameters())
