"""Which rows make a step, and how a step is cut into micro-batches without padding.

**The order rule.** Epoch ``e`` (from 0) visits the rows in the order ``torch.randperm(n)`` of a CPU generator seeded
with ``seed + e``; consecutive runs of ``batch`` rows are the steps, and the last step of an epoch may be smaller.
That is what accelerate's ``SeedableRandomSampler`` does under the Hugging Face Trainer, so a padded trainer with the
same seed draws the same examples for the same step.

The rows of a step are dealt to micro-batches of at most a budget of tokens, longest first to the emptiest one: all
are about equally long, which is what limits the peak memory, and what keeps several GPUs equally busy. The order
inside a step changes nothing in its gradient, because every token's loss is divided by the labels of the whole step.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from selfinstruct.errors import UsageError
from selfinstruct.student.train.tokens import Tokens

if TYPE_CHECKING:
    import torch

# A micro-batch is filled up to a multiple of this with one unlabelled document of its own: matrix products keep
# their aligned kernels, at 0.4 % of a micro-batch of 8,192 tokens on average.
ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows joined end to end, as tensors on one device.

    ``ids`` and ``positions`` are int64 (1, tokens); positions restart at 0 with each row. ``bounds`` is int32
    (rows + 1,): where rows begin and end. ``longest_row`` is the greatest row length that the run can meet, in tokens;
    ``longest`` that for the kernels, which the filler fits too. Both are constants of the run: a kernel would be
    compiled anew for other numbers. ``predicting`` int64 (labels,) are the indices whose next token counts,
    ``targets`` int64 (labels,) those tokens.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    bounds: torch.Tensor
    longest_row: int
    longest: int
    predicting: torch.Tensor
    targets: torch.Tensor


@functools.lru_cache(maxsize=4)
def epoch_order(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of an epoch (see the order rule above); not to be written to."""
    import torch

    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed + epoch)).numpy()
    order.setflags(write=False)
    return np.asarray(order, dtype=np.int64)


def steps_per_epoch(rows: int, batch: int) -> int:
    """Steps of an epoch; the last may be smaller than ``batch``."""
    return -(-rows // batch)


def step_rows(rows: int, batch: int, seed: int, step: int) -> NDArray[np.int64]:
    """The rows of step ``step`` (from 0, counted over all epochs)."""
    epoch, place = divmod(step, steps_per_epoch(rows, batch))
    return epoch_order(rows, seed, epoch)[place * batch : (place + 1) * batch]


def heaviest(
    lengths: NDArray[np.int64], labels: NDArray[np.int64], batch: int, seed: int, steps: int, world: int = 1
) -> tuple[int, float]:
    """Of a whole run: (most tokens that one of ``world`` processes has of a step, greatest share of labels of a step).

    ``lengths`` and ``labels`` are tokens of each row.
    """
    most, share = 0, 0.0
    for step in range(steps):
        rows = step_rows(len(lengths), batch, seed, step)
        own, total = lengths[rows], int(lengths[rows].sum())
        share = max(share, float(labels[rows].sum()) / total)
        # Dealing never gives a process more than an equal part and a row.
        if total / world + int(own.max()) > most:
            loads = (int(own[dealt].sum()) for [dealt] in cut(own.tolist(), total, world))
            most = max(most, *loads)
    return most, share


def cut(lengths: Sequence[int], budget: int, world: int = 1) -> list[list[list[int]]]:
    """Deal a step's rows to ``world`` processes: for each, micro-batches as lists of indices into ``lengths``.

    Every process gets the same number of micro-batches (they meet in collective operations), and none holds more
    than ``budget`` tokens. Deterministic. UsageError when a single row is longer than the budget.
    """
    if lengths and max(lengths) > budget:
        raise UsageError(
            f"a row of {max(lengths)} tokens does not fit a micro-batch of {budget}",
            hint="raise --tokens-per-micro-batch, or lower --max-length",
        )
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    each = max(1, -(-sum(lengths) // (budget * world)))
    while True:
        bins: list[list[int]] = [[] for _ in range(each * world)]
        loads = [0] * len(bins)
        for index in longest_first:
            emptiest = min(range(len(bins)), key=lambda b: (loads[b], b))
            bins[emptiest].append(index)
            loads[emptiest] += lengths[index]
        if max(loads) <= budget:
            break
        each += 1
    # Heaviest bins together: the n-th micro-batches of all processes take equally long.
    by_load = sorted(range(len(bins)), key=lambda b: (-loads[b], b))
    return [[sorted(bins[by_load[turn * world + rank]]) for turn in range(each)] for rank in range(world)]


def join(tokens: Tokens, rows: Sequence[int], *, longest: int, device: torch.device | str = "cpu") -> MicroBatch:
    """Join rows end to end. ``rows`` may be empty: a process without work still takes part in the step.

    ``longest`` is the greatest row length that the run can meet.
    """
    import torch

    lengths = [int(tokens.starts[r + 1] - tokens.starts[r]) for r in rows]
    real = sum(lengths)
    filler = -real % ALIGNMENT or (ALIGNMENT if not real else 0)
    parts = [tokens.row(r) for r in rows] + ([np.zeros(filler, np.int32)] if filler else [])
    sizes = lengths + ([filler] if filler else [])
    bounds = np.zeros(len(sizes) + 1, np.int32)
    np.cumsum(sizes, out=bounds[1:])
    positions = np.concatenate([np.arange(n, dtype=np.int64) for n in sizes])
    ids = np.concatenate(parts).astype(np.int64)
    targets = [
        np.arange(bounds[i] + int(tokens.loss_from[r]), bounds[i + 1], dtype=np.int64) for i, r in enumerate(rows)
    ]
    target_at = np.concatenate(targets) if targets else np.zeros(0, np.int64)

    def sent(array: NDArray[np.generic]) -> torch.Tensor:
        found = torch.from_numpy(np.ascontiguousarray(array))
        return found.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else found

    return MicroBatch(
        ids=sent(ids[None]),
        positions=sent(positions[None]),
        bounds=sent(bounds),
        longest_row=longest,
        longest=-(-max(longest, 1) // ALIGNMENT) * ALIGNMENT,
        predicting=sent(target_at - 1),
        targets=sent(ids[target_at]),
    )
