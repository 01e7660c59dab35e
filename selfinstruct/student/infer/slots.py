"""Where the keys and values of running sequences lie, and the attention over them.

A *slot* is a fixed stretch of cache columns for one sequence; column c holds the token at position c, so nothing is
padded on either side and a slot can be given to the next prompt the moment its sequence ends. Two kinds of pass
write to it: a *prefill* (many whole prompts, concatenated without padding) and a *decode* step (one new token for each
of the first n slots).

The model reaches the cache through transformers' attention interface, as one opaque operator: torch.compile sees a
single node, and what the operator must know about the pass (lengths, slots) comes from ``passing``, not through the
compiled layers, which would otherwise be compiled anew for each layer and each kind of pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selfinstruct.student.infer import inference_costs

ATTENTION_NAME = "selfinstruct_slots"
Attend = Callable[[Tensor, Tensor, Tensor, "Pass", float], Tensor]
"""(query (tokens, heads, dim), keys, values, pass, scale) -> (tokens, heads, dim)."""


@dataclass(frozen=True, slots=True)
class Pass:
    """What the attention of one forward pass needs to know; T tokens in all.

    ``rows`` and ``columns`` (T,) int64: the slot and the column each new token goes to. ``caches``: keys and values
    of each layer. In a prefill, ``starts``
    (documents + 1,) int32 are the cumulative lengths, ``longest`` the longest of them, and ``attend`` gets the new keys
    and values (T, kv_heads, dim). In a decode step T is the number of rows, ``used`` (T,) int32 the columns in use
    with the new one, ``span`` an upper bound of them, and ``attend`` gets the caches of the layer (slots, columns,
    kv_heads, dim).
    """

    rows: Tensor
    columns: Tensor
    caches: Sequence[tuple[Tensor, Tensor]]
    starts: Tensor
    longest: int
    used: Tensor | None
    span: int
    attend: Attend


class _Current(threading.local):
    step: Pass | None = None


_current = _Current()


@contextmanager
def passing(step: Pass) -> Iterator[None]:
    """Let the attention of this thread work for ``step``."""
    _current.step = step
    try:
        yield
    finally:
        _current.step = None


@torch.library.custom_op("selfinstruct::slot_attention", mutates_args=())
def _slot_attention(query: Tensor, key: Tensor, value: Tensor, layer: Tensor, scale: float) -> Tensor:
    """Store the new keys and values (T, kv_heads, dim) in the layer's caches and attend. Returns (T, heads, dim).

    ``layer`` is a number as a tensor of the CPU: a plain one would be compiled into the code, a tensor is an input.
    The caches come from ``passing``: as inputs their shapes would be, and each new size compiled anew.
    """
    step = _current.step
    if step is None:
        raise RuntimeError("slot attention outside of a pass")
    keys, values = step.caches[int(layer)]
    keys.index_put_((step.rows, step.columns), key)
    values.index_put_((step.rows, step.columns), value)
    if step.used is None:
        return step.attend(query, key, value, step, scale).contiguous()
    return step.attend(query, keys, values, step, scale).contiguous()


@_slot_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, layer: Tensor, scale: float) -> Tensor:
    return query.new_empty(query.shape)


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, scaling: float, **_unused: Any
) -> tuple[Tensor, None]:
    """The function that transformers calls, with tensors of (1, heads, T, dim)."""
    tokens_first = [tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)]
    mixed = torch.ops.selfinstruct.slot_attention(*tokens_first, module.slot_layer, scaling)
    return mixed.unsqueeze(0), None


class SlotCache:
    """Keys and values of ``slots`` sequences of up to ``columns`` tokens each, for every layer of a model.

    Raises torch.OutOfMemoryError when they do not fit.
    """

    def __init__(self, model: Any, slots: int, columns: int) -> None:
        self.slots, self.columns = slots, columns
        shape = (slots, columns, *cache_shape(model.config))
        weight = model.get_input_embeddings().weight
        kind = {"dtype": weight.dtype, "device": weight.device}
        self.layers = [
            (torch.zeros(shape, **kind), torch.zeros(shape, **kind)) for _ in range(model.config.num_hidden_layers)
        ]

    def move(self, sources: list[int], targets: list[int], columns: int) -> None:
        """Copy the first ``columns`` columns of some slots to others (no slot may be in both lists)."""
        device = self.layers[0][0].device
        source, target = torch.tensor(sources, device=device), torch.tensor(targets, device=device)
        for layer in self.layers:
            for tensor in layer:
                tensor[target, :columns] = tensor[source, :columns]

    def release(self) -> None:
        """Give the memory back; the cache is of no use afterwards."""
        self.layers.clear()


def cache_shape(config: Any) -> tuple[int, int]:
    """(kv heads, dim of a head) of a model."""
    heads = config.num_attention_heads
    return getattr(config, "num_key_value_heads", None) or heads, getattr(
        config, "head_dim", None
    ) or config.hidden_size // heads


def token_bytes(config: Any, itemsize: int) -> int:
    """Bytes of cache for one token of one sequence, over all layers."""
    heads, dim = cache_shape(config)
    return inference_costs.cache_bytes(config.num_hidden_layers, heads * dim, itemsize)


def activation_bytes(config: Any, itemsize: int) -> int:
    """Bytes of activations for one token of a prefill: those of one layer."""
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return inference_costs.activation_bytes(config.hidden_size, inner, itemsize)


def logits_bytes(config: Any) -> int:
    """Bytes of one row's logits, in 32 bits and with sorted copies."""
    return inference_costs.logits_bytes(config.vocab_size)


_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3"})


def unsupported(config: Any) -> str:
    """Why a model cannot run on slots, "" when it can: its attention must be plain causal over all that came before."""
    if config.model_type not in _FAMILIES:
        return f"its architecture {config.model_type!r} was not tried"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "it attends through a sliding window"
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        return "its layers attend in different ways"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") in ("dynamic", "longrope"):
        return "its positions depend on the length of the text"
    return ""


def attach(model: Any) -> None:
    """Make a model's attention ours. It then works inside ``passing`` only."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, attention)
    for number, layer in enumerate(model.get_decoder().layers):
        layer.self_attn.register_buffer("slot_layer", torch.tensor(number, device="cpu"), persistent=False)
    model.set_attn_implementation(ATTENTION_NAME)
