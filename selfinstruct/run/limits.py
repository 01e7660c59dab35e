"""When a run ends before its target: budgets of this command, and a pool that gives nothing new any more."""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

_RECENT_REQUESTS = 64  # whose yield says what to expect of the next
_FEW_REQUESTS = 16  # fewer say little: what the prompt asks for is counted in, as so many requests:
_TRUSTED_REQUESTS = 2


@dataclass(slots=True)
class Spent:
    """What this command has used: requests sent (repeats of one request not counted), tokens in and out."""

    requests: int = 0
    tokens: int = 0
    tokens_written: int = 0


class Limits:
    """Budgets and the acceptance floor. ``None`` means without limit; ``max_minutes`` counts from construction."""

    def __init__(
        self,
        *,
        max_requests: int | None,
        max_tokens: int | None,
        max_minutes: float | None,
        min_acceptance: float,
        acceptance_window: int,
    ) -> None:
        self._max_requests, self._max_tokens, self._max_minutes = max_requests, max_tokens, max_minutes
        self._min_acceptance = min_acceptance
        self._recent: deque[tuple[int, int]] = deque(maxlen=acceptance_window)
        self._start = time.monotonic()

    def budget(self, spent: Spent) -> str:
        """Which budget is used up, in words; "" while none is."""
        if self._max_requests is not None and spent.requests >= self._max_requests:
            return f"--max-requests {self._max_requests} reached"
        if self._max_tokens is not None and spent.tokens >= self._max_tokens:
            return f"--max-tokens {self._max_tokens} reached"
        if self._max_minutes is not None and time.monotonic() - self._start >= self._max_minutes * 60:
            return f"--max-minutes {self._max_minutes:g} reached"
        return ""

    def seconds_left(self) -> float | None:
        """Time until ``max_minutes`` is over, None without that limit."""
        if self._max_minutes is None:
            return None
        return max(0.0, self._start + self._max_minutes * 60 - time.monotonic())

    def note(self, drafts: int, accepted: int) -> None:
        """Take note of one judged request. A request without a single draft counts as one that gave nothing."""
        self._recent.append((max(drafts, 1), accepted))

    @property
    def acceptance(self) -> float:
        """Share of the drafts of the last requests that were accepted; 1.0 before the first."""
        drafts = sum(count for count, _ in self._recent)
        return sum(accepted for _, accepted in self._recent) / drafts if drafts else 1.0

    def saturated(self) -> str:
        """Why it is no use to go on, in words; "" while it is."""
        if len(self._recent) < (self._recent.maxlen or 0) or self.acceptance >= self._min_acceptance:
            return ""
        return (
            f"the pool is saturated: of the tasks in the last {len(self._recent)} requests, "
            f"{self.acceptance:.1%} were accepted (floor {self._min_acceptance:.1%})"
        )


def requests_needed(rows: int, kept_after: Sequence[int], tasks_per_request: int) -> float:
    """How many more requests ``rows`` more rows will take, so that neither is much paid in vain nor waited for.

    ``kept_after[n]`` rows were kept after n requests. Once there is experience, a standard deviation is added: one
    request too few costs a whole round trip at the end of the run, one too many costs its price.
    """
    recent = kept_after[-_RECENT_REQUESTS - 1 :]
    count, kept = len(recent) - 1, recent[-1] - recent[0]
    if count < _FEW_REQUESTS:
        return rows * (count + _TRUSTED_REQUESTS) / (kept + _TRUSTED_REQUESTS * tasks_per_request)
    mean = max(kept / count, 0.01)
    variance = sum((b - a) ** 2 for a, b in itertools.pairwise(recent)) / count - mean**2
    needed = rows / mean
    return needed + math.sqrt(needed * max(variance, 0.0)) / mean
