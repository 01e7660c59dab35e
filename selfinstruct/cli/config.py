"""``config``: the settings of a run, as they are resolved and as they are defined."""

from __future__ import annotations

import json as json_format

import typer

from selfinstruct.cli import options
from selfinstruct.cli.console import errors_shown, result

app = typer.Typer(help="Show settings.", no_args_is_help=True, rich_markup_mode=None)


@app.command(epilog="Example:\n\n  selfinstruct config show --config my.yaml --set temperature=0.7")
def show(config: options.Config = None, set_: options.Set = None, json: options.Json = False) -> None:
    """Print the settings of file, SELFINSTRUCT_* variables and flags put together: a file for --config.

    What nobody gave stands there as a comment (with --json: as null, where the teacher decides).
    """
    with errors_shown(as_json=json):
        found = options.settings(config, {}, set_)
        result(json_format.dumps(found.to_given()) if json else found.to_given_yaml().rstrip())


@app.command()
def schema() -> None:
    """Print the JSON schema of a config file."""
    with errors_shown():
        from selfinstruct.config import RunConfig

        result(json_format.dumps(RunConfig.model_json_schema(), indent=2))
