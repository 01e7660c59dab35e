"""Flags that several commands share, and the way from flags to settings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selfinstruct.cli import keys
from selfinstruct.cli.console import say

if TYPE_CHECKING:
    from selfinstruct.config import RunConfig

_PREFIX, _OTHER_VARIABLES = "SELFINSTRUCT_", {"MODELS", "SERVE_TOKEN"}  # the others are of other commands

Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the dataset, for example outputs/alpaca.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, in one line.")]
Teacher = Annotated[
    str | None,
    typer.Option(
        help="Model that writes the tasks: local:smollm2, local:/path/model.gguf, gpt-..., or any name with --base-url."
    ),
]
BaseUrl = Annotated[
    str | None, typer.Option(metavar="URL[,URL]", help="OpenAI-compatible endpoint(s), ending with /v1.")
]
ApiKeyEnv = Annotated[
    str | None, typer.Option(metavar="NAME", help="Environment variable that holds the key [OPENAI_API_KEY].")
]
Num = Annotated[int | None, typer.Option("--num", "-n", help="Rows to reach [100].")]
Concurrency = Annotated[int | None, typer.Option(help="Requests in flight [32; 8 for a local model].")]
MaxRequests = Annotated[int | None, typer.Option(help="Stop after this many requests of this command.")]
MaxTokens = Annotated[int | None, typer.Option(help="Stop after this many tokens, in and out, of this command.")]
MaxMinutes = Annotated[float | None, typer.Option(help="Stop after this time.")]
MinAcceptance = Annotated[
    float | None, typer.Option(help="Stop when a smaller share of the last tasks is accepted [0.01].")
]
Timeout = Annotated[float | None, typer.Option(help="Seconds for one attempt of a request, all in all [300].")]
# The same for a run that goes on, whose defaults are its own: what it began with, or was last told.
_RECORDED = "[as recorded]"
NumAgain = Annotated[int | None, typer.Option("--num", "-n", help=f"Rows to reach {_RECORDED}.")]
ApiKeyEnvAgain = Annotated[
    str | None, typer.Option(metavar="NAME", help=f"Environment variable that holds the key {_RECORDED}.")
]
ConcurrencyAgain = Annotated[int | None, typer.Option(help=f"Requests in flight {_RECORDED}.")]
TimeoutAgain = Annotated[
    float | None, typer.Option(help=f"Seconds for one attempt of a request, all in all {_RECORDED}.")
]
MinAcceptanceAgain = Annotated[
    float | None, typer.Option(help=f"Stop when a smaller share of the last tasks is accepted {_RECORDED}.")
]
Profile = Annotated[
    bool | None,
    typer.Option("--profile/--no-profile", help="Publish how near each row is to the seeds and earlier rows."),
]
Config = Annotated[Path | None, typer.Option("--config", "-c", metavar="FILE", help="YAML file of settings.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any other setting; selfinstruct config schema lists them."),
]


def settings(file: Path | None, flags: dict[str, Any], assignments: list[str] | None) -> RunConfig:
    """Defaults < file < SELFINSTRUCT_* < flags, resolved. UsageError repeats no key, and settings hold none."""
    environment = dict(os.environ)
    _tell_of_unknown_variables(environment)
    with keys.concealed(environment):
        said = {**assigned(assignments), **given(flags)}
    return built(file, environment, said)


def built(file: Path | None, environment: dict[str, str], given: dict[str, Any]) -> RunConfig:
    """The settings of these sources, resolved; the keys that none of them may hold are those of the process."""
    from selfinstruct import config
    from selfinstruct.errors import UsageError

    with keys.concealed(os.environ, given.get("api_key_env")):
        found = config.load(file, environment, given)
        if _asks_openai(found, environment):
            found = config.load(
                None,  # once is enough: a pipe cannot be read again
                {"SELFINSTRUCT_BASE_URL": environment["OPENAI_BASE_URL"]},
                found.model_dump(exclude_unset=True, exclude={"base_url"}),
            )
        keys.refuse(found, os.environ)
        if found.base_url and "teacher" not in found.model_fields_set:
            raise UsageError(
                "--base-url was given, and no --teacher: which of the server's models shall write?",
                hint="add --teacher NAME, as the server calls the model",
            )
        return found.resolve()


def given(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that the user gave."""
    return {name: value for name, value in flags.items() if value is not None}


def assigned(assignments: list[str] | None) -> dict[str, Any]:
    """The settings that ``--set NAME=VALUE`` flags name; UsageError for one without ``=``."""
    from selfinstruct.errors import UsageError

    found: dict[str, Any] = {}
    for number, assignment in enumerate(assignments or [], start=1):
        name, equals, value = assignment.partition("=")
        if not equals:
            which = f" number {number}" if len(assignments or []) > 1 else ""
            raise UsageError(f"--set{which} has no '='", hint="write --set temperature=0.7")
        found[name.strip()] = value
    return found


def _tell_of_unknown_variables(environment: dict[str, str]) -> None:
    """One line for each SELFINSTRUCT_* variable that nothing reads: a slip in its name would go unseen."""
    import difflib

    from selfinstruct.config import RunConfig

    known = {name.upper() for name in RunConfig.model_fields} | _OTHER_VARIABLES
    for name in sorted(environment):
        rest = name.removeprefix(_PREFIX)
        if rest not in known and rest != name:
            near = difflib.get_close_matches(rest, known, n=1)
            say(f"warning: the variable {name[:80]} is ignored{f'; did you mean {_PREFIX}{near[0]}?' if near else ''}")


def _asks_openai(found: RunConfig, environment: dict[str, str]) -> bool:
    """True when a remote teacher is named without an endpoint: then OPENAI_BASE_URL counts, as in other tools."""
    return (
        bool(environment.get("OPENAI_BASE_URL", "").strip())
        and "SELFINSTRUCT_BASE_URL" not in environment
        and "teacher" in found.model_fields_set
        and not found.teacher.startswith(("local:", "scripted"))
        and not found.base_url
    )
