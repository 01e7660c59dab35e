"""What inference takes, and how much of a card it may: one set of numbers for the plan and for the engines."""

from __future__ import annotations

PREFILL_TOKENS = {"cuda": 16384, "cpu": 2048}
GPU_SLOTS = 1024  # sequences at a time
SPARE = 0.06  # of the free memory: fragments, graphs, libraries


def prefill_tokens(usable: int, token: int) -> int:
    """Tokens that a GPU with ``usable`` bytes reads at a time, of ``token`` bytes each: an eighth of them at most, so
    that a small card reads fewer prompts at a time."""
    return min(PREFILL_TOKENS["cuda"], usable // 8 // token)


def cache_bytes(layers: int, kv_width: int, itemsize: int) -> int:
    """Cache of one token of one sequence, over all layers."""
    return 2 * layers * kv_width * itemsize


def activation_bytes(width: int, feed_forward: int, itemsize: int) -> int:
    """Activations of one token of a prefill: those of one layer."""
    return itemsize * (8 * width + 3 * feed_forward)


def logits_bytes(vocabulary: int) -> int:
    """One row's logits, in 32 bits and with sorted copies."""
    return 24 * vocabulary
