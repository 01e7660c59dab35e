"""A deadline that does not punish an answer for what kept this process from reading it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_TICK = 1.0  # seconds between two looks


class _Clock:
    """Counts ``seconds`` down, and then lets ``limit`` end. A look that comes late counts as two ticks at most."""

    def __init__(self, seconds: float, limit: asyncio.Timeout) -> None:
        self._loop, self._limit, self._left = asyncio.get_running_loop(), limit, seconds
        self._tick = min(_TICK, seconds / 4)
        self._seen = self._loop.time()
        self._next = self._loop.call_later(self._tick, self._look)

    def _look(self) -> None:
        now = self._loop.time()
        self._left -= min(now - self._seen, 2 * self._tick)
        self._seen = now
        if self._left <= 0:
            self._limit.reschedule(now)
        else:
            self._next = self._loop.call_later(min(self._tick, self._left), self._look)

    def stop(self) -> None:
        self._next.cancel()


@asynccontextmanager
async def awake_timeout(seconds: float) -> AsyncIterator[None]:
    """As ``asyncio.timeout``, but time in which this process was stopped (Ctrl-Z) or busy hardly counts: an answer that
    came meanwhile lies in the socket and was paid for. Raises TimeoutError."""
    async with asyncio.timeout(None) as limit:
        clock = _Clock(seconds, limit)
        try:
            yield
        finally:
            clock.stop()
