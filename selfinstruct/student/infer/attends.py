"""Ways to compute the attention over slots, all of them torch's own; the fastest that is right is taken at start.

No kernel is ours: FlashAttention as torch carries it, scaled_dot_product_attention, and plain products that
torch.compile turns into kernels. Which is fastest depends on the card, the number of rows and of columns, so it is
measured on tensors of the real shape, for milliseconds, and each candidate's answer is compared first.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from subprocess import SubprocessError

import torch
from torch import Tensor
from torch.nn import functional

from selfinstruct.student.infer.slots import Attend, Pass

# What kernels and compilers raise where they do not work. (torch's compiler wraps what it meets into RuntimeErrors.)
REFUSALS = (RuntimeError, TypeError, AttributeError, OSError, ImportError, SubprocessError)


@dataclass(frozen=True, slots=True)
class Choice:
    """A way that was chosen. ``span_matters``: its work grows with ``Pass.span``, else with the columns in use."""

    name: str
    attend: Attend
    span_matters: bool
    why: str


def prefill_by_document(query: Tensor, key: Tensor, value: Tensor, step: Pass, scale: float) -> Tensor:
    """Causal attention within each document, one after another; works everywhere."""
    mixed = torch.empty_like(query)
    bounds = step.starts.tolist()
    for begin, end in itertools.pairwise(bounds):
        q, k, v = (tensor[begin:end].transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
        out = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        mixed[begin:end] = out[0].transpose(0, 1)
    return mixed


def prefill_flash(query: Tensor, key: Tensor, value: Tensor, step: Pass, scale: float) -> Tensor:
    """Causal attention within each document by torch's FlashAttention for variable lengths."""
    found = torch.ops.aten._flash_attention_forward(
        query, key, value, step.starts, step.starts, step.longest, step.longest, 0.0, True, False, scale=scale
    )
    mixed: Tensor = found[0]
    return mixed


def decode_flash(query: Tensor, keys: Tensor, values: Tensor, step: Pass, scale: float) -> Tensor:
    """One query a row; reads only the columns in use. A row's document begins where its slot begins."""
    rows, columns = query.shape[0], keys.shape[1]
    begins = torch.arange(0, (rows + 1) * columns, columns, dtype=torch.int32, device=query.device)
    singles = torch.arange(rows + 1, dtype=torch.int32, device=query.device)
    flat = (-1, *keys.shape[2:])
    found = torch.ops.aten._flash_attention_forward(
        query, keys.view(flat), values.view(flat), singles, begins, 1, columns, 0.0, False, False,
        scale=scale, seqused_k=step.used,
    )  # fmt: skip
    mixed: Tensor = found[0]
    return mixed


def decode_sdpa(query: Tensor, keys: Tensor, values: Tensor, step: Pass, scale: float) -> Tensor:
    """scaled_dot_product_attention over the span, unused columns masked; works everywhere.

    Heads that share keys become the queries of one head, which spares repeating the keys.
    """
    rows, heads, dim = query.shape
    q = query.view(rows, keys.shape[2], heads // keys.shape[2], dim)
    k, v = (cache[:rows, : step.span].transpose(1, 2) for cache in (keys, values))
    mask = _in_use(step, query.device)[:, None, None, :]
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).reshape(rows, heads, dim)


def _products(query: Tensor, keys: Tensor, values: Tensor, used: Tensor, scale: float) -> Tensor:
    """Attention in plain products and sums, for torch.compile: each is a reduction that reads the cache once.

    query (rows, kv_heads, group, dim), keys and values (rows, span, kv_heads, dim).
    """
    columns = torch.arange(keys.shape[1], device=keys.device)
    q, k, v = query.float(), keys.float(), values.float()
    scores = (q[:, :, :, None, :] * k.permute(0, 2, 1, 3)[:, :, None]).sum(-1) * scale
    scores = scores.masked_fill(columns >= used[:, None, None, None], float("-inf"))
    weights = torch.softmax(scores, -1)
    return (weights[..., None] * v.permute(0, 2, 1, 3)[:, :, None]).sum(-2).to(query.dtype)


