"""Steps: forward, backward and update of one batch after another, exactly those of a padded trainer.

The loss of a step is the sum of the cross-entropies of its labels over their number, whatever micro-batches and
processes the step is cut into.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from selfinstruct.student.train import batches
from selfinstruct.student.train.optimizer import SplitAdamW, learning_rate
from selfinstruct.student.train.parallel import Group
from selfinstruct.student.train.recipes import Recipe
from selfinstruct.student.train.tokens import Tokens
from selfinstruct.student.train.trainee import Trainee


@dataclass(slots=True)
class StepResult:
    """What a step came to. ``loss`` and ``grad_norm`` are numbers on the device until ``read``."""

    step: int
    lr: float
    tokens: int
    _numbers: torch.Tensor
    _ready: Any = None

    def read(self) -> tuple[float, float]:
        """(loss, norm of the gradient before clipping); waits for this step, not for what was begun after it."""
        loss, norm, _ = self._read()
        return loss, norm

    def told(self) -> bool:
        """Whether any process had something to tell (``Trainer.tells``) at this step; waits as ``read`` does."""
        return self._read()[2] > 0

    def _read(self) -> list[float]:
        if self._ready is not None:
            self._ready.synchronize()
        found: list[float] = self._numbers.tolist()
        return found


class Trainer:
    """Takes steps of a model over tokens. ``budget`` is the most tokens of a micro-batch."""

    def __init__(
        self,
        trainee: Trainee,
        optimizer: SplitAdamW,
        tokens: Tokens,
        recipe: Recipe,
        *,
        steps: int,
        budget: int,
        group: Group | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.trainee = trainee
        self.optimizer = optimizer
        self.tokens = tokens
        self.recipe = recipe
        self.steps = steps
        self.budget = budget
        self.group = group or Group()
        self.device = torch.device(device)
        self.share = optimizer.share
        self.tells = False
        self.longest = int(tokens.lengths.max())

    def rows_of(self, step: int) -> list[int]:
        """The rows of a step (from 0), by the order rule of ``batches``."""
        return [int(row) for row in batches.step_rows(len(self.tokens), self.recipe.batch, self.recipe.seed, step)]

    def micro_batches(self, rows: list[int], tokens: Tokens | None = None) -> Iterator[batches.MicroBatch]:
        """This process's share of some rows, joined and on the device."""
        source = self.tokens if tokens is None else tokens
        lengths = [int(n) for n in source.lengths[rows]]
        # Other rows may be longer than any that is trained on.
        longest = self.longest if tokens is None else max(self.longest, int(tokens.lengths.max()))
        budget = self.budget if tokens is None else max(self.budget, longest)
        for own in batches.cut(lengths, budget, self.group.world)[self.group.rank]:
            yield batches.join(source, [rows[i] for i in own], longest=longest, device=self.device)

    def step(self, step: int) -> StepResult:
        """Learn from the rows of step ``step`` (from 0). What this process ``tells`` reaches all with the result."""
        rows = self.rows_of(step)
        labels = int(self.tokens.labels[rows].sum())
        self.trainee.train()
        loss = self.backward(rows, labels)
        sums = self.share.sum(torch.stack([loss, torch.full_like(loss, float(self.tells))]))
        norm = self.share.total(self.optimizer.squares()).sqrt()
        lr = learning_rate(step, self.steps, self.recipe.lr, self.recipe.warmup_steps(self.steps), self.recipe.schedule)
        self.optimizer.step(lr, norm)
        self.optimizer.zero_grad()
        numbers, ready = _on_its_way(torch.stack([sums[0], norm, sums[1]]))
        return StepResult(step, lr, int(self.tokens.lengths[rows].sum()), numbers, ready)

    def backward(self, rows: list[int], labels: int) -> torch.Tensor:
        """Leave the step's gradient in the parameters; this process's share of the step's loss (0-d, fp32)."""
        total = torch.zeros((), device=self.device)
        batch: batches.MicroBatch | None
        coming = self.micro_batches(rows)
        batch = next(coming)
        while batch is not None:
            following = next(coming, None)
            self.share.backward_begins(last=following is None)
            loss = self.trainee(batch, max(1, labels))
            (loss * self.share.loss_scale).backward()
            total += loss.detach()
            batch = following
        self.share.sum_gradients(self.optimizer.parameters.values())
        return total

    @torch.no_grad()
    def evaluate(self, tokens: Tokens) -> float:
        """Mean cross-entropy over the labels of other rows (the validation split)."""
        self.trainee.eval()
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        for start in range(0, len(tokens), self.recipe.batch):
            rows = list(range(start, min(len(tokens), start + self.recipe.batch)))
            for batch in self.micro_batches(rows, tokens):
                total += self.trainee(batch, 1.0).double()
        self.trainee.train()
        return float(self.group.sum(total)) / max(1, int(tokens.labels.sum()))

    def heaviest_step(self) -> int:
        """The step whose largest micro-batch is the largest of the run: where memory peaks."""
        lengths = self.tokens.lengths
        # Micro-batches of a step are equal within a row, so tokens over micro-batches is their size.
        totals = np.array([int(lengths[self.rows_of(step)].sum()) for step in range(self.steps)])
        share = self.budget * self.group.world
        return int(np.argmax(totals / np.maximum(1, -(-totals // share))))

    def rehearse(self, say: Callable[[str], None] = lambda _line: None, *, may_shrink: bool = False) -> int:
        """Compile, and take the heaviest step without its update; the peak in bytes on this GPU (0 on a CPU).

        What does not fit fails now and not in the night: with OutOfMemoryError, or, when the micro-batches
        ``may_shrink``, they do, by a quarter at a time. Random states are put back: the run is not changed.
        """
        while True:
            try:
                return self._rehearse()
            except torch.cuda.OutOfMemoryError:
                self.optimizer.zero_grad()
                if not may_shrink or self.budget * 3 // 4 < self.longest:
                    raise
            # Out of the handler: there the failed pass would still be held by its traceback.
            torch.cuda.empty_cache()
            self.budget = self.budget * 3 // 4
            say(f"that did not fit; trying micro-batches of {self.budget} tokens")

    def _rehearse(self) -> int:
        cuda = self.device.type == "cuda"
        before = (torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if cuda else None)
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        rows = self.rows_of(self.heaviest_step())
        self.trainee.train()
        self.backward(rows, int(self.tokens.labels[rows].sum()))
        self.optimizer.zero_grad()
        torch.set_rng_state(before[0])
        if before[1] is not None:
            torch.cuda.set_rng_state(before[1], self.device)
        return int(torch.cuda.max_memory_allocated(self.device)) if cuda else 0


def _on_its_way(numbers: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Start to copy numbers to the host without waiting: (host tensor, event when it is there)."""
    if not numbers.is_cuda:
        return numbers.clone(), None
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call,unused-ignore]
    event.record()
    return host, event
