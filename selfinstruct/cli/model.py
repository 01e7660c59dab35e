"""``model``: weights for local teachers."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selfinstruct.cli import options
from selfinstruct.cli.console import errors_shown, result, result_json, say

if TYPE_CHECKING:
    from selfinstruct.servers.models import ModelFile

app = typer.Typer(help="Fetch, list and check weights for local teachers.", no_args_is_help=True, rich_markup_mode=None)

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="smollm2, hf:<owner>/<repo>/<file.gguf>@<revision>, or a path.")
]


_EXAMPLES = """Examples:

  selfinstruct model pull smollm2

  selfinstruct model pull hf:owner/repo/model-Q4_K_M.gguf@main"""


@app.command(epilog=_EXAMPLES)
def pull(name: Name, json: options.Json = False) -> None:
    """Fetch a model into the cache ($SELFINSTRUCT_MODELS, else ~/.cache/selfinstruct/models) and check it."""
    with errors_shown(as_json=json):
        from selfinstruct.servers import downloads

        bar = _DownloadBar()
        try:
            path = downloads.pull(name, on_progress=bar.show)
        finally:
            bar.close()
        if json:
            result_json({"name": name, "path": str(path)})
        else:
            result(f"{name}: {path}")


@app.command("list")
def list_(json: options.Json = False) -> None:
    """List the models that are on this machine."""
    with errors_shown(as_json=json):
        from selfinstruct.servers import models

        found = models.list_models()
        if json:
            result_json([_as_dict(model) for model in found])
            return
        for model in found:
            result(f"{model.name}\t{model.bytes / 1e6:.0f} MB\t{model.licence}\t{model.path}")
        if not found:
            result("no models yet; fetch the embedded one: selfinstruct model pull smollm2")


@app.command()
def verify(name: Name, json: options.Json = False) -> None:
    """Compare a model's content with what it must be."""
    with errors_shown(as_json=json):
        from selfinstruct.servers import models

        model = models.verify(name)
        if json:
            result_json(_as_dict(model))
        else:
            result(f"{model.name}: good ({model.path})")


def _as_dict(model: ModelFile) -> dict[str, Any]:
    return {
        "name": model.name,
        "path": str(model.path),
        "bytes": model.bytes,
        "sha256": model.sha256,
        "source": model.source,
        "licence": model.licence,
    }


class _DownloadBar:
    """A bar for each thing that is fetched; one line each without a terminal."""

    def __init__(self) -> None:
        self._what = ""
        self._bar: Any = None

    def show(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self.close()
            self._what = what
            if sys.stderr.isatty():
                from tqdm.auto import tqdm

                self._bar = tqdm(desc=what, total=total or None, unit="B", unit_scale=True, file=sys.stderr)
            else:
                say(what)
        if self._bar is not None:
            self._bar.total = total or None
            self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
