"""AdamW with exact fp32 master weights at 4 bytes a parameter, and moments in fp32, bfloat16 or 8 bits.

The update is elementwise: written once on flat tensors (``updates.py``), compiled to one fused kernel on a GPU, run as
it is on a CPU. It is that of ``torch.optim.AdamW`` (decoupled weight decay, bias corrections) with global-norm clipping
before; as there, and in the Hugging Face Trainer, only matrices decay, not norms and biases. Beside the gradient a
parameter takes 4 bytes with its master (``rounding.py``), and 8, 4 or 2.03 for moments.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from selfinstruct.student.train.sharing import Alone
from selfinstruct.student.train.updates import BLOCK, new_state, update_of

# Elements updated at once where nothing is compiled: bounds the temporaries (12 of fp32) at 200 MB.
_PIECE = 1 << 22
# Parameters below this size are updated together, up to so many elements: hundreds of adapters cost hundreds of times
# the launch of a kernel, and more of the host's time than a small model's step has.
_SMALL = 1 << 20
_TOGETHER = 1 << 24


@dataclass(frozen=True, slots=True)
class AdamSettings:
    """Numbers of the update that stay the same; the learning rate is given with each step."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_norm: float = 1.0
    state: str = "fp32"


@dataclass(frozen=True, slots=True)
class _Run:
    """Parameters that are updated together, and their state in one piece; ``decays`` holds for all of them."""

    names: list[str]
    kind: str
    decays: bool
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
        self._decays = {name: parameter.ndim > 1 for name, parameter in self.parameters.items()}
        self._state: dict[str, dict[str, torch.Tensor]] = {}
        self._runs = [self._new_run(names, weights) for names in self._small_together(weights)]
        self._device = next(iter(weights.values())).device if weights else torch.device("cpu")
        self._compiled = compiled

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
            own = (self._kinds[name], self._decays[name], weight.dtype, weight.device)
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
        state = new_state(sum(sizes), weights[names[0]].device, kind)
        for name, end, size in zip(names, itertools.accumulate(sizes), sizes, strict=True):
            self._state[name] = {slot: _piece(t, end - size, end, sum(sizes)) for slot, t in state.items()}
        return _Run(names, kind, self._decays[names[0]], state)

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
        with_decay = self._numbers(lr, grad_norm, self.settings.weight_decay)
        without = self._numbers(lr, grad_norm, 0.0) if self.settings.weight_decay else with_decay
        for number, run in enumerate(self._runs):
            numbers = with_decay if run.decays else without
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

    def _numbers(self, lr: float, grad_norm: torch.Tensor, decay: float) -> torch.Tensor:
        """(clip, lr, 1 - beta1, 1 - beta2, eps, decay, 1 - beta1**t, 1 - beta2**t), fp32, on the device.

        A tensor, because a compiled function is compiled anew for every new Python number.
        """
        s, t = self.settings, self.steps
        rest = [lr, 1 - s.beta1, 1 - s.beta2, s.eps, decay, 1 - s.beta1**t, 1 - s.beta2**t]
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
            update_of(kind, compiled=self._compiled)(*parts, numbers, seed, start)


def _piece(tensor: torch.Tensor, start: int, end: int, size: int) -> torch.Tensor:
    """Elements ``start`` to ``end`` of a parameter-sized tensor, flat, or the scales of their blocks."""
    if tensor.numel() != size:
        return tensor[start // BLOCK : end // BLOCK]
    return tensor.reshape(-1)[start:end]


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
