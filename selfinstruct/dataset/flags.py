"""Rows that look as if they hold secrets or personal text: told when they are published, whatever the run did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from selfinstruct.quality.secrets import kinds
from selfinstruct.records import Row


class Flags:
    """Sets the ``flags`` of rows that pass by, and counts them."""

    def __init__(self) -> None:
        self._rows = 0
        self._kinds: Counter[str] = Counter()

    def flagged(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows in their order, each with the kinds of secret-looking or personal text in it."""
        for row in rows:
            found = kinds(row.instruction, row.input, row.output)
            self._rows += bool(found)
            self._kinds.update(found)
            yield replace(row, flags=found) if found else row

    def counts(self) -> dict[str, Any]:
        """How many rows were flagged, and how many for each kind."""
        return {"rows": self._rows, "kinds": dict(sorted(self._kinds.items()))}
