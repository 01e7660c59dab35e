"""Speed: real tokens a second, the share of the hardware's matmul rate, the time that is left."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

MATMUL = 8192


@dataclass(frozen=True, slots=True)
class Progress:
    """One finished step, for a progress line, a log file or a plot.

    ``step`` counts from 1. ``loss`` is the mean over the step's labels, ``tokens_per_second`` counts real tokens over
    all processes (no filler), averaged over the last steps; ``mfu`` is None without a measured matmul rate.
    ``seconds_left`` is what the remaining steps are expected to take.
    """

    step: int
    steps: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    mfu: float | None
    seconds_left: float

    def line(self) -> str:
        """One line for a terminal."""
        mfu = f"  MFU {self.mfu:.1%}" if self.mfu is not None else ""
        return (
            f"step {self.step}/{self.steps}  loss {self.loss:.4f}  lr {self.lr:.2e}  "
            f"{self.tokens_per_second:,.0f} tokens/s{mfu}  {_clock(self.seconds_left)} left"
        )


class Meter:
    """Turns finished steps into progress. ``flops_per_token`` is 6 x parameters for full training, 4 x for adapters."""

    def __init__(self, flops_per_token: float, matmul_rate: float | None, window: int = 20) -> None:
        self._flops = flops_per_token
        self._rate = matmul_rate
        self._marks: deque[tuple[float, int]] = deque(maxlen=window + 1)
        self._tokens = 0

    def start(self) -> None:
        """Begin to count: what came before (loading, compiling, a rehearsal) is not training time."""
        self._marks.append((time.perf_counter(), 0))

    def finished(self, tokens: int) -> float:
        """Count a step's real tokens; tokens a second over the last steps."""
        self._tokens += tokens
        self._marks.append((time.perf_counter(), self._tokens))
        (t0, n0), (t1, n1) = self._marks[0], self._marks[-1]
        return (n1 - n0) / max(1e-9, t1 - t0)

    def seconds_a_step(self) -> float:
        """Seconds of a step over the last steps."""
        return (self._marks[-1][0] - self._marks[0][0]) / max(1, len(self._marks) - 1)

    def mfu(self, tokens_per_second: float) -> float | None:
        """Share of the measured matmul rate that training uses; None where none was measured."""
        return tokens_per_second * self._flops / self._rate if self._rate else None


def matmul_rate(device: torch.device, size: int = MATMUL, repeats: int = 10) -> float | None:
    """FLOP/s of a ``size`` cubed bfloat16 product of random numbers on a GPU; None on a CPU.

    Random numbers, because zeros draw less power and run 13 % faster than any real training could.
    """
    if device.type != "cuda":
        return None
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        a @ b
    end.record()
    end.synchronize()
    return float(2.0 * size**3 * repeats / (start.elapsed_time(end) / 1e3))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
