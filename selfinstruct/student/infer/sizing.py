"""How many sequences run at a time: as many as the memory holds, in groups of like length."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from selfinstruct.student.infer.inference_costs import GPU_SLOTS, SPARE, prefill_tokens
from selfinstruct.student.infer.requests import Request
from selfinstruct.student.infer.slots import activation_bytes, logits_bytes, token_bytes

_CPU_SLOTS = 32  # a CPU is busy long before that; more rows only take memory


def memory_for_cache(model: Any) -> int:
    """Bytes that cache and logits may take now on the model's device; on a CPU a quarter of what is available."""
    import torch

    weight = model.get_input_embeddings().weight
    if weight.device.type != "cuda":
        return _ram_available() // 4
    torch.cuda.empty_cache()
    free, _total = torch.cuda.mem_get_info(weight.device)
    usable, token = int(free * (1 - SPARE)), activation_bytes(model.config, weight.element_size())
    return usable - token * prefill_tokens(usable, token)


def slots_for(model: Any, columns: int, wanted: int, *, limit: int | None = None) -> int:
    """How many sequences of ``columns`` tokens to run at a time, at least 1, for ``wanted`` in all.

    ``limit`` is the user's own bound. Several rounds are made equal: 805 in rounds of at most 300 become 269.
    """
    most = min(wanted, most_slots(model, limit=limit)(columns))
    return math.ceil(wanted / math.ceil(wanted / most))


def most_slots(model: Any, *, limit: int | None = None) -> Callable[[int], int]:
    """How many sequences of so many tokens fit the memory that is free now, at least 1."""
    weight = model.get_input_embeddings().weight
    most = limit or (GPU_SLOTS if weight.device.type == "cuda" else _CPU_SLOTS)
    memory, token = memory_for_cache(model), token_bytes(model.config, weight.element_size())
    return lambda columns: max(1, min(most, memory // (token * columns + logits_bytes(model.config))))


def groups_of_like_size(requests: Sequence[Request], slots_of: Callable[[int], int]) -> list[list[Request]]:
    """Longest first, so that what does not fit shows at once; all slots of a group are as long as its longest request.

    A new group begins where that would waste a fifth of the cache, once the old one fills all its slots
    (``slots_of`` tokens) at least once: a group that is not full wastes more.
    """
    ordered = sorted(requests, key=_size, reverse=True)
    groups: list[list[Request]] = []
    for request in ordered:
        longest = _size(groups[-1][0]) if groups else 0
        if not groups or (_size(request) < 0.8 * longest and len(groups[-1]) >= slots_of(longest)):
            groups.append([])
        groups[-1].append(request)
    return groups


def _size(request: Request) -> int:
    return len(request.prompt) + request.max_new_tokens


def _ram_available() -> int:
    """Bytes of memory that a process may still take; 8 GiB where the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:  # noqa: PTH123 (no file of ours)
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 8 << 30
