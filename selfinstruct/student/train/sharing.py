"""How several processes share the work of a step: what each of them holds, and what they tell each other.

=======  =======  ===============  ==============================================================================
scheme   weights  Adam + masters   what is exchanged in a step
=======  =======  ===============  ==============================================================================
alone    whole    whole            nothing
copies   whole    whole            gradients, summed once (adapters: a few MB)
states   whole    own part         each gradient summed into its owner's part while the backward pass goes on; each
                                   new weight sent to all while the next parameters are updated
weights  part     own part         FSDP2: weights gathered layer by layer, in the forward and in the backward pass
=======  =======  ===============  ==============================================================================

``states`` computes on plain tensors as one process does, exchanges a third less than ``weights``, and copies nothing:
parts are slices of the weights and gradients themselves. It needs room for whole weights and gradients in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import _coalescing_manager

from selfinstruct.student.train.trainee import Trainee

# Renamed in torch 2.12, with a warning at every use of the old names.
_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
# Parts begin at multiples of this: the blocks of 8-bit moments.
_GRAIN = 256


def _begin_together(exchange: Callable[..., Any], pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> list[Any]:
    """Begin to exchange each (output, input); what to wait for. NCCL does all in one launch.

    Gloo gains nothing by that, and takes harm: its two threads write the name of what they have done into one string
    without a lock. The long name of a coalesced gather lies on the heap, and is written there after it was freed.
    """
    if not pairs:
        return []
    if dist.get_backend() != "nccl":
        return [exchange(output, source, async_op=True) for output, source in pairs]
    with _coalescing_manager(async_ops=True) as together:
        for output, source in pairs:
            exchange(output, source)
    return [together]


class Alone:
    """One process: it holds everything. Also what the others are told in terms of.

    ``name`` is that of the scheme where processes hold different parts. ``loss_scale`` is what a loss is multiplied
    with before the backward pass, so that gradients come out as sums.
    """

    name = ""
    loss_scale = 1
    splits_weights = False

    def in_order(self, named: Iterator[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters with their names in the order to update them in."""
        return named

    def weight(self, parameter: nn.Parameter) -> torch.Tensor:
        """The part of a parameter that this process updates; contiguous, without gradient tracking."""
        return parameter.detach()

    def gradient(self, parameter: nn.Parameter) -> torch.Tensor:
        """The same part of its gradient; TypeError without one."""
        if parameter.grad is None:
            raise TypeError("a parameter without a gradient has no part of one")
        return parameter.grad.detach()

    def backward_begins(self, *, last: bool) -> None:
        """Told before each backward pass of a step; ``last``: gradients are complete after it."""

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Told after the last backward pass: from here on ``gradient`` gives sums over all processes."""

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sums over all processes, in place."""
        return value

    def total(self, squares: torch.Tensor) -> torch.Tensor:
        """A sum over every process's parts of the gradient, from that over this one's."""
        return squares

    def updated(self, parameter: nn.Parameter) -> None:
        """Told when this process's part of a parameter is new; parameters come ``in_order``."""

    def all_updated(self) -> None:
        """Told when all parts are new."""

    def settle(self) -> None:
        """Wait until every weight is there: before weights are read in any way but a forward pass."""


class _Several(Alone):
    """Processes that add up what each has."""

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(value)
        return value


class _Parts(_Several):
    """Processes whose gradients, once summed, lie in parts."""

    def total(self, squares: torch.Tensor) -> torch.Tensor:
        return self.sum(squares)


class Copies(_Several):
    """Every process holds everything; gradients are summed in one exchange."""

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        learning = list(parameters)
        for parameter in learning:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, dtype=getattr(parameter, "grad_dtype", None))
        gradients = [parameter.grad for parameter in learning if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))


