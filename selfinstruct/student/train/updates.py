"""Adam's update of flat tensors, in place: one function for each way to keep the moments.

Weights in 16 bits come as int16 bit patterns with the low halves of their masters beside them (``rounding.py``).
Moments, in bytes an element:

=====  ========================================================================================  =====
fp32   as ``torch.optim.AdamW``                                                                  8
bf16   both in bfloat16, rounded stochastically                                                  4
8bit   blocks of 256: m / sqrt(v) linearly in int8, sqrt(v) on a logarithmic scale in uint8      2.03
plain  fp32, of weights in fp32, which are their own masters                                     8
=====  ========================================================================================  =====

8bit keeps the *ratio* m / sqrt(v), the very quantity that Adam steps by, so the rounding error of a step is at most
1/127 of its block's largest, and no small v can blow a rounded m up. Both are rounded stochastically.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from selfinstruct.student.train.rounding import join_halves, narrow, noise, split_halves, widen

BLOCK = 256
# sqrt(v) of a block is kept down to 2**-24 of its largest, in steps of 2**(24/254); code 0 is an exact zero.
_OCTAVES = 24.0


def _adam(
    master: torch.Tensor, grad: torch.Tensor, m: torch.Tensor, v: torch.Tensor, numbers: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One AdamW update in fp32: (master, m, v) after it. ``numbers``: see ``SplitAdamW._numbers``."""
    clip, lr, fresh1, fresh2, eps, decay, correction1, correction2 = numbers.unbind()
    g = grad.float() * clip
    m = torch.lerp(m, g, fresh1)
    v = torch.lerp(v, g * g, fresh2)
    step = (m / correction1) / ((v / correction2).sqrt() + eps)
    return master * (1.0 - lr * decay) - lr * step, m, v


def _step_fp32(
    weight: torch.Tensor, low: torch.Tensor, grad: torch.Tensor, m: torch.Tensor, v: torch.Tensor,
    numbers: torch.Tensor, seed: torch.Tensor, start: int,
) -> None:  # fmt: skip
    master, new_m, new_v = _adam(join_halves(weight, low), grad, m, v, numbers)
    high, rest = split_halves(master)
    weight.copy_(high)
    low.copy_(rest)
    m.copy_(new_m)
    v.copy_(new_v)


def _step_bf16(
    weight: torch.Tensor, low: torch.Tensor, grad: torch.Tensor, m: torch.Tensor, v: torch.Tensor,
    numbers: torch.Tensor, seed: torch.Tensor, start: int,
) -> None:  # fmt: skip
    master, new_m, new_v = _adam(join_halves(weight, low), grad, widen(m), widen(v), numbers)
    high, rest = split_halves(master)
    dither = noise(start, grad, seed)
    weight.copy_(high)
    low.copy_(rest)
    m.copy_(narrow(new_m, dither))
    # The same hash backwards: a second, independent enough dither for free.
    v.copy_(narrow(new_v, 0xFFFF - dither))


def _step_8bit(
    weight: torch.Tensor, low: torch.Tensor, grad: torch.Tensor, ratio: torch.Tensor, root: torch.Tensor,
    ratio_top: torch.Tensor, root_top: torch.Tensor, numbers: torch.Tensor, seed: torch.Tensor, start: int,
) -> None:  # fmt: skip
    """``ratio`` int8 and ``root`` uint8, flat as the weight; their scales fp32 (blocks, 1)."""
    weight, low, grad, ratio, root = (t.view(-1, BLOCK) for t in (weight, low, grad, ratio, root))
    code = root.float()
    spread = torch.exp2((code - 255.0) * (_OCTAVES / 254.0))
    s = torch.where(code > 0, spread * root_top, 0.0)
    m = ratio.float() * (ratio_top / 127.0) * s
    master, new_m, new_v = _adam(join_halves(weight, low), grad, m, s * s, numbers)
    high, rest = split_halves(master)
    weight.copy_(high)
    low.copy_(rest)
    dither = noise(start, grad, seed)
    up, up_again = dither.float() / 65536.0, (0xFFFF - dither).float() / 65536.0
    new_s = new_v.sqrt()
    top = new_s.amax(dim=-1, keepdim=True)
    position = torch.log2(new_s / top.clamp_min(1e-38)) * (254.0 / _OCTAVES) + 255.0
    codes = torch.floor(position + up).clamp(0.0, 255.0)
    kept = torch.where(codes > 0, torch.exp2((codes - 255.0) * (_OCTAVES / 254.0)) * top, 0.0)
    # The ratio to the root as it was stored: their product then gives m back whatever the root's rounding was.
    new_ratio = torch.where(kept > 0, new_m / kept.clamp_min(1e-38), 0.0)
    new_top = new_ratio.abs().amax(dim=-1, keepdim=True)
    scaled = new_ratio * (127.0 / new_top.clamp_min(1e-38))
    root.copy_(codes.to(torch.uint8))
    ratio.copy_(torch.floor(scaled + up_again).clamp(-127.0, 127.0).to(torch.int8))
    root_top.copy_(top)
    ratio_top.copy_(new_top)


def _step_plain(
    weight: torch.Tensor, grad: torch.Tensor, m: torch.Tensor, v: torch.Tensor,
    numbers: torch.Tensor, seed: torch.Tensor, start: int,
) -> None:  # fmt: skip
    """fp32 weights are their own masters."""
    master, new_m, new_v = _adam(weight, grad, m, v, numbers)
    weight.copy_(master)
    m.copy_(new_m)
    v.copy_(new_v)


_STEPS: dict[str, Callable[..., None]] = {
    "fp32": _step_fp32,
    "bf16": _step_bf16,
    "8bit": _step_8bit,
    "plain": _step_plain,
}


@functools.cache
def _compiled(kind: str) -> Any:
    """One program for a kind and all sizes, whichever optimizer asks first."""
    return torch.compile(_STEPS[kind], dynamic=True)


def update_of(kind: str, *, compiled: bool) -> Callable[..., None]:
    """The update of a kind: ``update(weight, ..., gradient, ..., numbers, seed, start)``, tensors flat and of one size
    but for scales of blocks; the state's tensors in the order of ``new_state``."""
    found: Callable[..., None] = _compiled(kind) if compiled else _STEPS[kind]
    return found


def new_state(size: int, device: torch.device, kind: str) -> dict[str, torch.Tensor]:
    """The state of ``size`` elements, in the order that their step function takes it."""

    def zeros(dtype: torch.dtype, shape: Sequence[int] | None = None) -> torch.Tensor:
        return torch.zeros(shape if shape is not None else (size,), dtype=dtype, device=device)

    if kind == "plain":
        return {"m": zeros(torch.float32), "v": zeros(torch.float32)}
    low = {"low": zeros(torch.int16)}
    if kind == "fp32":
        return {**low, "m": zeros(torch.float32), "v": zeros(torch.float32)}
    if kind == "bf16":
        return {**low, "m": zeros(torch.int16), "v": zeros(torch.int16)}
    scales = (size // BLOCK, 1)
    return {
        **low,
        "ratio": zeros(torch.int8),
        "root": zeros(torch.uint8),
        "ratio_top": zeros(torch.float32, scales),
        "root_top": zeros(torch.float32, scales),
    }
