"""Near-duplicates out of any file, and rows of evaluation sets out of training data: exact ROUGE-L, as in a run.

A text without a single token resembles nothing by ROUGE-L. Texts that are equal to the letter are doubles all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfinstruct.dataset import tables
from selfinstruct.dataset.tables import Place
from selfinstruct.dataset.text_rows import Row
from selfinstruct.errors import UsageError
from selfinstruct.novelty.answers import Novelty
from selfinstruct.novelty.index import RougeLIndex
from selfinstruct.novelty.tokens import TOKENIZERS

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
    """What a pass over a file did. ``is_ascii`` is False as soon as a text, also of an evaluation set, is not ASCII."""

    read: int = 0
    kept: int = 0
    is_ascii: bool = True
    dropped: list[Dropped] = field(default_factory=list)


Watch = Callable[[Report], None]


def tokenizer_of(source: Path) -> str | None:
    """The tokenizer of the run that made a dataset of ours; None for any other file."""
    version = tables.version_of(source)
    identity = version.about.get("identity") if version else None
    name = identity.get("tokenizer") if isinstance(identity, dict) else None
    return name if isinstance(name, str) and name in TOKENIZERS else None


class _Texts:
    """Texts and where they stand, as an index numbers them; also those that it cannot tell from one another."""

    def __init__(self, index: RougeLIndex) -> None:
        self._index = index
        self._places: list[tuple[Place, str]] = []
        self._apart: dict[str, int] = {}  # what ROUGE-L never turns down: no tokens, or a threshold of 1

    def __getitem__(self, number: int) -> tuple[Place, str]:
        return self._places[number]

    def add(self, place: Place, text: str) -> None:
        self._index.add(text)
        self._note(place, text)

    def offer(self, place: Place, text: str) -> Novelty:
        """Add the text if it is new, and say so."""
        found = self._equal(text) or self._index.offer(text)
        if found.nearest_id is None:
            self._note(place, text)
        return found

    def query(self, text: str) -> Novelty:
        """What ``offer`` would answer; adds nothing."""
        return self._equal(text) or self._index.query(text)

    def _equal(self, text: str) -> Novelty | None:
        number = self._apart.get(text)
        return None if number is None else Novelty(kept=False, score=1.0, nearest_id=number)

    def _note(self, place: Place, text: str) -> None:
        # Only these few: in all others two equal texts have a ROUGE-L of 1, and a name more costs 100 bytes.
        if text and (self._index.threshold == 1 or not TOKENIZERS[self._index.tokenizer](text)):
            self._apart.setdefault(text, len(self._places))
        self._places.append((place, text))


def dedup(source: Path, out: Path, *, field: str | None, index: RougeLIndex, watch: Watch) -> Report:
    """Write the rows of ``source`` that are new, in order, to ``out``: each is compared with all kept before it."""
    report, kept = Report(), _Texts(index)

    def judge(place: Place, text: str) -> Dropped | None:
        novelty = kept.offer(place, text)
        return None if novelty.nearest_id is None else Dropped(place, text, novelty.score, *kept[novelty.nearest_id])

    return _filtered(source, out, field, judge, watch, report)


def decontaminate(
    source: Path, out: Path, against: Sequence[Path], *, field: str | None, index: RougeLIndex, watch: Watch
) -> Report:
    """Write the rows of ``source`` that resemble no text of the files ``against`` to ``out``, in order.

    ``index`` must be empty; it is filled with the texts of ``against``.
    """
    report, evaluation = Report(), _Texts(index)
    for path in against:
        for place, text in texts(path, field):
            report.is_ascii = report.is_ascii and text.isascii()
            evaluation.add(place, text)

    def judge(place: Place, text: str) -> Dropped | None:
        novelty = evaluation.query(text)
        near = novelty.nearest_id
        return None if near is None else Dropped(place, text, novelty.score, *evaluation[near])

    return _filtered(source, out, field, judge, watch, report)


def write_dropped(path: Path, report: Report) -> None:
    """Write the rows that were left out to a file, with what they were left out for."""
    import pyarrow as pa

    text = pa.string()
    columns = [("row", text), ("text", text), ("score", pa.float64()), ("because", text), ("because_text", text)]
    tables.write(path, (row.as_dict() for row in report.dropped), pa.schema(columns))


def _filtered(
    source: Path, out: Path, field: str | None, judge: Callable[[Place, str], Dropped | None], watch: Watch,
    report: Report,
) -> Report:  # fmt: skip
    text_of = _text_of(field)

    def turn(place: Place, row: Row) -> Row | None:
        text = text_of(place, row)
        dropped = judge(place, text)
        report.read += 1
        report.is_ascii = report.is_ascii and text.isascii()
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
