"""``scrub``: secret-looking and personal text out of any file."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from selfinstruct.cli import options
from selfinstruct.cli.console import errors_shown, result, result_json

_SHOWN = 5
_IN_JSON = 1000


class Way(StrEnum):
    """What to do with rows that are flagged."""

    mask = "mask"
    drop = "drop"


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command(epilog="Example:\n\n  selfinstruct scrub outputs/first -o clean.jsonl --secrets drop")(scrub)


def scrub(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="jsonl, json (an array), csv, parquet, or a dataset folder[@version]."),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUT", help="File to write; without it, only count.")
    ] = None,
    secrets: Annotated[Way, typer.Option(help="Mask what looks secret or personal, or drop its rows.")] = Way.mask,
    json: options.Json = False,
) -> None:
    """Count the rows of FILE that look as if they hold secrets or personal text; mask or drop them in OUT."""
    with errors_shown(as_json=json):
        from selfinstruct.dataset import scrub as work

        report = work.scrub(file, output, drop=secrets is Way.drop)
        if json:
            found = [{"row": str(place), "kinds": kinds} for place, kinds in report.flagged[:_IN_JSON]]
            result_json(
                {
                    "output": str(output) if output else None,
                    "read": report.read,
                    "flagged": {"rows": len(report.flagged), "kinds": report.kinds},
                    "because": found,
                }
            )
            return
        kinds = ", ".join(f"{kind} {count}" for kind, count in report.kinds.items())
        done = {Way.mask: "masked", Way.drop: "dropped"}[secrets] if output else "flagged"
        result(f"{output or file}: {len(report.flagged)} of {report.read} rows {done}{': ' if kinds else ''}{kinds}")
        for place, found_there in report.flagged[:_SHOWN]:
            result(f"  {place}  {', '.join(found_there)}")
        if len(report.flagged) > _SHOWN:
            result(f"  ... and {len(report.flagged) - _SHOWN} more; --json lists them")
