"""The command ``selfinstruct``, from its first import to its exit code."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading


def run() -> None:
    """Entry point of the installed command. It imports inside: Ctrl-C may come while Python still reads modules."""
    try:
        _open_closed_streams()
        _send_dropped_interruptions_again()
        from selfinstruct.cli.app import app

        try:
            app()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:
        _interrupted()
    except OSError as error:
        if error.filename is not None:  # commands map all others: without a file's name it is what they print
            raise
        from selfinstruct.cli.console import output_lost

        sys.exit(output_lost(error))
    except SystemExit as ended:
        if isinstance(getattr(ended.__context__, "__cause__", None), KeyboardInterrupt):  # typer caught it, silently
            _interrupted()
        _close_down()
        raise


def _send_dropped_interruptions_again() -> None:
    """Python drops, and prints, what is raised while it destroys an object, also at the end of an import."""
    before = sys.unraisablehook

    def dropped(what: sys.UnraisableHookArgs) -> None:
        if isinstance(what.exc_value, KeyboardInterrupt):
            number = what.exc_value.args[0] if what.exc_value.args else signal.SIGINT
            threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
        else:
            before(what)

    sys.unraisablehook = dropped


def _open_closed_streams() -> None:
    """Who starts us with a closed stream wants to hear nothing: without it prints fail, or go to another one, and files
    of ours would get its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, PTH123 (open to the end)


def _interrupted() -> None:
    _close_down()
    print("interrupted", file=sys.stderr)
    sys.exit(130)


def _close_down() -> None:
    """From here on a signal ends what still hangs, without a traceback, and does not change how the command ended."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os._exit(128 + number))
        atexit.register(signal.signal, number, signal.SIG_IGN)  # all threads are over by then
