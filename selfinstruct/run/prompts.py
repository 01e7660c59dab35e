"""The prompt of each request, from its number and the pool as it was ``pool_lag`` requests before: always the same."""

from __future__ import annotations

import random

from selfinstruct.methods.base import Method
from selfinstruct.records import Prompt
from selfinstruct.run.journal import Journal
from selfinstruct.run.pool import Pool


class Prompts:
    """Makes prompts. ``kept_after[n]`` rows were kept after n requests; whoever judges a request adds to it."""

    def __init__(self, method: Method, *, seed: int, pool_lag: int, pool: Pool) -> None:
        self._method, self._seed, self._lag, self._pool = method, seed, pool_lag, pool
        self.kept_after = [0]

    def restore(self, journal: Journal) -> None:
        """Take up what was judged before, and fill the pool with what was accepted."""
        for _, accepted in journal.judged():
            self.kept_after.append(self.kept_after[-1] + accepted)
        self._pool.extend(journal.accepted())

    @property
    def judged(self) -> int:
        """How many requests were judged."""
        return len(self.kept_after) - 1

    @property
    def beyond(self) -> int:
        """The first request whose prompt cannot be made yet."""
        return self.judged + self._lag

    def make(self, number: int) -> Prompt:
        """The prompt of a request before ``beyond``."""
        kept = self.kept_after[max(0, number + 1 - self._lag)]
        return self._method.opening(number, self._pool.view(kept), random.Random(f"{self._seed}/{number}"))