class States(_Parts):
    """Whole weights everywhere; each process updates its own part of every parameter.

    A parameter whose size does not divide evenly is updated as a whole by one process, the one that has least to do.
    The parameters of a layer are exchanged together: each exchange waits for its turn beside the layer's products.
    """

    name = "states"

    def __init__(self, trainee: Trainee, rank: int, world: int) -> None:
        self._rank, self._world = rank, world
        self._owner: dict[nn.Parameter, int] = {}
        self._bucket: dict[nn.Parameter, int] = {}
        self._members: list[list[nn.Parameter]] = []
        self._grown: list[int] = []
        self._gathering: list[nn.Parameter] = []
        self._summing = False
        self._sums: list[Any] = []
        self._coming: dict[int, list[Any]] = {}
        self._assign([p for _, p in trainee.named_trained()])
        layers = trainee.layers()
        inside = {parameter for layer in layers for parameter in layer.parameters()}
        # Bucket 0 is what lies outside the layers: a forward pass waits for it first.
        self._add(trainee, [p for p in trainee.parameters() if p not in inside])
        for layer in layers:
            self._add(layer, list(layer.parameters()))

    def _assign(self, parameters: list[nn.Parameter]) -> None:
        loads = [0] * self._world
        for parameter in parameters:
            if parameter.numel() % (self._world * _GRAIN):
                emptiest = loads.index(min(loads))
                loads[emptiest] += parameter.numel()
                self._owner[parameter] = emptiest

    def _add(self, module: nn.Module, parameters: list[nn.Parameter]) -> None:
        """A bucket; ``module`` computes with it, and waits for it."""
        number = len(self._members)
        trained = [p for p in parameters if p.requires_grad]
        self._members.append(trained)
        self._grown.append(0)
        for parameter in trained:
            self._bucket[parameter] = number
            parameter.register_post_accumulate_grad_hook(self._grows)

        def wait(_module: nn.Module, _inputs: Any) -> None:
            for work in self._coming.pop(number, []):
                work.wait()

        module.register_forward_pre_hook(wait)

    def in_order(self, named: Iterator[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, nn.Parameter]]:
        """Bucket by bucket, as a forward pass needs them."""
        return iter(sorted(named, key=lambda pair: self._bucket[pair[1]]))

    def _own(self, parameter: nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
        flat = whole.detach().view(-1)
        if parameter in self._owner:
            return flat if self._owner[parameter] == self._rank else flat[:0]
        size = flat.numel() // self._world
        return flat[self._rank * size : (self._rank + 1) * size]

    def weight(self, parameter: nn.Parameter) -> torch.Tensor:
        return self._own(parameter, parameter)

    def gradient(self, parameter: nn.Parameter) -> torch.Tensor:
        return self._own(parameter, super().gradient(parameter))

    def backward_begins(self, *, last: bool) -> None:
        self._summing = last

    def _grows(self, parameter: nn.Parameter) -> None:
        """A gradient is complete on this process; with the last one of a bucket, begin to sum it."""
        if self._summing:
            number = self._bucket[parameter]
            self._grown[number] += 1
            if self._grown[number] == len(self._members[number]):
                self._sum_bucket(number)

    def _sum_bucket(self, number: int) -> None:
        """In the order of the model: autograd's order need not be that of the other processes."""
        whole = [(p, p.grad.detach().view(-1)) for p in self._members[number] if p.grad is not None]
        even = [(self._own(p, flat), flat) for p, flat in whole if p not in self._owner]
        self._sums += _begin_together(_scatter, even)
        self._sums += [dist.reduce(flat, self._owner[p], async_op=True) for p, flat in whole if p in self._owner]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        for number, members in enumerate(self._members):
            if self._grown[number] < len(members):  # parameters that the last pass gave no gradient kept it open
                self._sum_bucket(number)
            self._grown[number] = 0
        for work in self._sums:
            work.wait()
        self._sums.clear()

    def updated(self, parameter: nn.Parameter) -> None:
        if self._gathering and self._bucket[self._gathering[0]] != self._bucket[parameter]:
            self.all_updated()
        self._gathering.append(parameter)

    def all_updated(self) -> None:
        """Send what was updated since the last time, all of one bucket."""
        if not self._gathering:
            return
        parameters, self._gathering = self._gathering, []
        works = self._coming.setdefault(self._bucket[parameters[0]], [])
        even = [(p.detach().view(-1), self.weight(p)) for p in parameters if p not in self._owner]
        works += _begin_together(_gather, even)
        works += [
            dist.broadcast(p.detach().view(-1), self._owner[p], async_op=True) for p in parameters if p in self._owner
        ]

    def settle(self) -> None:
        for works in self._coming.values():
            for work in works:
                work.wait()
        self._coming.clear()


class Weights(_Parts):
    """FSDP2: every parameter is split over all processes and gathered when its layer computes.

    Weights stay in their dtype; the optimizer keeps the exact masters of its own part.
    """

    name = "weights"
    splits_weights = True

    def __init__(self, trainee: Trainee, world: int) -> None:
        from torch.distributed.fsdp import fully_shard

        self.loss_scale = world  # FSDP averages over the processes
        apply: Callable[..., Any] = fully_shard
        for layer in trainee.layers():
            apply(layer, reshard_after_forward=True)
        apply(trainee, reshard_after_forward=False)

    def weight(self, parameter: nn.Parameter) -> torch.Tensor:
        return _local(parameter)

    def gradient(self, parameter: nn.Parameter) -> torch.Tensor:
        return _local(super().gradient(parameter))


def _local(tensor: Any) -> torch.Tensor:
    found: torch.Tensor = tensor.to_local()
    return found.detach()
