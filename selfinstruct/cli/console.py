"""What commands print: results on standard output, everything else on standard error, errors in one shape."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from selfinstruct.errors import SelfInstructError


def printable(text: str) -> str:
    """The text with control characters written out: teachers and files must not steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def say(text: str) -> None:
    """A line for the user, on standard error."""
    print(printable(text), file=sys.stderr, flush=True)


def result(text: str) -> None:
    """A line of the command's result, on standard output."""
    print(printable(text), flush=True)


def result_json(value: Any) -> None:
    """The command's result for programs: one JSON object on standard output."""
    print(json.dumps(value, ensure_ascii=True), flush=True)


@contextmanager
def errors_shown(*, as_json: bool = False) -> Iterator[None]:
    """Show an error of ours as message and remedy, and exit with its code."""
    try:
        yield
    except SelfInstructError as error:
        fail(error, as_json=as_json)
    except KeyboardInterrupt:
        say("interrupted")
        raise typer.Exit(130) from None


class _Interrupted(KeyboardInterrupt):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def interruptions_told(command: str) -> Iterator[None]:
    """SIGINT and SIGTERM end what is inside at once, and the last line says how to go on. The loop, which waits for
    answers that are paid for, has handlers of its own while it runs."""

    def interrupt(number: int, _frame: object) -> None:
        raise _Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except _Interrupted as interrupted:
        say("stopped: interrupted")
        say(f"resume with: {command}")
        raise typer.Exit(128 + interrupted.number) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fail(error: SelfInstructError, *, as_json: bool = False) -> None:
    """Print an error and exit."""
    if as_json:
        result_json({"error": error.message, "hint": error.hint, "exit_code": error.exit_code})
    say(f"error: {error.message}")
    if error.hint:
        say(f"hint: {error.hint}")
    raise typer.Exit(error.exit_code)
