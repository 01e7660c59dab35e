"""``merge`` and ``export``: a tuned model as one folder, or as one file for llama.cpp."""

from __future__ import annotations

import shlex
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated

import typer

from selfinstruct.cli import options
from selfinstruct.cli.console import errors_shown, interruptions_told, result, result_json, say


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command(epilog="Example:\n\n  selfinstruct merge outputs/lora-run -o outputs/merged")(merge)
    app.command(epilog="Example:\n\n  selfinstruct export outputs/merged --gguf q8_0 -o student.gguf")(export)


def merge(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A fine-tuning run, an adapter folder, or a .gguf file.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write.")],
    dtype: Annotated[str, typer.Option(help="bf16, fp16, fp32.")] = "bf16",
    json: options.Json = False,
) -> None:
    """Write a run's model, adapter merged in, as safetensors with tokenizer and template."""
    with errors_shown(as_json=json):
        from selfinstruct.student.packages import require_packages

        require_packages()
        from selfinstruct.student.models.merge import merge as write

        with _ends_clean():
            written = write(run, out, dtype=dtype, log=say)
        _report({"out": str(written)}, f"{written}: written; try  selfinstruct chat {written}", as_json=json)


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's folder or a fine-tuning run.")],
    gguf: Annotated[str, typer.Option(help="f16 or q8_0.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The .gguf file to write.")],
    json: options.Json = False,
) -> None:
    """Write a Llama model as one GGUF file, for llama.cpp: selfinstruct generate OUT --teacher local:FILE."""
    with errors_shown(as_json=json):
        from selfinstruct.student.packages import require_packages

        require_packages()
        from selfinstruct.student.models.export_gguf import export as write

        with _ends_clean():
            written = write(model, out, gguf, log=say)
        size = written.stat().st_size
        _report({"out": str(written), "bytes": size}, f"{written}: {gguf}, {size / 1e6:.0f} MB", as_json=json)


def _ends_clean() -> AbstractContextManager[None]:
    """Ctrl-C and SIGTERM leave nothing half written: as exceptions they come past what removes it."""
    return interruptions_told(shlex.join(["selfinstruct", *sys.argv[1:]]), "begin again with")


def _report(found: dict[str, object], text: str, *, as_json: bool) -> None:
    if as_json:
        result_json(found)
    else:
        result(text)
