"""Predicted memory of a fine-tuning run, per part, and the choice of how to run within a card's memory.

Arithmetic on the shape of a LLaMA-like model; what a layer keeps for its backward pass was checked against peaks on an
H200. All sizes in bytes; GB are 10**9 bytes, GiB 2**30.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from selfinstruct.errors import UsageError

# What is named by its marketing size on the left holds this many bytes for a program (seen: H100 79.2, H200 139.8 GiB).
CARDS = {
    12: 12 * 2**30, 16: 16 * 2**30, 24: 24 * 2**30, 48: 48 * 2**30, 80: int(79.2 * 2**30), 141: int(139.8 * 2**30),
}  # fmt: skip
# CUDA context, library workspaces, fragmentation of the allocator. The context is there before a plan is made.
CONTEXT = int(1.2e9)
BEGUN = int(0.5e9)
_MARGIN = 0.03
# An uncompiled layer keeps 188 KB a token of a 7B where a compiled one keeps 131 KB (two peaks each on an H200).
_UNCOMPILED = 1.43
STATE_BYTES = {"fp32": 8.0, "bf16": 4.0, "8bit": 2.03125}
# What each of several processes holds a part of: Adam's states and the masters, or the weights and gradients too.
SCHEMES = ("states", "weights")
_SPLIT = {
    "states": "; weights whole on each GPU, masters and Adam moments in parts",
    "weights": "; weights, masters and Adam moments in parts on the GPUs: slower, but whole weights would not fit",
}
# Bytes a parameter of the linear maps. int8: a 32-bit scale a row; 4bit (NF4): an 8-bit scale per 64 parameters, an
# fp32 scale per 256 scales.
_LINEAR_BYTES = {"bf16": 2.0, "int8": 1 + 4 / 4096, "4bit": 0.5 + 1 / 64 + 4 / 64 / 256}


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a decoder. ``parameters`` counts all, ``vocabulary`` words; widths are in numbers. ``maps`` are the
    linear maps of a feed-forward layer: 3 with a gate, else 2."""

    layers: int
    width: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    tied: bool = False
    maps: int = 3

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_width

    @property
    def linear_parameters(self) -> int:
        """Parameters of the linear maps in the layers: what LoRA sits on and 4-bit loading shrinks."""
        q = self.heads * self.head_width
        attention, feed_forward = 2 * self.width * (q + self.kv_width), self.maps * self.width * self.feed_forward
        return self.layers * (attention + feed_forward)

    @property
    def embedding_parameters(self) -> int:
        return self.vocabulary * self.width * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.embedding_parameters + self.width * (2 * self.layers + 1)

    def lora_parameters(self, rank: int, targets: tuple[str, ...] = ("all-linear",)) -> int:
        """Parameters of adapters of ``rank`` on the named linear maps."""
        q, d, f, kv = self.heads * self.head_width, self.width, self.feed_forward, self.kv_width
        ends = {
            "q_proj": d + q, "k_proj": d + kv, "v_proj": d + kv, "o_proj": q + d,
            "gate_proj": d + f, "up_proj": d + f, "down_proj": f + d,
        }  # fmt: skip
        if self.maps == 2:
            del ends["gate_proj"]
        names = ends if "all-linear" in targets else targets
        return self.layers * rank * sum(ends.get(name, 0) for name in names)

    def saved_per_token(self, *, compiled: bool) -> float:
        """Bytes a token that one layer keeps for its backward pass, in 16 bits.

        They are residuals, norms, q, k, v, the attention's result and a width of the feed-forward layer for each map.
        """
        q = self.heads * self.head_width
        numbers = 4 * self.width + 2 * q + 2 * self.kv_width + self.maps * self.feed_forward
        return 2.0 * numbers * (1.0 if compiled else _UNCOMPILED)


LLAMA_7B = Shape(32, 4096, 11008, 32, 32, 128, 32000)


@dataclass(frozen=True, slots=True)
class Plan:
    """One way to run, and what it is predicted to take at its peak (bytes by part, for each GPU).

    ``scheme`` is one of ``SCHEMES``, and means nothing to a single process.
    """

    method: str
    adam_state: str
    tokens: int
    checkpointed_layers: int
    parts: Mapping[str, int]
    scheme: str = "states"
    reason: str = ""

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def allocated(self) -> int:
        """What tensors take of it: the figure that torch reports as allocated."""
        return self.total - self.parts["context"]


