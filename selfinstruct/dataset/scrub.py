"""Secret-looking and personal text in any file: counted, masked, or its rows dropped, as in a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfinstruct.dataset import tables
from selfinstruct.dataset.tables import Place
from selfinstruct.dataset.text_rows import Row
from selfinstruct.quality.secrets import kinds, mask


@dataclass(slots=True)
class Report:
    """What a pass over a file saw: rows read, and where which kinds were found."""

    read: int = 0
    flagged: list[tuple[Place, tuple[str, ...]]] = field(default_factory=list)

    @property
    def kinds(self) -> dict[str, int]:
        """Rows for each kind."""
        return dict(sorted(Counter(kind for _, found in self.flagged for kind in found).items()))


def scrub(source: Path, out: Path | None, *, drop: bool) -> Report:
    """Look at all texts of every row, also nested ones; write the rows, masked or without those that were flagged.

    Nothing is written without ``out``. An ``id`` stays as it was, so that rows can be told again.
    """
    report = Report()

    def clean(place: Place, row: Row) -> Row | None:
        report.read += 1
        found = kinds(*_texts(row))
        if not found:
            return row
        report.flagged.append((place, found))
        return None if drop else _masked(row)

    if out is None:
        for place, row in tables.read(source):
            clean(place, row)
    else:
        tables.rewrite(source, out, clean)
    return report


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _masked(value: Any) -> Any:
    if isinstance(value, str):
        return mask(value)[0]
    if isinstance(value, dict):
        return {name: _masked(part) for name, part in value.items()}
    return [_masked(part) for part in value] if isinstance(value, list) else value
