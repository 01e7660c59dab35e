"""``seeds``: looking at seed files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from selfinstruct.cli import options
from selfinstruct.cli.console import errors_shown, result, result_json

app = typer.Typer(help="Check seed files.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Check seed files."""


@app.command(epilog="Example:\n\n  selfinstruct seeds check my_seeds.jsonl")
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Seed tasks, one JSON object a line.")],
    json: options.Json = False,
) -> None:
    """Read a seed file and report all its bad lines at once."""
    with errors_shown(as_json=json):
        from selfinstruct import seeds

        tasks = seeds.load(file)
        figures = {
            "tasks": len(tasks),
            "classification": sum(task.is_classification for task in tasks),
            "without_input": sum(not task.input for task in tasks),
        }
        if json:
            result_json(figures)
        else:
            result(
                f"{file}: {figures['tasks']} tasks, {figures['classification']} of classification, "
                f"{figures['without_input']} without input; all good"
            )
