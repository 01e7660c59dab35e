"""fp32 numbers kept in 16 bits: exactly (two halves), or rounded without bias.

**Split weights.** A weight's fp32 master is the bfloat16 weight that the model computes with, and 16 more bits beside
it: ``master bits == (weight bits << 16) + low``, ``low`` a signed int16. The weight is the master
rounded to nearest (halves away from zero), and no bit of the master is lost, so an update is exactly that of fp32
master weights, at 4 bytes a parameter instead of 6.

**Stochastic rounding.** A number between two bfloat16 neighbours goes to either with a probability by its distance.
Rounding to nearest would freeze Adam's second moment: it changes by 0.1 % a step, and bfloat16 steps are 0.4 to 0.8 %.
The noise is a hash of (element, seed), so that a resumed run rounds as the unbroken one, on every device.
"""

from __future__ import annotations

import torch


def join_halves(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """int16 bit patterns of bfloat16 weights and their low halves -> fp32 masters."""
    bits = (high.to(torch.int32) << 16) + low.to(torch.int32)
    return bits.view(torch.float32)


def split_halves(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 masters -> (int16 bit patterns of the nearest bfloat16, int16 low halves)."""
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16), (bits - (high << 16)).to(torch.int16)


def widen(pattern: torch.Tensor) -> torch.Tensor:
    """int16 bit patterns of bfloat16 numbers -> fp32."""
    return (pattern.to(torch.int32) << 16).view(torch.float32)


def noise(start: int, like: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """A hash of (element number, seed) for each element: int32 in [0, 2**16). ``seed`` is a 0-d int32 tensor."""
    x = torch.arange(start, start + like.numel(), dtype=torch.int32, device=like.device).view(like.shape)
    x = (x ^ seed) * 0x2C1B3C6D
    x = (x ^ ((x >> 12) & 0xFFFFF)) * 0x297A2D39
    x = x ^ ((x >> 15) & 0x1FFFF)
    return x & 0xFFFF


def narrow(value: torch.Tensor, dither: torch.Tensor) -> torch.Tensor:
    """fp32 -> int16 bit patterns of bfloat16, rounded stochastically by ``dither`` (int32 in [0, 2**16))."""
    return ((value.view(torch.int32) + dither) >> 16).to(torch.int16)
