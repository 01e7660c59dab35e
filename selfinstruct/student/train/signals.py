"""Signals to a run in training: they are noted, and the run ends after the step."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def signals_noted(note: Callable[[int], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run after the step, with a checkpoint; a second Ctrl-C ends it at once."""

    def noted(number: int, _frame: object) -> None:
        note(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {}
    try:
        for which in (signal.SIGINT, signal.SIGTERM):
            before[which] = signal.signal(which, noted)
    except ValueError:  # not the main thread: signals are someone else's
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
