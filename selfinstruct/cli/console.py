"""What commands print: results on standard output, everything else on standard error, errors in one shape."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TextIO

import typer

from selfinstruct.errors import OutputError, SelfInstructError, UsageError


def printable(text: str) -> str:
    """The text with control characters written out: teachers and files must not steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def say(text: str) -> None:
    """A line for the user, on standard error. A command whose standard error takes nothing goes on in silence."""
    try:
        print(printable(text), file=sys.stderr, flush=True)
    except OSError:
        _to_nowhere(sys.stderr)


def result(text: str) -> None:
    """A line of the command's result, on standard output."""
    print(printable(text), flush=True)


def result_json(value: Any) -> None:
    """The command's result for programs: one line of JSON on standard output."""
    print(json.dumps(value, ensure_ascii=True), flush=True)


def output_lost(error: OSError) -> int:
    """Tell why standard output takes no more, unless its reader has just seen enough; the exit code."""
    _to_nowhere(sys.stdout)
    if isinstance(error, BrokenPipeError):
        return 1
    say(f"error: standard output cannot be written ({error.strerror or error})")
    return OutputError.exit_code


def _to_nowhere(stream: TextIO) -> None:
    """Let what is still to be written vanish: it would fail once more when Python ends."""
    with suppress(OSError, ValueError):  # a stream without a descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextmanager
def errors_shown(*, as_json: bool = False, silent: bool = False) -> Iterator[None]:
    """Show an error of ours as message and remedy, and exit with its code; ``silent``: another process shows it."""
    try:
        yield
    except SelfInstructError as error:
        fail(_name_too_long(error) or error, as_json=as_json, silent=silent)
    except OSError as error:
        if (wrong := _name_too_long(error)) is None:
            raise
        fail(wrong, as_json=as_json, silent=silent)
    except KeyboardInterrupt:
        say("interrupted")
        raise typer.Exit(130) from None


def leave_last(code: int) -> NoReturn:
    """Exit in a process that leaves the report to another one. What starts several ends all as soon as one has failed:
    the one that reports must have done so by then."""
    time.sleep(1 if code else 0)
    raise typer.Exit(code)


def _name_too_long(error: Exception) -> UsageError | None:
    """A file name that the disk does not take is wrong usage, in whichever place it is met first."""
    cause = error if isinstance(error, OSError) else error.__cause__
    if not isinstance(cause, OSError) or cause.errno != errno.ENAMETOOLONG:
        return None
    return UsageError(f"{str(cause.filename)[:80]}...: this file name is too long", hint="give it a shorter one")


class _Interrupted(KeyboardInterrupt):
    """A signal came, number ``args[0]``."""


@contextmanager
def interruptions_told(command: str, again: str = "resume with") -> Iterator[None]:
    """SIGINT and SIGTERM end what is inside at once, and the last line says how to go on, or to begin ``again``.

    The loop, which waits for answers that are paid for, has handlers of its own while it runs.
    """
    received: list[int] = []

    def interrupt(number: int, _frame: object) -> None:
        received.append(number)
        raise _Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except (_Interrupted, Exception) as error:
        if not received or isinstance(error, typer.Exit):
            raise
        # Where the signal fell into C code that imports, it comes out as that code's own error.
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        say("stopped: interrupted")
        say(f"{again}: {command}")
        raise typer.Exit(128 + received[0]) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fail(error: SelfInstructError, *, as_json: bool = False, silent: bool = False) -> None:
    """Print an error, unless ``silent``, and exit."""
    if silent:
        leave_last(error.exit_code)
    say(f"error: {error.message}")
    if error.hint:
        say(f"hint: {error.hint}")
    if as_json:
        result_json({"error": error.message, "hint": error.hint, "exit_code": error.exit_code})
    raise typer.Exit(error.exit_code)
