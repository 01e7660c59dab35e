"""``serve`` and ``chat``: a model as an endpoint, or in the terminal."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from selfinstruct.cli import options
from selfinstruct.cli.console import errors_shown, printable, result, result_json, say
from selfinstruct.cli.infer import Batch, Compile, Dtype, Model, Quant, Temperature, Template

if TYPE_CHECKING:
    from selfinstruct.student.models.weights import Loaded
    from selfinstruct.student.serve.serve import Service

_SERVE_EXAMPLES = """Examples:

  selfinstruct serve outputs/merged --port 8000

  \b
  selfinstruct generate outputs/next --teacher student \\
      --base-url http://127.0.0.1:8000/v1"""


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command(epilog=_SERVE_EXAMPLES)(serve)
    app.command(epilog="Example:\n\n  selfinstruct chat outputs/merged")(chat)


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on; beyond loopback only with a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    alias: Annotated[str, typer.Option(help="The model's name in requests.")] = "student",
    token_env: Annotated[
        str, typer.Option(metavar="NAME", help="Environment variable that holds the token clients must send.")
    ] = "SELFINSTRUCT_SERVE_TOKEN",  # noqa: S107 (a name, no password)
    batch: Batch = None,
    context: Annotated[int | None, typer.Option(min=2, help="Longest prompt and reply together [4096].")] = None,
    template: Template = None,
    dtype: Dtype = "auto",
    quant: Quant = None,
    compile_layers: Compile = None,
    json: options.Json = False,
) -> None:
    """Serve MODEL to OpenAI-compatible clients on this machine: chat, completions, models."""
    with errors_shown(as_json=json):
        from selfinstruct.student.packages import require_packages

        token = os.environ.get(token_env, "").strip()
        _check_host(host, token, token_env)
        require_packages()
        from selfinstruct.student.models.weights import load
        from selfinstruct.student.serve import serving

        serving.check_slots(batch)  # before the weights are read, which takes long
        say(f"loading {model}")
        loaded = load(model, dtype=dtype, quant=quant, template=template)
        service = serving.open_service(
            loaded, name=alias, slots=batch, context=context, compile_layers=bool(compile_layers), token=token, log=say
        )
        try:
            serving.serve(service, host, port, lambda url: _announce(url, service, as_json=json))
        finally:
            service.live.close()


def _announce(url: str, service: Service, *, as_json: bool) -> None:
    if as_json:
        result_json({"base_url": url, "model": service.name, "context": service.context})
    else:
        result(f"serving {service.name} at {url} (Ctrl-C ends it)")
    say(f"use it:  selfinstruct generate OUT --teacher {service.name} --base-url {url}")


def _check_host(host: str, token: str, token_env: str) -> None:
    from selfinstruct.backends.base import is_loopback_host
    from selfinstruct.errors import UsageError

    if not is_loopback_host(host) and not token:
        raise UsageError(
            f"--host {host} would let other machines in, and {token_env} holds no token",
            hint=f"export {token_env}=... (clients send it as their API key), or leave --host out",
        )


def chat(
    model: Model,
    system: Annotated[str, typer.Option(help="What the model is told first.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply, in tokens.")] = 512,
    temperature: Temperature = 0.7,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that reach this share.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Random seed of the draws.")] = 0,
    template: Template = None,
    dtype: Dtype = "auto",
    quant: Quant = None,
) -> None:
    """Talk to MODEL in the terminal. /reset forgets, /exit or Ctrl-D ends, Ctrl-C breaks a reply off."""
    with errors_shown():
        from selfinstruct.student.packages import require_packages

        require_packages()
        from selfinstruct.errors import UsageError
        from selfinstruct.student.infer.chat import Chat
        from selfinstruct.student.infer.sampling import Sampling, out_of_range
        from selfinstruct.student.models.weights import load

        how = Sampling(temperature, top_p, 0.0, seed)
        if bad := out_of_range(how):
            raise UsageError(f"--{bad} is out of range", hint="see selfinstruct chat --help")
        loaded: Loaded = load(model, dtype=dtype, quant=quant, template=template)
        talk = Chat(
            loaded,
            sampling=how,
            max_new_tokens=max_new_tokens,
            system=system,
            on_forget=lambda turns: say(f"(the first {turns} turns are forgotten: no room)"),
        )
        say(f"{loaded.source.name}, template {loaded.template.name}; /reset forgets, /exit ends")
        try:
            while _turn(talk):
                pass
        finally:
            talk.close()


def _turn(talk: object) -> bool:
    """One question and its reply; False at the end."""
    from selfinstruct.errors import UsageError
    from selfinstruct.student.infer.chat import Chat
    from selfinstruct.student.prompt import is_unicode

    if not isinstance(talk, Chat):
        raise TypeError("no conversation")
    try:
        said = input("> " if sys.stdin.isatty() else "").strip()
    except UnicodeDecodeError:
        said = "\udc80"
    except EOFError:
        return False
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return False
    if said in ("/exit", "/quit"):
        return False
    if said == "/reset":
        talk.reset()
        say("(forgotten)")
        return True
    if not said:
        return True
    if not is_unicode(said):
        say("that holds bytes that are no UTF-8")
        return True
    try:
        for piece in talk.say(said):
            print(printable(piece), end="", flush=True)
    except KeyboardInterrupt:
        say("\n(broken off)")
    except UsageError as error:
        say(f"{error.message}; {error.hint}")
    print(flush=True)
    return True
