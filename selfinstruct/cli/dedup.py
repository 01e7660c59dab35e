"""``dedup`` and ``decontaminate``: the novelty filter for any file."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selfinstruct.cli import options
from selfinstruct.cli.console import errors_shown, result, result_json, say

if TYPE_CHECKING:
    from selfinstruct.dataset.dedup import Report
    from selfinstruct.novelty.index import RougeLIndex

_SHOWN = 5
_IN_JSON = 1000

File = Annotated[
    Path, typer.Argument(metavar="FILE", help="jsonl, json (an array), csv, parquet, or a dataset folder[@version].")
]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="File to write; its name says the format.")]
Field = Annotated[str | None, typer.Option(help="Field to compare [instruction, prompt, question, text or input].")]
Threshold = Annotated[float, typer.Option(help="Highest ROUGE-L of a row that stays.")]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        help="rouge (as rouge_score, for English) or unicode (all scripts) "
        "[a dataset: its run's; else unicode, if a text is not ASCII]."
    ),
]
DroppedFile = Annotated[
    Path | None, typer.Option("--dropped", metavar="FILE", help="Write every dropped row, its score and its double.")
]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command(epilog="Example:\n\n  selfinstruct dedup tasks.jsonl -o new.jsonl --dropped why.jsonl")(dedup)
    app.command(epilog="Example:\n\n  selfinstruct decontaminate tasks.jsonl --against eval.json -o clean.jsonl")(
        decontaminate
    )


def dedup(
    file: File,
    output: Output,
    field: Field = None,
    threshold: Threshold = 0.7,
    tokenizer: Tokenizer = None,
    dropped: DroppedFile = None,
    json: options.Json = False,
) -> None:
    """Keep the rows of FILE that are new: none has a ROUGE-L above the threshold with a row kept before it."""
    with errors_shown(as_json=json):
        from selfinstruct.dataset import dedup as work

        index, of_run = _index(threshold, tokenizer, file)
        _check_dropped(dropped, output, file)
        with _Bar(file) as bar:
            report = work.dedup(file, output, field=field, index=index, watch=bar.show)
        words = _chosen(report, tokenizer, of_run)
        _finish(report, output, dropped, index, words, as_json=json)


def decontaminate(
    file: File,
    against: Annotated[list[Path], typer.Option(metavar="EVAL", help="Evaluation set; may be given several times.")],
    output: Output,
    field: Field = None,
    threshold: Threshold = 0.7,
    tokenizer: Tokenizer = None,
    dropped: DroppedFile = None,
    json: options.Json = False,
) -> None:
    """Keep the rows of FILE that resemble no row of the evaluation sets."""
    with errors_shown(as_json=json):
        from selfinstruct.dataset import dedup as work

        index, of_run = _index(threshold, tokenizer, file)
        _check_output(output, against)
        _check_dropped(dropped, output, file, *against)
        with _Bar(file) as bar:
            report = work.decontaminate(file, output, against, field=field, index=index, watch=bar.show)
        words = _chosen(report, tokenizer, of_run)
        _finish(report, output, dropped, index, words, as_json=json)


def _index(threshold: float, tokenizer: str | None, file: Path) -> tuple[RougeLIndex, str | None]:
    """An empty index, and the tokenizer of the run that made the file, if that counts.

    Where nothing says another, "unicode" serves both defaults: on ASCII texts its tokens are those of "rouge". So the
    file need not be read once more to choose.
    """
    from selfinstruct.dataset.dedup import tokenizer_of
    from selfinstruct.errors import UsageError
    from selfinstruct.novelty.index import RougeLIndex

    of_run = None if tokenizer else tokenizer_of(file)
    try:
        return RougeLIndex(threshold, tokenizer or of_run or "unicode"), of_run
    except ValueError as error:
        raise UsageError(str(error), hint="see --help") from None


def _chosen(report: Report, given: str | None, of_run: str | None) -> str:
    """The name of the tokenizer that was used; one that nobody named is told."""
    if given:
        return given
    name = of_run or ("rouge" if report.is_ascii else "unicode")
    why = (
        "as in the dataset's run" if of_run else f"{'all texts are' if report.is_ascii else 'not all texts are'} ASCII"
    )
    say(f"tokenizer: {name} ({why}; --tokenizer names another)")
    return name


def _check_dropped(dropped: Path | None, *others: Path) -> None:
    """UsageError when the dropped rows would be written over a file that the command reads or writes."""
    from selfinstruct.errors import UsageError

    if dropped and _place(dropped) in {name for other in others for name in (_place(other), other.resolve())}:
        raise UsageError(f"--dropped {dropped}: is another file of this command", hint="name a file of its own")


def _check_output(output: Path, against: list[Path]) -> None:
    """UsageError when the output is an evaluation set, by its own name or through links on either side."""
    from selfinstruct.errors import UsageError

    for path in against:
        if {_place(output), output.resolve()} & {_place(path), path.resolve()}:
            raise UsageError(f"-o {output}: is the evaluation set {path}", hint="name a file of its own")


def _place(path: Path) -> Path:
    return path.parent.resolve() / path.name  # a link is replaced, not followed


def _finish(
    report: Report, output: Path, dropped: Path | None, index: RougeLIndex, tokenizer: str, *, as_json: bool
) -> None:
    from selfinstruct.dataset.dedup import write_dropped

    if dropped:
        write_dropped(dropped, report)
    if as_json:
        result_json(
            {
                "output": str(output),
                "read": report.read,
                "kept": report.kept,
                "dropped": len(report.dropped),
                "engine": index.engine,
                "tokenizer": tokenizer,
                "because": [row.as_dict() for row in report.dropped[:_IN_JSON]],
            }
        )
        return
    result(f"{output}: {report.kept} of {report.read} rows kept, {len(report.dropped)} dropped ({index.engine} engine)")
    for row in report.dropped[:_SHOWN]:
        result(f"  {row.place}  {row.text[:60]!r}")
        result(f"    ROUGE-L {row.score:.3f} with {row.because}  {row.because_text[:60]!r}")
    if len(report.dropped) > _SHOWN and not dropped:
        result(f"  ... and {len(report.dropped) - _SHOWN} more; --dropped FILE writes them all")


class _Bar:
    """Rows read, on a terminal; nothing without one, where the result says enough."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._bar: Any = None
        self._next = 0.0

    def __enter__(self) -> _Bar:
        if sys.stderr.isatty():
            from tqdm.auto import tqdm

            self._bar = tqdm(desc=self._file.name, unit="row", unit_scale=True, file=sys.stderr)
        return self

    def show(self, report: Report) -> None:
        if self._bar is not None and (report.read & 0xFF == 0 and time.monotonic() >= self._next):
            self._next = time.monotonic() + 0.1
            self._bar.set_postfix_str(f"{len(report.dropped)} dropped", refresh=False)
            self._bar.update(report.read - self._bar.n)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
