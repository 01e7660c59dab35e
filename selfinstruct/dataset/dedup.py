"""Near-duplicates out of any file, and rows of evaluation sets out of training data: exact ROUGE-L, as in a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfinstruct.dataset import tables
from selfinstruct.dataset.tables import Place
from selfinstruct.dataset.text_rows import Row
from selfinstruct.errors import UsageError
from selfinstruct.novelty.index import RougeLIndex

_TEXT_FIELDS = ("instruction", "prompt", "question", "text", "input")


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that was left out, and because of which: ROUGE-L ``score`` with the row at ``because``."""

    place: Place
    text: str
    score: float
    because: Place
    because_text: str

    def as_dict(self) -> dict[str, Any]:
        return {
            "row": str(self.place),
            "text": self.text,
            "score": self.score,
            "because": str(self.because),
            "because_text": self.because_text,
        }


@dataclass(slots=True)
class Report:
    """What a pass over a file did."""

    read: int = 0
    kept: int = 0
    dropped: list[Dropped] = field(default_factory=list)


Watch = Callable[[Report], None]


def dedup(source: Path, out: Path, *, field: str | None, index: RougeLIndex, watch: Watch) -> Report:
    """Write the rows of ``source`` that are new, in order, to ``out``: each is compared with all kept before it."""
    kept: list[tuple[Place, str]] = []

    def judge(place: Place, text: str) -> Dropped | None:
        novelty = index.offer(text)
        if novelty.nearest_id is not None:
            return Dropped(place, text, novelty.score, *kept[novelty.nearest_id])
        kept.append((place, text))
        return None

    return _filtered(source, out, field, judge, watch)


def decontaminate(
    source: Path, out: Path, against: Sequence[Path], *, field: str | None, index: RougeLIndex, watch: Watch
) -> Report:
    """Write the rows of ``source`` that resemble no text of the files ``against`` to ``out``, in order.

    ``index`` must be empty; it is filled with the texts of ``against``.
    """
    evaluation = [found for path in against for found in texts(path, field)]
    for _, text in evaluation:
        index.add(text)

    def judge(place: Place, text: str) -> Dropped | None:
        novelty = index.query(text)
        if novelty.nearest_id is None:
            return None
        return Dropped(place, text, novelty.score, *evaluation[novelty.nearest_id])

    return _filtered(source, out, field, judge, watch)


def write_dropped(path: Path, report: Report) -> None:
    """Write the rows that were left out to a file, with what they were left out for."""
    import pyarrow as pa

    text = pa.string()
    columns = [("row", text), ("text", text), ("score", pa.float64()), ("because", text), ("because_text", text)]
    tables.write(path, (row.as_dict() for row in report.dropped), pa.schema(columns))


def _filtered(
    source: Path, out: Path, field: str | None, judge: Callable[[Place, str], Dropped | None], watch: Watch
) -> Report:
    report, text_of = Report(), _text_of(field)

    def turn(place: Place, row: Row) -> Row | None:
        dropped = judge(place, text_of(place, row))
        report.read += 1
        if dropped:
            report.dropped.append(dropped)
        else:
            report.kept += 1
        watch(report)
        return None if dropped else row

    tables.rewrite(source, out, turn)
    return report


def texts(source: Path, field: str | None) -> Iterator[tuple[Place, str]]:
    """Each row's place and the text that is compared: ``field``, or the first of the usual ones that the file has."""
    text_of = _text_of(field)
    for place, row in tables.read(source):
        yield place, text_of(place, row)


def _text_of(field: str | None) -> Callable[[Place, Row], str]:
    """What gives a row's text to compare: the named field, or the first of the usual ones that the first row has."""
    chosen = field

    def text_of(place: Place, row: Row) -> str:
        nonlocal chosen
        if chosen is None:
            chosen = next((name for name in _TEXT_FIELDS if isinstance(row.get(name), str)), None)
            if chosen is None:
                raise UsageError(
                    f"{place}: has none of the fields {', '.join(_TEXT_FIELDS)}", hint="name it: --field NAME"
                )
        text = row.get(chosen)
        if not isinstance(text, str):
            seen = ", ".join(list(row)[:8]) if chosen not in row else f"{chosen} = {text!r:.40}"
            raise UsageError(f"{place}: has no text {chosen!r} ({seen})", hint="name the field: --field NAME")
        return text

    return text_of
