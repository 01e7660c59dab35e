"""How fast one endpoint may be asked: at once until it refuses, then around the rate that it accepted.

Near that rate the pace follows CUBIC (RFC 9438), which botocore's adaptive retries use in the same way: back off by a
factor, return to the accepted rate quickly, stay near it, then probe beyond. A pause that the server asks for holds
every request and costs all of them its time, so the rate is first looked for from below: after the first pause it
doubles in seconds, after the next more slowly.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

_WINDOW_SECONDS, _WINDOW_REQUESTS = 1.0, 24  # what a judgement about refusals without a pause is based on, at least
_REFUSED_SHARE = 1 / 6  # fewer refusals are not answered by slowing down: gateways refuse at random, whatever the rate
_BACK_OFF = 0.9
_MOST_AT_ONCE = 0.5  # a window is short, and what follows it may differ
_BELOW_RECENT, _BELOW_LASTING = 0.7, 0.95  # of the rate that led to a pause: after a moment of it, after a long time
_RECENT_SECONDS, _STEADY_SECONDS = 0.5, 2.0
_FIRST_DOUBLING, _NEXT_DOUBLING = 1.0, 4.0  # seconds, for short pauses; longer ones are risked less often:
_DOUBLING_PER_PAUSE, _RECOVERY_PER_PAUSE = 0.4, 8.0
_RECOVERY_SECONDS = 4.0
_RECOVERY_REQUESTS = 40
_SLOWEST = 0.05  # requests a second


@dataclass(frozen=True, slots=True)
class _Search:
    """A rate that doubles every so many seconds, until it is refused."""

    rate: float
    since: float
    doubling: float

    def at(self, now: float) -> float:
        return self.rate * math.exp2(min(max(0.0, now - self.since) / self.doubling, 30.0))


class Pace:
    """Start times of the requests to one endpoint, in seconds of ``clock`` (monotonic)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.paused_until = -math.inf
        self._slot = -math.inf  # start of the next request at the present rate
        self._peak, self._peak_at, self._recovery = math.inf, 0.0, _RECOVERY_SECONDS
        self._search: _Search | None = None
        self._searches = 0
        self._starts: deque[float] = deque(maxlen=4096)
        self._open_window(clock())
        self._open_spell(clock())

    @property
    def rate(self) -> float:
        """Requests a second that may start now; infinite while nothing was refused."""
        now = self._clock()
        if self._search is not None:
            return self._search.at(now)
        if math.isinf(self._peak):
            return math.inf
        since = (now - self._peak_at) / self._recovery
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
        self._judge_window()
        self._sent += 1
        self._spell_sent += 1
        self._starts.append(self._clock())

    def refused(self, retry_after: float | None) -> None:
        """A request was refused for being too many; ``retry_after`` is the wait asked for, in seconds."""
        self._refused += 1
        self._spell_refused += 1
        if retry_after is None:
            self._judge_window()
            return
        now = self._clock()
        if now >= self.paused_until:
            self._judge_spell(now, retry_after)
        until = now + retry_after
        if until > self.paused_until:
            self.paused_until = until
            self._slot = max(self._slot, until)
            self._resume_at(until)

    def forget(self) -> None:
        """Count from now on: what an endpoint does that answers nobody says nothing about the rate."""
        self._open_window(self._clock())
        self._open_spell(self._clock())

    def _resume_at(self, until: float) -> None:
        """What happens during a pause says nothing about the rate: everything is counted from its end."""
        self._peak_at = until
        if self._search is not None:
            self._search = _Search(self._search.rate, until, self._search.doubling)
        self._open_window(until)
        self._open_spell(until)

    def _open_window(self, since: float) -> None:
        self._since, self._sent, self._refused = since, 0, 0

    def _open_spell(self, since: float) -> None:
        self._spell_since, self._spell_sent, self._spell_refused = since, 0, 0

    def _judge_spell(self, now: float, pause: float) -> None:
        """A time without pauses is over: go on below the rate that ended it."""
        active = max(0.01, now - self._spell_since)
        accepted = self._spell_sent - self._spell_refused
        is_known = self._search is not None or math.isfinite(self._peak)
        if accepted <= 0 and is_known:
            return  # the pause asked for was too short, which says nothing about the rate
        accepted = max(1, accepted)
        recent = self._recent(now, min(active, _RECENT_SECONDS))
        slower = max(1.0, pause * _DOUBLING_PER_PAUSE)
        searched, self._search = self._search, None
        if not is_known:  # between what this time gave, and what it and the pause give together
            rate = math.sqrt(accepted / active * accepted / (active + pause))
            self._search = _Search(rate, now, _FIRST_DOUBLING * slower)
        elif active < _STEADY_SECONDS or (searched is not None and self._searches == 0):
            self._searches += 1
            self._search = _Search(max(_SLOWEST, _BELOW_RECENT * recent), now, _NEXT_DOUBLING * slower)
        else:
            below = _BACK_OFF * recent if searched else _BELOW_LASTING * min(accepted / active, recent)
            self._settle(below, now, _RECOVERY_PER_PAUSE * pause)

    def _recent(self, now: float, seconds: float) -> float:
        """Accepted requests a second of late."""
        started = 0
        for start in reversed(self._starts):
            if start <= now - seconds:
                break
            started += 1
        return max(1, started - self._spell_refused) / seconds

    def _judge_window(self) -> None:
        """At the end of a window: slow down when too much of it was refused."""
        now = self._clock()
        elapsed = now - self._since
        if elapsed < _WINDOW_SECONDS or self._sent < _WINDOW_REQUESTS:
            return
        accepted = self._sent - self._refused
        if accepted > 0 and self._refused > self._sent * _REFUSED_SHARE:  # with none accepted it is no matter of rate
            rate, self._search = self.rate, None
            self._settle(
                max(min(accepted / elapsed, rate), _MOST_AT_ONCE * rate if math.isfinite(rate) else 0.0), now, 0.0
            )
        self._open_window(now)

    def _settle(self, peak: float, now: float, recovery: float) -> None:
        """Stay near ``peak``, and beyond it after ``recovery`` seconds or more."""
        self._peak, self._peak_at = max(_SLOWEST, peak), now
        self._recovery = max(_RECOVERY_SECONDS, recovery, _RECOVERY_REQUESTS / self._peak)
