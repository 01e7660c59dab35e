"""Secret-looking and personal text in any file: counted, masked, or its rows dropped, as in a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from selfinstruct.dataset import batches, tables
from selfinstruct.dataset.tables import Place
from selfinstruct.dataset.text_rows import Row
from selfinstruct.errors import UsageError
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

    Nothing is written without ``out``. No ``id`` is reckoned again, so that rows can be told again. The names of JSON
    fields and the keys of maps are texts too; where masks make two of them the same, the second becomes ``[EMAIL] 2``.
    The names of columns (of CSV, Parquet, a dataset) are those of all rows: UsageError for one that would be flagged.
    """
    _check_columns(source)
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


def _check_columns(source: Path) -> None:
    """UsageError when a name in the columns of a table is not fit to be shown: it stands in the file, not in a row."""
    columns = tables.columns(source)
    for name in () if columns is None else batches.names(columns):
        found = kinds(name)
        if found:
            raise UsageError(
                f"{source}: the name of a column looks as if it held secrets or personal text ({', '.join(found)})",
                hint=f"rename it: {mask(name)[0]}",
            )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, part in value.items():
            if _is_flagged(name):
                yield name
            yield from _texts(part)
    elif isinstance(value, list | tuple):  # a map of Parquet is a list of pairs
        for part in value:
            yield from _texts(part)


@lru_cache(maxsize=1024)
def _is_flagged(name: str) -> bool:
    return bool(kinds(name))


def _masked(value: Any) -> Any:
    if isinstance(value, str):
        return mask(value)[0]
    if isinstance(value, dict):
        return dict(_masked_pairs(list(value.items())))
    if isinstance(value, list):
        is_map = bool(value) and all(isinstance(part, tuple) for part in value)
        return _masked_pairs(value) if is_map else [_masked(part) for part in value]
    return value


def _masked_pairs(pairs: Sequence[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    names = _masked_names([name for name, _ in pairs if isinstance(name, str)])
    return [(names[name] if isinstance(name, str) else _masked(name), _masked(part)) for name, part in pairs]


def _masked_names(names: Sequence[str]) -> dict[str, str]:
    """What each name becomes; names that are different stay so."""
    given = {name: name for name in names if not _is_flagged(name)}
    taken, numbers = set(given), Counter[str]()
    for name in names:
        if name not in given:
            masked = unique = mask(name)[0]
            while unique in taken:
                numbers[masked] += 1
                unique = f"{masked} {numbers[masked] + 1}"
            given[name] = unique
            taken.add(unique)
    return given
