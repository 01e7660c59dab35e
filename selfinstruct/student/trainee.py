"""The model in training: loaded, given its attention, compiled, and wrapped so that its forward pass is the loss."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from selfinstruct.errors import ModelFileError, UsageError
from selfinstruct.student import attention
from selfinstruct.student.adapters import four_bit_options
from selfinstruct.student.batches import MicroBatch
from selfinstruct.student.loss import labelled_loss


class Trainee(nn.Module):
    """A causal language model whose forward pass maps a micro-batch to its share of the step's loss."""

    def __init__(self, model: Any, *, compiled_loss: bool = False) -> None:
        super().__init__()
        self.model = model
        self._compiled_loss = compiled_loss

    def forward(self, batch: MicroBatch, divisor: float) -> torch.Tensor:
        """Sum of the cross-entropies of the batch's labels over ``divisor`` (labels of the whole step); fp32 scalar."""
        head = self.model.get_output_embeddings().weight
        hidden = self.hidden_states(batch)
        return labelled_loss(hidden, head, batch.predicting, batch.targets, divisor, compiled=self._compiled_loss)

    def hidden_states(self, batch: MicroBatch) -> torch.Tensor:
        """The last hidden states, (tokens, width)."""
        found: torch.Tensor = self.model.get_decoder()(
            input_ids=batch.ids,
            position_ids=batch.positions,
            use_cache=False,
            cu_seq_lens_q=batch.bounds,
            cu_seq_lens_k=batch.bounds,
            max_length_q=batch.longest,
            max_length_k=batch.longest,
        ).last_hidden_state
        return found[0]

    def layers(self) -> list[nn.Module]:
        """The decoder's layers, in order."""
        return list(self.model.get_decoder().layers)

    def named_trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that are trained, by their names in the model; a tied head appears once."""
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def compile_layers(self) -> None:
        """Compile each layer's forward pass once for all lengths.

        The bound method is compiled, not the module: hooks of sharding and checkpointing stay outside the graph.
        """
        # One program serves all layers; what limits recompilations counts every layer's guards together.
        limits: Any = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, 64)
        for layer in self.layers():
            layer.forward = torch.compile(layer.forward, dynamic=True)

    def checkpoint_layers(self, count: int) -> None:
        """Recompute the first ``count`` layers in the backward pass instead of keeping their activations."""
        layers = self.layers()
        if count <= 0:
            return
        # Renamed in transformers 5.2x; the old name warns there.
        modern = getattr(self.model, "activation_checkpointing_enable", None)
        if modern is not None:
            modern()
        else:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for number, layer in enumerate(layers):
            setattr(layer, "gradient_checkpointing", number < count)  # noqa: B010 - modules type their attributes


def load_model(
    path: str, *, dtype: torch.dtype, kernel: attention.Choice, device: torch.device, four_bit: bool = False
) -> Any:
    """Load a causal language model for training: a folder with safetensors, a GGUF file, or a name on the Hub.

    ``four_bit`` loads the linear maps in NF4 (for QLoRA; needs bitsandbytes).

    Never runs code from the model's folder and never reads pickles. ModelFileError when there is nothing to load.
    """
    from transformers import AutoModelForCausalLM

    attention.register()
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": kernel.implementation, "trust_remote_code": False}
    where, file = _where(path)
    if file:
        options["gguf_file"] = file
    else:
        options["use_safetensors"] = True
    if four_bit:
        options.update(four_bit_options(dtype))
    if device.type == "cuda" and importlib.util.find_spec("accelerate"):
        options["device_map"] = {"": device}  # shard by shard to the GPU: host memory stays small
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(where, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelFileError(
            f"{path}: cannot be loaded ({' '.join(str(error).split())[:300]})",
            hint="give a folder with config.json and .safetensors files, a .gguf file, or a name on the Hub",
        ) from error
    check_supported(model.config)
    if four_bit:
        return model
    _plain(model)
    return model.to(device)


def load_tokenizer(path: str) -> Any:
    """The fast tokenizer beside a model; ModelFileError when there is none."""
    from transformers import AutoTokenizer

    where, file = _where(path)
    options: dict[str, Any] = {"gguf_file": file} if file else {}
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelFileError(
            f"{path}: its tokenizer cannot be loaded ({' '.join(str(error).split())[:300]})",
            hint="the model's folder needs tokenizer.json and tokenizer_config.json",
        ) from error


def read_config(path: str) -> Any:
    """A model's transformers configuration; ModelFileError when there is none."""
    from transformers import AutoConfig

    where, file = _where(path)
    options: dict[str, Any] = {"gguf_file": file} if file else {}
    try:
        return AutoConfig.from_pretrained(where, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelFileError(
            f"{path}: its configuration cannot be read ({' '.join(str(error).split())[:300]})",
            hint="give a folder with config.json, a .gguf file, or a name on the Hub",
        ) from error


def check_supported(config: Any) -> None:
    """UsageError for a model whose loss would come out wrong here, rather than train it wrongly."""
    for field in ("final_logit_softcapping", "attn_logit_softcapping", "num_local_experts", "num_experts"):
        if getattr(config, field, None):
            raise UsageError(
                f"models with {field} are not supported by fine-tuning",
                hint="LLaMA, Mistral, Qwen, SmolLM and alike are",
            )


def _where(path: str) -> tuple[str, str]:
    """(folder or Hub name, GGUF file name or "")."""
    given = Path(path)
    if given.suffix == ".gguf":
        if not given.is_file():
            raise ModelFileError(f"{path}: no such file")
        return str(given.parent), given.name
    if not given.exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise ModelFileError(f"{path}: no such folder", hint="give the folder that holds the model's config.json")
    if given.is_dir() and not (given / "config.json").is_file():
        raise ModelFileError(f"{path}: has no config.json", hint="give the folder that holds the model's config.json")
    return path, ""


def _plain(model: Any) -> None:
    """Forget that weights came out of a GGUF: they are plain now, and could not be saved otherwise."""
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
