"""What an index says about a text, and what an engine must offer it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Novelty:
    """Whether a text is new.

    A rejected text has the `score` (ROUGE-L F in (threshold, 1], the float64 that rouge_score gives) and the id of the
    row that rejects it: the highest score, then the earliest row. A kept text has score 0.0 and None: what lies below
    the threshold is not computed (`RougeLIndex.profile` does that).
    """

    kept: bool
    score: float
    nearest_id: int | None


KEPT = Novelty(True, 0.0, None)  # one object for every kept text, as most are kept


@dataclass(frozen=True, slots=True)
class Profile:
    """F of a text with every row: the highest, the mean (both 0.0 over no rows) and the `top` (id, F).

    `top` is ordered by F, highest first, then by id.
    """

    maximum: float
    top: list[tuple[int, float]]
    mean: float


class Engine(Protocol):
    """A pool of rows under one threshold. Texts arrive *plain*: ASCII, or tokens joined by single spaces."""

    name: str

    def __len__(self) -> int: ...
    def offer(self, texts: Sequence[str]) -> list[Novelty]: ...
    def query(self, text: str) -> Novelty: ...
    def add(self, texts: Sequence[str]) -> None: ...
    def profile(self, text: str, k: int) -> Profile: ...
    def rows(self) -> Iterator[str]:
        """The tokens of each row in order, joined by single spaces."""
        ...
