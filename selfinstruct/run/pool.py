"""The tasks that prompts may show: the seeds, and every accepted draft. It only grows, so a view is a length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from selfinstruct.records import Draft, SeedTask


class Pool:
    """Seeds, and accepted drafts in the order of their acceptance."""

    def __init__(self, seeds: Sequence[SeedTask]) -> None:
        self.seeds = tuple(seeds)
        self.drafts: list[Draft] = []

    def __len__(self) -> int:
        """How many drafts were accepted."""
        return len(self.drafts)

    def extend(self, drafts: Iterable[Draft]) -> None:
        self.drafts.extend(drafts)

    def view(self, length: int) -> View:
        """The pool as it was when it held ``length`` accepted drafts; costs nothing."""
        return View(self, length)


class View:
    """The pool at one point of the run."""

    def __init__(self, pool: Pool, length: int) -> None:
        self._pool, self._length = pool, length

    @property
    def seeds(self) -> Sequence[SeedTask]:
        return self._pool.seeds

    def __len__(self) -> int:
        return self._length

    def accepted(self, number: int) -> Draft:
        if not 0 <= number < self._length:
            raise IndexError(number)
        return self._pool.drafts[number]
