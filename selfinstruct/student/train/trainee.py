"""The model in training: loaded, given its attention, compiled, and wrapped so that its forward pass is the loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from selfinstruct.errors import UsageError
from selfinstruct.student.models import quantised, weights
from selfinstruct.student.models.source import Source, locate
from selfinstruct.student.train import attention
from selfinstruct.student.train.batches import MicroBatch
from selfinstruct.student.train.loss import labelled_loss


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
            longest_row=batch.longest_row,
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
    path: str, *, dtype: torch.dtype, kernel: attention.Choice | None, device: torch.device, four_bit: bool = False
) -> Any:
    """Load a causal language model for training: whatever ``source.locate`` knows, without adapters.

    Without a ``kernel`` its attention is what transformers gives it (sdpa, where the model's allows that).
    ``four_bit`` loads the linear maps in NF4 (for QLoRA; needs bitsandbytes).
    """
    options: dict[str, Any] = {}
    if kernel is not None:
        attention.register()
        options["attn_implementation"] = kernel.implementation
    if four_bit:
        options["quantization_config"] = quantised.settings("4bit", dtype)
    return weights.read_model(located(path, four_bit=four_bit), dtype, device, **options)


def located(path: str, *, four_bit: bool = False) -> Source:
    """The model to train; UsageError for what cannot be trained as it is."""
    source = locate(path)
    if source.adapter:
        raise UsageError(
            f"{path}: is an adapter on another model", hint=f"merge it first: selfinstruct merge {path} -o DIR"
        )
    if source.gguf and four_bit:
        raise UsageError(
            "--method qlora does not go with a GGUF file", hint=f"selfinstruct merge {path} -o DIR, then --model DIR"
        )
    return source


def check_supported(config: Any) -> None:
    """UsageError for a model whose loss would come out wrong here, rather than train it wrongly. (``exactness`` asks
    the loaded model what its configuration does not say.)"""
    for field in ("final_logit_softcapping", "attn_logit_softcapping", "num_local_experts", "num_experts"):
        if getattr(config, field, None):
            raise UsageError(
                f"models with {field} are not supported by fine-tuning",
                hint="LLaMA, Mistral, Qwen, SmolLM and alike are; others train with --backend trl",
            )
