"""Retries and several endpoints: nothing is lost, nothing is given up in silence, waits hold everybody."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from selfinstruct.backends.endpoints import Endpoints
from selfinstruct.backends.retry import RetryingBackend
from selfinstruct.errors import (
    AuthenticationFailed,
    GivenUp,
    RateLimited,
    SelfInstructError,
    Stopped,
    TransientFault,
    UnusableAnswer,
)
from selfinstruct.records import Completion, Prompt
from selfinstruct.run.limits import requests_needed

Deed = Callable[[int], "SelfInstructError | float"]


class Place:
    """A backend: its n-th request raises what ``deed(n)`` returns, or is answered after so many seconds."""

    name, max_in_flight = "place", 8

    def __init__(self, deed: Deed = lambda n: 0.0) -> None:
        self.deed = deed
        self.started: list[float] = []

    async def complete(self, prompt: Prompt) -> Completion:
        number = len(self.started)
        self.started.append(time.monotonic())
        what = self.deed(number)
        if isinstance(what, SelfInstructError):
            await asyncio.sleep(0)
            raise what
        await asyncio.sleep(what)
        return Completion(prompt.request_no, "fine", "stop")

    def halt(self) -> None: ...

    async def aclose(self) -> None: ...


def ask(places: list[Place], prompts: int, *, workers: int = 8, patience: float = 60.0, said: Any = None) -> list[Any]:
    """Completions or errors of so many prompts, asked by so many workers."""

    async def main() -> list[Any]:
        backend = RetryingBackend(
            Endpoints(places), patience=patience, on_trouble=said.append if said is not None else lambda text: None
        )
        numbers, found = iter(range(prompts)), [None] * prompts

        async def worker() -> None:
            for n in numbers:
                try:
                    found[n] = await backend.complete(Prompt(n, "alpaca", text="x"))  # type: ignore[call-overload]
                except SelfInstructError as error:
                    found[n] = error  # type: ignore[call-overload]

        await asyncio.gather(*(worker() for _ in range(workers)))
        return found

    return asyncio.run(main())


def answered(found: list[Any]) -> int:
    return sum(isinstance(one, Completion) for one in found)


def test_a_pause_asked_for_holds_every_worker_and_is_told() -> None:
    said: list[str] = []
    place = Place(lambda n: RateLimited("slow down", retry_after=1.1) if n == 5 else 0.01)
    assert answered(ask([place], 60, said=said)) == 60
    gaps = [b - a for a, b in zip(place.started, place.started[1:], strict=False)]
    assert max(gaps) >= 1.05
    assert any("paused until" in text for text in said)


def test_a_refusal_without_a_usable_wait_is_not_repeated_at_once() -> None:
    place = Place(lambda n: RateLimited("slow down") if n < 2 else 0.0)
    assert answered(ask([place], 1)) == 1
    assert place.started[1] - place.started[0] >= 0.15
    assert place.started[2] - place.started[1] >= 0.3


def test_a_pause_longer_than_the_patience_stops_at_once_and_says_until_when() -> None:
    place = Place(lambda n: RateLimited("daily limit", retry_after=3600))
    started = time.monotonic()
    (error,) = ask([place], 1)
    assert isinstance(error, Stopped)
    assert "3600 s" in error.message
    assert error.hint.startswith("resume after")
    assert time.monotonic() - started < 1
    assert len(place.started) == 1


def test_a_pause_of_one_endpoint_moves_everything_to_the_other() -> None:
    paused, free = Place(lambda n: RateLimited("daily limit", retry_after=3600)), Place(lambda n: 0.002)
    assert answered(ask([paused, free], 80)) == 80
    assert len(paused.started) <= 4


@pytest.mark.parametrize("deed", [lambda n: TransientFault("gone"), lambda n: UnusableAnswer("HTML")])
def test_a_dead_endpoint_loses_nothing(deed: Deed) -> None:
    dead, alive = Place(deed), Place(lambda n: 0.02)
    assert answered(ask([dead, alive], 120)) == 120
    assert len(dead.started) < 30


def test_a_hanging_endpoint_holds_only_what_it_has() -> None:
    hangs, alive = Place(lambda n: 1.5), Place(lambda n: 0.005)
    assert answered(ask([hangs, alive], 200)) == 200
    assert len(hangs.started) <= 8


@pytest.mark.slow
def test_an_outage_costs_a_probe_now_and_then_and_ends_for_all() -> None:
    start = time.monotonic()
    place = Place(lambda n: 0.005 if time.monotonic() - start > 2.5 else TransientFault("503"))
    assert answered(ask([place], 40)) == 40
    outage = [at for at in place.started if at - start <= 2.5]
    assert len(outage) <= 8 + 8
    assert time.monotonic() - start < 6


@pytest.mark.slow
@pytest.mark.parametrize("workers", [4, 64])
def test_when_everything_was_refused_for_a_while_the_run_is_soon_at_its_pace_again(workers: int) -> None:
    start = time.monotonic()

    def deed(n: int) -> SelfInstructError | float:
        return RateLimited("busy") if 1 < time.monotonic() - start < 5 else 0.02

    place = Place(deed)
    found = ask([place], 60 * workers + 200, workers=workers)
    assert answered(found) == len(found)
    refused = [at for at in place.started if 1 < at - start < 5]
    assert len(refused) <= 10 * workers
    assert time.monotonic() - start < 20


@pytest.mark.slow
def test_patience_ends_with_the_fault_and_not_with_a_lost_prompt() -> None:
    place = Place(lambda n: TransientFault("503"))
    started = time.monotonic()
    found = ask([place], 2, patience=1.0)
    assert all(isinstance(one, TransientFault | Stopped) for one in found)
    assert 0.5 < time.monotonic() - started < 20


def test_authentication_failure_stops_everything_that_waits() -> None:
    def deed(n: int) -> SelfInstructError | float:
        return AuthenticationFailed("401") if n >= 20 else RateLimited("busy") if n % 3 == 1 else 0.002

    place = Place(deed)
    found = ask([place], 200)
    assert any(isinstance(one, AuthenticationFailed) for one in found)
    assert len(place.started) <= 20 + 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "reason"),
    [(UnusableAnswer("empty"), "no usable answer"), (TransientFault("answered 500"), "no answer")],
    ids=["empty", "500"],
)
def test_a_prompt_that_meets_nothing_but_faults_is_given_up_while_others_are_answered(
    fault: SelfInstructError, reason: str
) -> None:
    class Picky(Place):
        async def complete(self, prompt: Prompt) -> Completion:
            if prompt.request_no == 3:
                self.started.append(time.monotonic())
                raise fault
            await asyncio.sleep(0.3)
            return Completion(prompt.request_no, "fine", "stop")

    place = Picky()
    found = ask([place], 420, workers=4)
    assert answered(found) == 419
    assert isinstance(found[3], GivenUp)
    assert found[3].reason == reason
    assert fault.message in found[3].message
    assert len(place.started) == 8


@pytest.mark.slow
def test_a_fault_in_every_second_attempt_gives_nothing_up() -> None:
    rng = random.Random(3)
    place = Place(lambda n: UnusableAnswer("empty") if rng.random() < 0.4 else 0.001)
    assert answered(ask([place], 60, workers=16)) == 60


def test_an_endpoint_that_refuses_the_key_is_closed_while_another_serves() -> None:
    said: list[str] = []
    closed, open_ = (
        Place(lambda n: AuthenticationFailed("one answered 401", hint="check the key")),
        Place(lambda n: 0.01),
    )

    async def main() -> list[Any]:
        backend = RetryingBackend(
            Endpoints([closed, open_], on_closed=said.append), patience=60, on_trouble=lambda text: None
        )
        asked = [backend.complete(Prompt(n, "alpaca", text="x")) for n in range(20)]
        return await asyncio.gather(*asked)

    assert answered(asyncio.run(main())) == 20
    assert said == ["one answered 401; the other endpoints go on. check the key"]


def test_when_the_last_endpoint_refuses_the_key_everything_stops() -> None:
    places = [Place(lambda n: AuthenticationFailed("401")) for _ in range(2)]
    found = ask(places, 40, workers=4)
    assert any(isinstance(one, AuthenticationFailed) for one in found)
    assert sum(len(place.started) for place in places) <= 8


@pytest.mark.slow
def test_a_teacher_that_never_says_anything_usable_is_reported_soon() -> None:
    found = ask([Place(lambda n: UnusableAnswer("empty answer"))], 8)
    assert any(isinstance(one, Stopped) and "none is usable" in one.message for one in found)


def test_after_halt_nothing_is_sent_and_what_is_on_its_way_arrives() -> None:
    place = Place(lambda n: 0.3 if n == 0 else TransientFault("503"))

    async def main() -> list[Any]:
        backend = RetryingBackend(Endpoints([place]), patience=60, on_trouble=lambda text: None)
        tasks = [asyncio.create_task(backend.complete(Prompt(n, "alpaca", text="x"))) for n in range(4)]
        await asyncio.sleep(0.1)
        backend.halt()
        tasks.append(asyncio.create_task(backend.complete(Prompt(9, "alpaca", text="x"))))
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, *others = asyncio.run(main())
    assert isinstance(first, Completion)
    assert all(isinstance(one, Stopped) for one in others)
    assert len(place.started) == 4


@pytest.mark.parametrize(
    ("kept_after", "rows", "least", "most"),
    [
        ([0], 100, 5, 5),  # nothing known: as many as the prompt asks for
        (list(range(101)), 30, 30, 30),  # one row a request, always: none too many
        ([0] * 101, 5, 500, 501),  # nothing kept: the floor
        ([n // 2 for n in range(101)], 30, 60, 75),  # every second one gives a row: a deviation to spare
    ],
)
def test_as_many_requests_are_sent_ahead_as_the_yield_asks_for(
    kept_after: list[int], rows: int, least: int, most: int
) -> None:
    assert least <= requests_needed(rows, kept_after, 20) <= most
