"""AdamW with exact fp32 master weights at 4 bytes a parameter, and moments in fp32, bfloat16 or 8 bits.

The update is elementwise: written once on flat tensors, compiled to one fused kernel on a GPU, run as it is on a
CPU. It is that of ``torch.optim.AdamW`` (decoupled weight decay, bias corrections) with global-norm clipping before.

Bytes a parameter beside the gradient: weights with master 4 (``rounding.py``), and moments of

=====  ========================================================================================  =====
fp32   as ``torch.optim.AdamW``                                                                  8
bf16   both in bfloat16, rounded stochastically                                                  4
8bit   blocks of 256: m / sqrt(v) linearly in int8, sqrt(v) on a logarithmic scale in uint8      2.03
=====  ========================================================================================  =====

8bit keeps the *ratio* m / sqrt(v), the very quantity that Adam steps by, so the rounding error of a step is at most
1/127 of its block's largest, and no small v can blow a rounded m up. Both are rounded stochastically.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from selfinstruct.student.rounding import join_halves, narrow, noise, split_halves, widen
from selfinstruct.student.sharing import Alone

STATES = ("fp32", "bf16", "8bit")
BLOCK = 256
# Elements updated at once where nothing is compiled: bounds the temporaries (12 of fp32) at 200 MB.
_PIECE = 1 << 22
# Parameters below this size are updated together, up to so many elements: hundreds of adapters cost hundreds of times
# the launch of a kernel, and more of the host's time than a small model's step has.
_SMALL = 1 << 20
_TOGETHER = 1 << 24
# sqrt(v) of a block is kept down to 2**-24 of its largest, in steps of 2**(24/254); code 0 is an exact zero.
_OCTAVES = 24.0


@dataclass(frozen=True, slots=True)
class AdamSettings:
    """Numbers of the update that stay the same; the learning rate is given with each step."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_norm: float = 1.0
    state: str = "fp32"


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


@dataclass(frozen=True, slots=True)
class _Run:
    """Parameters that are updated together, and their state in one piece."""

    names: list[str]
    kind: str
    state: dict[str, torch.Tensor]


