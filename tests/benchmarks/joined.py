"""What one product for q, k and v, and one for gate and up, would be worth in training; used by ``finetune.py --join``.

An experiment: the weights get other names, so a model trained like this could not be saved as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Together(nn.Module):
    """Several linear maps of one input as one product."""

    def __init__(self, parts: list[nn.Linear]) -> None:
        super().__init__()
        self.sizes = [part.out_features for part in parts]
        self.weight = nn.Parameter(torch.cat([part.weight.data for part in parts]))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return nn.functional.linear(hidden, self.weight).split(self.sizes, dim=-1)


class Attention(nn.Module):
    """A Llama attention over the joined product."""

    def __init__(self, old: Any) -> None:
        super().__init__()
        self.qkv, self.o_proj = Together([old.q_proj, old.k_proj, old.v_proj]), old.o_proj
        self.config, self.head_dim, self.scaling, self.layer_idx = old.config, old.head_dim, old.scaling, old.layer_idx
        self.num_key_value_groups, self.is_causal = old.num_key_value_groups, True

    def forward(self, hidden_states: Any, position_embeddings: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (part.view(shape).transpose(1, 2) for part in self.qkv(hidden_states))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        kwargs.pop("past_key_values", None)
        mixed, _ = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(mixed.reshape(*hidden_states.shape[:-1], -1)), None


class Mlp(nn.Module):
    """down(act(gate(x)) * up(x)) over the joined product."""

    def __init__(self, old: Any) -> None:
        super().__init__()
        self.gate_up, self.down_proj, self.act_fn = Together([old.gate_proj, old.up_proj]), old.down_proj, old.act_fn

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(hidden)
        found: torch.Tensor = self.down_proj(self.act_fn(gate) * up)
        return found


def join(model: Any) -> None:
    """Replace attention and feed-forward map of each layer, in place."""
    for layer in model.model.layers:
        layer.self_attn, layer.mlp = Attention(layer.self_attn), Mlp(layer.mlp)
