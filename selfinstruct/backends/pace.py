"""How fast one endpoint may be asked: at once until it refuses, then around the rate that it accepted.

The rate follows CUBIC (RFC 9438), which botocore's adaptive retries use in the same way: back off by a factor, return
to the accepted rate quickly, stay near it, then probe beyond. A pause that the server asks for holds every request.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

_WINDOW_SECONDS, _WINDOW_REQUESTS = 1.0, 24  # what a judgement about the rate is based on, at least
_REFUSED_SHARE = 1 / 6  # fewer refusals are not answered by slowing down: gateways refuse at random, whatever the rate
_PAUSED_SHARE = 1 / 8  # but each pause costs all workers its time
_BACK_OFF, _HARD_BACK_OFF = 0.9, 0.75  # the hard one where most of the time was lost in pauses
_RECOVERY_SECONDS = 4.0
_RECOVERY_REQUESTS = 40
_SLOWEST = 0.05  # requests a second


class Pace:
    """Start times of the requests to one endpoint, in seconds of ``clock`` (monotonic)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.paused_until = -math.inf
        self._slot = -math.inf  # start of the next request at the present rate
        self._peak, self._peak_at, self._recovery = math.inf, 0.0, _RECOVERY_SECONDS
        self._longest_pause = 0.0
        self._open_window()

    @property
    def rate(self) -> float:
        """Requests a second that may start now; infinite while nothing was refused."""
        if math.isinf(self._peak):
            return math.inf
        since = (self._clock() - self._peak_at) / self._recovery
        return self._peak * (1 + (1 - _BACK_OFF) * (since - 1) ** 3)

    def opens_at(self) -> float:
        """When the next request may start; a time in the past means now."""
        return max(self.paused_until, self._slot)

    def reserve(self) -> float:
        """Take the next start time; the caller waits for it, and asks again when a pause has come in between."""
        start = max(self._clock(), self.opens_at())
        self._slot = start + 1 / self.rate
        return start

    def sent(self) -> None:
        """A request starts."""
        self._judge()
        self._sent += 1

    def refused(self, retry_after: float | None) -> None:
        """A request was refused for being too many; ``retry_after`` is the wait asked for, in seconds."""
        self._refused += 1
        if retry_after is not None:
            now = self._clock()
            until = now + retry_after
            if until > self.paused_until:
                self._paused += until - max(now, self.paused_until)
                self.paused_until = until
                self._slot = max(self._slot, until)
            self._longest_pause = max(self._longest_pause, retry_after)
        self._judge()

    def _open_window(self) -> None:
        self._since, self._sent, self._refused, self._paused = self._clock(), 0, 0, 0.0

    def _judge(self) -> None:
        """At the end of a window: slow down when too much of it was refused or lost in pauses."""
        now = self._clock()
        elapsed = now - self._since
        if elapsed < _WINDOW_SECONDS or self._sent < _WINDOW_REQUESTS:
            return
        paused = max(0.0, self._paused - max(0.0, self.paused_until - now))  # what of it has passed
        lost = paused / elapsed
        if self._refused > self._sent * _REFUSED_SHARE or (self._refused and lost > _PAUSED_SHARE):
            accepted = (self._sent - self._refused) / max(elapsed - paused, 0.02)
            factor = _HARD_BACK_OFF if lost > 0.5 else _BACK_OFF
            self._peak = max(_SLOWEST, min(accepted, self.rate) * factor / _BACK_OFF)
            self._peak_at = now
            self._recovery = max(_RECOVERY_SECONDS, 8 * self._longest_pause, _RECOVERY_REQUESTS / self._peak)
        self._longest_pause = max(0.0, self.paused_until - now)
        self._open_window()