def shape_of(config: Any) -> Shape:
    """The shape in a transformers configuration (LLaMA, Mistral, Qwen and their like); UsageError without one."""
    asked = ("num_attention_heads", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    if any(getattr(config, field, None) is None for field in asked):
        raise UsageError(
            f"the memory of models of type {config.model_type!r} cannot be predicted",
            hint="that of LLaMA, Mistral, Qwen, SmolLM and alike can",
        )
    heads = int(config.num_attention_heads)
    return Shape(
        layers=int(config.num_hidden_layers),
        width=int(config.hidden_size),
        feed_forward=int(config.intermediate_size),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_width=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        vocabulary=int(config.vocab_size),
        tied=bool(getattr(config, "tie_word_embeddings", False)),
    )


def predict(
    shape: Shape,
    method: str,
    *,
    tokens: int,
    adam_state: str = "fp32",
    checkpointed_layers: int = 0,
    compiled: bool = True,
    rank: int = 16,
    targets: tuple[str, ...] = ("all-linear",),
    world: int = 1,
    scheme: str = "states",
    accumulates: bool = True,
    label_share: float = 1.0,
    longest: int = 0,
    bytes_per_number: int = 2,
) -> Plan:
    """Bytes at the peak of a step with micro-batches of ``tokens`` tokens, on each of ``world`` processes.

    The peak is at the start of the second backward pass of a step: all gradients are there already. A step of one
    micro-batch (not ``accumulates``) frees activations as its gradients grow. Only tokens with a label
    meet the head: all of a row of ``longest`` tokens, and ``label_share`` of the others.
    """
    adapters = shape.lora_parameters(rank, targets)
    trained = shape.parameters if method == "full" else adapters
    wide = bytes_per_number == 4
    saved = shape.saved_per_token(compiled=compiled) * (bytes_per_number / 2)
    whole = shape.layers - checkpointed_layers
    # The first layers are the checkpointed ones: when they are computed again, the others' activations are free.
    activations = tokens * (max(1, whole) * saved + checkpointed_layers * shape.width * bytes_per_number)
    if method != "full":
        # Inputs of the adapters beside those of the frozen maps: dropout and low-rank results.
        activations += tokens * shape.layers * 14 * rank * bytes_per_number
        if method == "qlora":
            activations += 3 * shape.width * shape.feed_forward  # one dequantised map, and its transpose for a while
    full = min(tokens, longest)
    labels = full + (tokens - full) * label_share
    chunk = min(4096.0, labels)
    weights = weight_bytes(shape, "4bit") if method == "qlora" else bytes_per_number * shape.parameters
    master = 0 if wide else 2
    splits_weights = world > 1 and scheme == "weights"
    gradients = (bytes_per_number if method == "full" else 4) * trained // (world if splits_weights else 1)
    parts = {
        "weights": weights // (world if splits_weights else 1),
        "adapters": 0 if method == "full" else bytes_per_number * adapters,
        "master (low halves)": master * trained // world,
        "Adam moments": int((8.0 if wide else STATE_BYTES[adam_state]) * trained) // world,
        "gradients": gradients if accumulates else max(0, gradients - int(activations)),
        "activations": int(activations),
        "loss": int(chunk * shape.vocabulary * 10 + (tokens + labels) * shape.width * bytes_per_number),
        "context": CONTEXT,
    }
    if splits_weights:
        parts["gathered weights"] = int(3 * shape.parameters / shape.layers * bytes_per_number)
    return Plan(method, adam_state, tokens, checkpointed_layers, parts, scheme)


def weight_bytes(shape: Shape, form: str) -> int:
    """Bytes of the weights in a form of ``_LINEAR_BYTES``: embeddings, head and norms stay in 16 bits in every one."""
    return int(_LINEAR_BYTES[form] * shape.linear_parameters) + 2 * (shape.parameters - shape.linear_parameters)


def choose(
    shape: Shape,
    method: str,
    memory: int,
    *,
    step_tokens: int,
    longest: int,
    adam_state: str = "auto",
    tokens: int = 0,
    checkpointed_layers: int = -1,
    scheme: str = "auto",
    world: int = 1,
    **options: Any,
) -> Plan | None:
    """The fastest way that fits ``memory`` bytes, with its reason; None when nothing fits.

    In this order: exact moments before small ones, no checkpointing before some, whole weights on each of several
    GPUs before parts, and micro-batches no smaller than is good for the matrix products (4,096 tokens; below that a
    layer's recomputation is the lesser evil).
    ``step_tokens`` are the tokens of a large step on this GPU, ``longest`` the longest row.
    """
    usable = int(memory * (1 - _MARGIN))
    states = (adam_state,) if adam_state != "auto" else (("fp32", "bf16", "8bit") if method == "full" else ("fp32",))
    sizes = [tokens] if tokens else _sizes(step_tokens, longest)
    good = [size for size in sizes if size >= min(4096, sizes[0])]
    depths = [checkpointed_layers] if checkpointed_layers >= 0 else [0]
    every = range(1, shape.layers + 1) if checkpointed_layers < 0 else ()
    ways = (scheme,) if scheme != "auto" else SCHEMES[: 2 if world > 1 and method == "full" else 1]
    tries = [(state, way, size, depth) for state in states for way in ways for size in good for depth in depths]
    tries += [(state, way, size, depth) for state in states for way in ways for depth in every for size in good]
    tries += [(states[-1], way, size, depth) for way in ways for size in sizes for depth in [*depths, *every][-1:]]
    for state, way, size, depth in tries:
        plan = predict(
            shape, method, tokens=size, adam_state=state, checkpointed_layers=depth, world=world, scheme=way,
            accumulates=size < step_tokens, longest=longest, **options,
        )  # fmt: skip
        if plan.total <= usable:
            said = _reason(plan, usable, states[0], sizes[0], tokens)
            return replace(plan, reason=said + (_SPLIT[way] if world > 1 and method == "full" else ""))
    return None


def _sizes(step_tokens: int, longest: int) -> list[int]:
    """Micro-batch sizes to try: the step in 1, 2, 3 ... equal parts, down to one longest row."""
    least = max(longest, 1)
    sizes: list[int] = []
    for parts in range(1, 65):
        size = max(least, -(-int(step_tokens * 1.02) // parts // 64) * 64 + 64)
        if not sizes or size < sizes[-1]:
            sizes.append(size)
    return sizes


def _reason(plan: Plan, usable: int, best_state: str, largest: int, given: int) -> str:
    said = f"{plan.total / 1e9:.1f} GB predicted of {usable / 1e9:.1f} GB usable"
    if plan.method == "full" and plan.adam_state != best_state:
        said += f"; Adam moments in {plan.adam_state}, because {best_state} would not fit"
    if plan.checkpointed_layers:
        said += f"; {plan.checkpointed_layers} layers are computed twice, because their activations would not fit"
    if not given and plan.tokens < largest:
        said += f"; micro-batches of {plan.tokens} tokens, because a whole step ({largest}) would not fit"
    return said
