"""The command ``selfinstruct``. Commands import what they need when they run, so that ``--help`` is instant."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from selfinstruct.cli import config, generate, model, runs, seeds

app = typer.Typer(
    name="selfinstruct",
    help="From human seed tasks to a versioned instruction dataset, written by a teacher model of your choice.",
    epilog="Begin with:  selfinstruct model pull smollm2  then  selfinstruct generate outputs/first --num 20",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"selfinstruct {version('selfinstruct')}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """From human seed tasks to a versioned instruction dataset, written by a teacher model of your choice."""


generate.register(app)
runs.register(app)
app.add_typer(seeds.app, name="seeds")
app.add_typer(model.app, name="model")
app.add_typer(config.app, name="config")


def run() -> None:
    """Entry point of the installed command."""
    app()
