"""What a user sees while a run works: a bar on a terminal, a plain line now and then without one."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

_LINE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of a run at one moment. ``tokens_per_second`` and ``acceptance`` look back over this command."""

    kept: int
    target: int
    requests: int
    in_flight: int
    tokens_per_second: float
    acceptance: float
    given_up: int = 0
    trouble: str = ""


class Observer(Protocol):
    """Someone who wants to see how a run gets on."""

    def show(self, snapshot: Snapshot) -> None: ...

    def say(self, message: str) -> None: ...

    def close(self) -> None: ...


class Bar:
    """A tqdm bar."""

    def __init__(self, target: int, kept: int, stream: TextIO) -> None:
        from tqdm.auto import tqdm

        self._bar: Any = tqdm(
            total=target, initial=min(kept, target), unit="task", file=stream, dynamic_ncols=True, smoothing=0.05
        )

    def show(self, snapshot: Snapshot) -> None:
        self._bar.set_postfix_str(_figures(snapshot), refresh=False)
        step = min(snapshot.kept, snapshot.target) - self._bar.n
        with _terminal_may_be_gone():
            if step > 0:
                self._bar.update(step)
            else:
                self._bar.refresh()

    def say(self, message: str) -> None:
        with _terminal_may_be_gone():
            self._bar.clear()
            self._bar.fp.write(message + "\n")
            self._bar.refresh()

    def close(self) -> None:
        with _terminal_may_be_gone():
            self._bar.close()


class Lines:
    """A plain line every ten seconds, and at the end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._start = time.monotonic()
        self._next = self._start + _LINE_SECONDS
        self._first_kept: int | None = None
        self._last: Snapshot | None = None

    def show(self, snapshot: Snapshot) -> None:
        if self._first_kept is None:
            self._first_kept = snapshot.kept
        self._last = snapshot
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _LINE_SECONDS
            self._write(snapshot)

    def say(self, message: str) -> None:
        with _terminal_may_be_gone():
            print(message, file=self._stream, flush=True)

    def close(self) -> None:
        if self._last is not None:
            self._write(self._last)

    def _write(self, snapshot: Snapshot) -> None:
        elapsed = time.monotonic() - self._start
        gained = snapshot.kept - (self._first_kept or 0)
        left = snapshot.target - snapshot.kept
        eta = f", about {_span(left * elapsed / gained)} left" if gained > 0 and left > 0 else ""
        share = min(1.0, snapshot.kept / snapshot.target)
        self.say(f"kept {snapshot.kept}/{snapshot.target} ({share:.0%}), {_figures(snapshot)}{eta}")


def observer(target: int, kept: int, stream: TextIO | None = None) -> Observer:
    """A bar when ``stream`` (standard error) is a terminal, else lines."""
    stream = stream or sys.stderr
    return Bar(target, kept, stream) if stream.isatty() else Lines(stream)


def _terminal_may_be_gone() -> suppress:
    """The work is worth more than what is shown of it."""
    return suppress(OSError)


def _figures(snapshot: Snapshot) -> str:
    parts = [
        f"{snapshot.requests} requests",
        f"{snapshot.in_flight} in flight",
        f"{snapshot.tokens_per_second:.0f} tokens/s",
        f"{snapshot.acceptance:.0%} accepted" if snapshot.requests else "waiting for the first answer",
    ]
    parts += [f"{snapshot.given_up} given up"] if snapshot.given_up else []
    return ", ".join(parts + ([snapshot.trouble] if snapshot.trouble else []))


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
