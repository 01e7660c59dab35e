"""Join the projections that read the same input into one product each: query, key and value; gate and up.

A decode step of a few hundred rows fills a GPU only in part with each of the smaller products; joined, they are
the same sums in the same order along the inner dimension. The state dict changes, so a fused model only runs here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from selfinstruct.student.infer import slots

_FUSABLE = frozenset({"llama", "mistral", "qwen2"})


class _Joined(nn.Module):
    """Several linear layers over one input, as one product."""

    def __init__(self, parts: list[nn.Linear]) -> None:
        super().__init__()
        self.sizes = [part.out_features for part in parts]
        self.weight = nn.Parameter(torch.cat([part.weight.data for part in parts]), requires_grad=False)
        biases = [part.bias.data if part.bias is not None else None for part in parts]
        self.bias: nn.Parameter | None = None
        if any(bias is not None for bias in biases):
            filled = [
                bias if bias is not None else part.weight.new_zeros(part.out_features)
                for part, bias in zip(parts, biases, strict=True)
            ]
            self.bias = nn.Parameter(torch.cat(filled), requires_grad=False)

    def forward(self, hidden: Tensor) -> list[Tensor]:
        return list(torch.split(functional.linear(hidden, self.weight, self.bias), self.sizes, dim=-1))


class _Mlp(nn.Module):
    """down(act(gate(x)) * up(x)) with gate and up joined."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_up = _Joined([mlp.gate_proj, mlp.up_proj])
        self.down_proj, self.act_fn = mlp.down_proj, mlp.act_fn

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up(hidden)
        mixed: Tensor = self.down_proj(self.act_fn(gate) * up)
        return mixed


class _Attention(nn.Module):
    """A Llama attention with joined projections, over slots."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.qkv = _Joined([attention.q_proj, attention.k_proj, attention.v_proj])
        self.o_proj = attention.o_proj
        self.head_dim, self.scaling = attention.head_dim, attention.scaling

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **options: Any
    ) -> tuple[Tensor, None]:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (part.view(shape).transpose(1, 2) for part in self.qkv(hidden_states))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        mixed, _ = slots.attention(self, query, key, value, None, scaling=self.scaling)
        projected: Tensor = self.o_proj(mixed.reshape(*hidden_states.shape[:-1], -1))
        return projected, None


def fuse(model: Any) -> bool:
    """Join what can be joined, layer by layer (one layer's projections of extra memory); False when nothing can.

    Quantised and adapted layers are left alone. The model then works through ``slots`` only.
    """
    if model.config.model_type not in _FUSABLE:
        return False
    layers = model.get_decoder().layers
    if not all(_plain(layer) for layer in layers):
        return False
    for layer in layers:
        layer.self_attn = _Attention(layer.self_attn)
        layer.mlp = _Mlp(layer.mlp)
    return True


def _plain(layer: Any) -> bool:
    attention, mlp = layer.self_attn, layer.mlp
    parts = [getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    parts += [getattr(mlp, name, None) for name in ("gate_proj", "up_proj")]
    return all(type(part) is nn.Linear for part in parts)