class SplitAdamW:
    """AdamW over named parameters, bfloat16 (with exact masters) or fp32; of each, the part that is this process's.

    State tensors live on the parameters' devices and are made at once, so that memory that will not suffice shows
    before the first step. ``state_tensors`` gives them for a checkpoint; nothing else has to be kept but ``steps``.
    """

    def __init__(
        self, parameters: Iterator[tuple[str, torch.nn.Parameter]], settings: AdamSettings, *,
        share: Alone | None = None, compiled: bool = False,
    ) -> None:  # fmt: skip
        self.settings = settings
        self.share = share or Alone()
        self.steps = 0
        self.parameters = {name: parameter for name, parameter in parameters if parameter.requires_grad}
        weights = {name: self.share.weight(p) for name, p in self.parameters.items()}
        self._kinds = {name: self._kind(weight) for name, weight in weights.items()}
        self._state: dict[str, dict[str, torch.Tensor]] = {}
        self._runs = [self._new_run(names, weights) for names in self._small_together(weights)]
        self._device = next(iter(weights.values())).device if weights else torch.device("cpu")
        self._compiled = compiled
        self._functions: dict[str, Any] = {kind: _compiled(kind) if compiled else step for kind, step in _STEPS.items()}

    def _kind(self, weight: torch.Tensor) -> str:
        if not weight.is_contiguous():
            raise TypeError("cannot train weights that are not contiguous in memory")
        if weight.dtype == torch.float32:
            return "plain"
        if weight.dtype != torch.bfloat16:
            raise TypeError(f"cannot train weights in {weight.dtype}; use bfloat16 or float32")
        # Norms and other small tensors keep full moments: they are 0.004 % of a model.
        small = weight.numel() % BLOCK != 0 or weight.numel() < 16 * BLOCK
        return "fp32" if small else self.settings.state

    def _small_together(self, weights: dict[str, torch.Tensor]) -> Iterator[list[str]]:
        """Names in their order, in runs that are updated together: one large parameter, or small ones of a kind."""
        run: list[str] = []
        about: tuple[Any, ...] = ()
        for name, weight in weights.items():
            size = weight.numel()
            own = (self._kinds[name], weight.dtype, weight.device)
            joins = size < _SMALL and own == about and sum(weights[n].numel() for n in run) + size <= _TOGETHER
            if run and not joins:
                yield run
                run = []
            run.append(name)
            about = own if size < _SMALL else ()
        if run:
            yield run

    def _new_run(self, names: list[str], weights: dict[str, torch.Tensor]) -> _Run:
        """The state of a run, in one piece, and of its parameters, as slices of it."""
        kind, sizes = self._kinds[names[0]], [weights[name].numel() for name in names]
        state = _new_state(sum(sizes), weights[names[0]].device, kind)
        for name, end, size in zip(names, itertools.accumulate(sizes), sizes, strict=True):
            self._state[name] = {slot: _piece(t, end - size, end, sum(sizes)) for slot, t in state.items()}
        return _Run(names, kind, state)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """All state by ``parameter/slot``; the tensors themselves, to be saved from or loaded into."""
        return {f"{name}/{slot}": t for name, slots in self._state.items() for slot, t in slots.items()}

    def zero_grad(self) -> None:
        """Free the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def squares(self) -> torch.Tensor:
        """The sum of the squares of the gradient, 0-d in fp32; of this process's part."""
        parts = [self.share.gradient(p) for p in self.parameters.values() if p.grad is not None]
        norms = [torch.linalg.vector_norm(part, dtype=torch.float32) for part in parts if part.numel()]
        return torch.stack(norms).square().sum() if norms else torch.zeros((), device=self._device)

    @torch.no_grad()
    def step(self, lr: float, grad_norm: torch.Tensor) -> None:
        """Update all parameters; ``grad_norm`` is the global norm (0-d, fp32) that clipping goes by."""
        self.steps += 1
        numbers = self._numbers(lr, grad_norm)
        for number, run in enumerate(self._runs):
            learning = [name for name in run.names if self.parameters[name].grad is not None]
            seed = torch.full((), _seed(self.steps, number), dtype=torch.int32, device=numbers.device)
            weights = [self.share.weight(self.parameters[name]) for name in learning]
            gradients = [self.share.gradient(self.parameters[name]) for name in learning]
            if 1 < len(learning) == len(run.names):
                joined = torch.cat([weight.view(-1) for weight in weights])
                self._update(run.kind, joined, torch.cat([g.reshape(-1) for g in gradients]), run.state, numbers, seed)
                for weight, new in zip(weights, joined.split([w.numel() for w in weights]), strict=True):
                    weight.view(-1).copy_(new)
            else:
                for name, weight, gradient in zip(learning, weights, gradients, strict=True):
                    self._update(run.kind, weight, gradient, self._state[name], numbers, seed)
            for name in learning:
                self.share.updated(self.parameters[name])
        self.share.all_updated()

    def _numbers(self, lr: float, grad_norm: torch.Tensor) -> torch.Tensor:
        """(clip, lr, 1 - beta1, 1 - beta2, eps, decay, 1 - beta1**t, 1 - beta2**t), fp32, on the device.

        A tensor, because a compiled function is compiled anew for every new Python number.
        """
        s, t = self.settings, self.steps
        rest = [lr, 1 - s.beta1, 1 - s.beta2, s.eps, s.weight_decay, 1 - s.beta1**t, 1 - s.beta2**t]
        clip = (s.max_norm / (grad_norm + 1e-6)).clamp(max=1.0) if s.max_norm > 0 else torch.ones_like(grad_norm)
        sent = torch.tensor(rest, dtype=torch.float32)
        if clip.is_cuda:  # pinned, so that the host does not wait for the backward pass here
            sent = sent.pin_memory().to(clip.device, non_blocking=True)
        return torch.cat([clip.float().reshape(1), sent])

    def _update(
        self, kind: str, weight: torch.Tensor, grad: torch.Tensor, state: dict[str, torch.Tensor],
        numbers: torch.Tensor, seed: torch.Tensor,
    ) -> None:  # fmt: skip
        tensors = [weight.view(torch.int16) if kind != "plain" else weight, *state.values()]
        tensors.insert(2 if kind != "plain" else 1, grad)
        size = weight.numel()
        piece = max(1, size) if self._compiled else _PIECE
        for start in range(0, size, piece):
            parts = [_piece(t, start, min(size, start + piece), size) for t in tensors]
            self._functions[kind](*parts, numbers, seed, start)


def _piece(tensor: torch.Tensor, start: int, end: int, size: int) -> torch.Tensor:
    """Elements ``start`` to ``end`` of a parameter-sized tensor, flat, or the scales of their blocks."""
    if tensor.numel() != size:
        return tensor[start // BLOCK : end // BLOCK]
    return tensor.reshape(-1)[start:end]


def _new_state(size: int, device: torch.device, kind: str) -> dict[str, torch.Tensor]:
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


def _seed(step: int, number: int) -> int:
    """A seed in int32 for a parameter in a step."""
    mixed = (step * 0x9E3779B1 + number * 0x85EBCA77) & 0xFFFFFFFF
    return (mixed ^ (mixed >> 16)) & 0x7FFFFFFF


def learning_rate(step: int, steps: int, peak: float, warmup: int, shape: str) -> float:
    """The rate of step ``step`` (from 0), as transformers' schedules of the same name compute it."""
    if step < warmup:
        return peak * step / max(1, warmup)
    done = (step - warmup) / max(1, steps - warmup)
    if shape == "cosine":
        return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))
    if shape == "linear":
        return peak * max(0.0, 1.0 - done)
    return peak
