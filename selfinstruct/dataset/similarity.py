"""How near each row is to what came before it: Alpaca's ``most_similar_instructions`` and ``avg_similarity_score``.

Worked out when a version is published and not in the run: it is a function of the rows, and linear in the pool.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TypedDict

from selfinstruct.novelty.index import RougeLIndex
from selfinstruct.records import Row, SeedTask

NEAREST = 10


class Near(TypedDict):
    """A task that resembles a row: a seed's id or a row's id, and the ROUGE-L of the two instructions."""

    id: str
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfiledRow(Row):
    """A row and its likeness to the seeds and to all rows before it.

    ``similarity`` is the highest ROUGE-L (float64, 0 to 1), ``nearest_id`` whose it is (the earliest at a tie),
    ``mean_similarity`` the mean over all of them, ``most_similar`` the ten nearest, the nearest first.
    """

    similarity: float
    nearest_id: str | None
    mean_similarity: float
    most_similar: list[Near]


def profiled(rows: Iterable[Row], seeds: Sequence[SeedTask], *, threshold: float, tokenizer: str) -> Iterator[Row]:
    """The rows in their order, each with its likeness to seeds and earlier rows."""
    index = RougeLIndex.from_texts((seed.instruction for seed in seeds), threshold, tokenizer)
    names = [seed.task_id for seed in seeds]
    for row in rows:
        profile = index.profile(row.instruction, NEAREST)
        near = [Near(id=names[number], score=score) for number, score in profile.top]
        yield ProfiledRow(
            **{field.name: getattr(row, field.name) for field in fields(row)},
            similarity=profile.maximum,
            nearest_id=near[0]["id"] if near else None,
            mean_similarity=profile.mean,
            most_similar=near,
        )
        index.add(row.instruction)
        names.append(row.id)
