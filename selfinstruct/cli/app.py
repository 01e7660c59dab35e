"""All commands. They import what they need when they run, so that ``--help`` is instant."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from selfinstruct.cli import (
    config,
    dedup,
    finetune,
    generate,
    infer,
    keys,
    merge,
    model,
    runs,
    scrub,
    seeds,
    serve,
    verify,
)
from selfinstruct.cli.console import errors_shown


class _Commands(TyperGroup):
    """The commands; what typer itself says of a wrong command line repeats no key that stands in it."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with keys.unrepeated(os.environ):
            return super().make_context(*args, **kwargs)

    def invoke(self, *args: Any, **kwargs: Any) -> Any:
        with keys.unrepeated(os.environ):
            return super().invoke(*args, **kwargs)


app = typer.Typer(
    name="selfinstruct",
    cls=_Commands,
    help="From human seed tasks to a versioned instruction dataset, written by a teacher model of your choice.",
    epilog="Begin with:  selfinstruct model pull smollm2  then  selfinstruct generate outputs/first --num 20",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(context: typer.Context, wanted: bool) -> None:
    if not wanted:
        return
    print(f"selfinstruct {version('selfinstruct')}")
    if context.params.get("verbose"):
        _versions_behind()
    raise typer.Exit()


def _versions_behind() -> None:
    """What this program runs on: the novelty engine, Python, and the packages that decide how it behaves."""
    from selfinstruct.novelty.index import RougeLIndex

    print(f"novelty engine: {RougeLIndex().engine}")
    print(f"python {platform.python_version()} on {platform.platform()}")
    for name in ("openai", "datasets", "pyarrow", "rapidfuzz", "numpy", "xllamacpp", "torch", "transformers"):
        try:
            print(f"{name} {version(name)}")
        except PackageNotFoundError:
            print(f"{name} is not installed")


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", help="With --version: what it runs on.", is_eager=True)] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", callback=_version)] = False,
) -> None:
    """From human seed tasks to a versioned instruction dataset, written by a teacher model of your choice."""
    with errors_shown(as_json="--json" in sys.argv):
        _check_arguments(sys.argv[1:])


def _check_arguments(arguments: list[str]) -> None:
    """UsageError for one that is not UTF-8: no JSON, Parquet or journal could hold it, which else is seen too late."""
    from selfinstruct.errors import UsageError

    for number, argument in enumerate(arguments, start=1):
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UsageError(f"argument {number} is not UTF-8", hint="rename that file or folder") from None


generate.register(app)
runs.register(app)
verify.register(app)
dedup.register(app)
scrub.register(app)
finetune.register(app)
merge.register(app)
infer.register(app)
serve.register(app)
app.add_typer(seeds.app, name="seeds")
app.add_typer(model.app, name="model")
app.add_typer(config.app, name="config")
