"""The pace of requests to one endpoint, against simulated rate limiters in virtual time."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from selfinstruct.backends.pace import Pace


class Bucket:
    """A limiter: ``rate`` tokens a second, at most ``burst`` of them saved up."""

    def __init__(self, rate: float, burst: float) -> None:
        self.rate, self.burst, self.tokens, self.at = rate, burst, burst, 0.0

    def accepts(self, now: float) -> bool:
        self.tokens = min(self.burst, self.tokens + (now - self.at) * self.rate)
        self.at = now
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True


class Window:
    """A limiter that accepts so many requests in each whole second."""

    def __init__(self, rate: int) -> None:
        self.rate, self.second, self.count = rate, -1, 0

    def accepts(self, now: float) -> bool:
        if int(now) != self.second:
            self.second, self.count = int(now), 0
        self.count += 1
        return self.count <= self.rate


class Chance:
    """Refuses at random, whatever the rate."""

    def __init__(self, share: float) -> None:
        self.share, self.rng = share, random.Random(3)

    def accepts(self, now: float) -> bool:
        return self.rng.random() >= self.share


def simulate(
    accepts: Callable[[float], bool],
    *,
    workers: int,
    latency: float,
    retry_after: float | None,
    seconds: float,
    warm_up: float = 5.0,
    jitter: float = 0.0,
) -> tuple[float, float, int]:
    """Accepted requests a second and share of refused ones after ``warm_up``, and violations of Retry-After."""
    now, forbidden_until, violations, accepted, refused = 0.0, 0.0, 0, 0, 0
    rng, pace = random.Random(1), Pace(lambda: now)
    events = [(0.0, worker, "ask", 0) for worker in range(workers)]
    while events:
        now, worker, what, attempt = heapq.heappop(events)
        if now > seconds:
            break
        if what == "ask":
            start = pace.reserve()
            heapq.heappush(events, (start + jitter * rng.random(), worker, "send", attempt))
        elif what == "send":
            if pace.paused_until > now:
                heapq.heappush(events, (now, worker, "ask", attempt))
                continue
            pace.sent()
            violations += now < forbidden_until
            if accepts(now):
                accepted += now > warm_up
                heapq.heappush(events, (now + latency * rng.uniform(0.5, 1.5), worker, "ask", 0))
            else:
                refused += now > warm_up
                heapq.heappush(events, (now + 0.002, worker, "refused", attempt))
        elif what == "refused":
            pace.refused(retry_after)
            if retry_after is not None:
                forbidden_until = max(forbidden_until, now + retry_after)
            wait = min(8.0, 0.15 * 2**attempt) * rng.uniform(1.0, 1.5)
            heapq.heappush(events, (now + wait, worker, "ask", attempt + 1))
    span = seconds - warm_up
    return accepted / span, refused / max(accepted + refused, 1), violations


LATENCY, WORKERS = 0.04, 16
LIMIT = 200  # half of what the workers could do


@pytest.mark.parametrize("retry_after", [None, 0.05, 1.0])
@pytest.mark.parametrize(
    "limiter",
    [lambda: Bucket(LIMIT, 40), lambda: Bucket(LIMIT, LIMIT), lambda: Window(LIMIT)],
    ids=["a small bucket", "a bucket of a second", "whole seconds"],
)
def test_half_the_rate_is_used_well_and_seldom_overrun(limiter: Callable[[], Any], retry_after: float | None) -> None:
    goodput, refused, _ = simulate(
        limiter().accepts, workers=WORKERS, latency=LATENCY, retry_after=retry_after, seconds=35
    )
    assert goodput >= 0.8 * LIMIT
    assert refused <= 0.2


@pytest.mark.parametrize("retry_after", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("burst", [2, 3, 10])
def test_a_limiter_that_saves_up_next_to_nothing_is_found_out_soon(burst: int, retry_after: float) -> None:
    limiter = Bucket(20.0, burst)
    goodput, refused, _ = simulate(
        limiter.accepts, workers=4, latency=0.1, retry_after=retry_after, seconds=40, jitter=0.003
    )
    assert goodput >= 0.8 * 20.0
    assert refused <= 0.02


@pytest.mark.parametrize("retry_after", [5.0, 10.0])
@pytest.mark.parametrize("burst", [3, LIMIT])
def test_a_long_pause_is_seldom_asked_for_twice(burst: int, retry_after: float) -> None:
    """Finding the rate costs a few pauses; after that the run works at it for minutes."""
    goodput, refused, _ = simulate(
        Bucket(LIMIT, burst).accepts, workers=WORKERS, latency=LATENCY, retry_after=retry_after, seconds=240,
        warm_up=6 * retry_after, jitter=0.002,
    )  # fmt: skip
    assert goodput >= 0.75 * LIMIT
    assert refused <= 0.01


def test_no_request_starts_during_a_pause() -> None:
    for limiter in (Bucket(LIMIT, 40), Window(LIMIT), Chance(0.1)):
        *_, violations = simulate(limiter.accepts, workers=WORKERS, latency=LATENCY, retry_after=1.0, seconds=20)
        assert violations == 0


def test_refusals_at_random_do_not_starve_the_run() -> None:
    goodput, refused, _ = simulate(Chance(0.14).accepts, workers=WORKERS, latency=LATENCY, retry_after=None, seconds=25)
    assert 0.1 < refused < 0.2
    assert goodput > LIMIT / 4


def test_pauses_at_random_do_not_slow_down_what_is_between_them() -> None:
    goodput, refused, _ = simulate(Chance(0.02).accepts, workers=4, latency=0.1, retry_after=0.5, seconds=60)
    assert refused > 0.01
    assert goodput > 10


def test_without_refusals_nothing_is_held_back() -> None:
    pace = Pace(lambda: 7.0)
    assert [pace.reserve() for _ in range(1000)] == [7.0] * 1000
    assert math.isinf(pace.rate)