@functools.cache
def _compiled_products() -> Callable[..., Tensor]:
    """``_products`` compiled; all numbers of rows and columns share the code."""
    return torch.compile(_products, dynamic=True)


def decode_products(query: Tensor, keys: Tensor, values: Tensor, step: Pass, scale: float) -> Tensor:
    """Products and sums over the span, made into kernels by torch.compile."""
    rows, heads, dim = query.shape
    q = query.view(rows, keys.shape[2], heads // keys.shape[2], dim)
    k, v = keys[:rows, : step.span], values[:rows, : step.span]
    return _compiled_products()(q, k, v, step.used, scale).reshape(rows, heads, dim)


def _in_use(step: Pass, device: torch.device) -> Tensor:
    """(rows, span) bool: which columns hold a token."""
    if step.used is None:
        raise RuntimeError("a decode step has no lengths")
    return torch.arange(step.span, device=device) < step.used[:, None]


def choose_prefill(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> Choice:
    """FlashAttention where it works and agrees with document-by-document attention, else the latter."""
    fallback = Choice("sdpa by document", prefill_by_document, True, "")
    if device.type != "cuda":
        return _because(fallback, "no GPU")
    starts = torch.tensor([0, 5, 40], dtype=torch.int32, device=device)
    q, k, v = (torch.randn(40, n, dim, dtype=dtype, device=device) for n in (heads, kv_heads, kv_heads))
    step = Pass(starts, starts, (), starts, 35, None, 0, prefill_flash)
    try:
        seen = prefill_flash(q, k, v, step, dim**-0.5)
    except REFUSALS as error:
        return _because(fallback, f"FlashAttention refused: {_first_line(error)}")
    gap = _gap(seen, prefill_by_document(q, k, v, step, dim**-0.5))
    if gap > 0.02:
        return _because(fallback, f"FlashAttention differs by {gap:.3f}")
    return Choice("flash", prefill_flash, False, f"differs by {gap:.4f}")


def choose_decode(query: Tensor, keys: Tensor, values: Tensor, used: Tensor, *, may_compile: bool) -> Choice:
    """The fastest right candidate for these tensors (see ``Pass`` for shapes); ``why`` holds all timings."""
    span = min(keys.shape[1], -(-int(used.max()) // 64) * 64)
    plain = Choice("sdpa", decode_sdpa, True, "")
    if query.device.type != "cuda":
        return _because(plain, "no GPU")
    scale = query.shape[-1] ** -0.5
    step = Pass(used, used, (), used, 0, used, span, decode_sdpa)
    expected = decode_sdpa(query, keys, values, step, scale)
    timed: list[tuple[float, Choice]] = []
    notes = []
    for candidate in _candidates(plain, may_compile=may_compile):
        try:
            gap = _gap(candidate.attend(query, keys, values, step, scale), expected)
            seconds = _time(candidate.attend, query, keys, values, step, scale)
        except REFUSALS as error:
            notes.append(f"{candidate.name} refused: {_first_line(error)}")
            continue
        notes.append(f"{candidate.name} {seconds * 1e6:.0f} us" + (f", differs by {gap:.3f}" if gap > 0.02 else ""))
        if gap <= 0.02:
            timed.append((seconds, candidate))
    best = min(timed, key=lambda pair: pair[0])[1] if timed else plain
    return _because(best, "; ".join(notes))


def _candidates(plain: Choice, *, may_compile: bool) -> Iterator[Choice]:
    yield plain
    yield Choice("flash", decode_flash, False, "")
    if may_compile:
        yield Choice("compiled products", decode_products, True, "")


def _because(choice: Choice, why: str) -> Choice:
    return Choice(choice.name, choice.attend, choice.span_matters, why)


def _gap(seen: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest value; inf for anything that is not a number."""
    gap = float((seen.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-9))
    return gap if gap == gap else float("inf")


def _time(attend: Attend, query: Tensor, keys: Tensor, values: Tensor, step: Pass, scale: float) -> float:
    """Seconds of a call, launches included, mean of 20."""
    for _ in range(3):
        attend(query, keys, values, step, scale)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(20):
        attend(query, keys, values, step, scale)
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / 20


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
