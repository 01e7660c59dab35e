"""The one place that retries: with growing, jittered waits, within a budget of time for each request.

What becomes of a fault:

=====================  ==========================================================================================
TransientFault         asked again. Given up, counted and left for the next resume when that many faults in a row are
                       no chance any more while others are answered; when nobody is answered the run stops,
                       resumable, once ``patience`` is used up
RateLimited            all requests to that endpoint wait (``endpoints.py``); the run stops when the wait asked for is
                       longer than ``patience``, or when nothing was answered for so long; else like TransientFault
UnusableAnswer         like TransientFault; when the first answers are all unusable the settings are wrong: stops
PromptRefused          never asked again: skipped and counted
TeacherFault           stops the run; nothing that still waits is sent
=====================  ==========================================================================================
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type

from selfinstruct.backends.endpoints import Endpoints
from selfinstruct.errors import (
    GivenUp,
    RateLimited,
    Stopped,
    TeacherFault,
    TransientFault,
    UnusableAnswer,
)
from selfinstruct.records import Completion, Prompt

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 8.0  # seconds, doubling; the longest is short enough to notice the end of an outage
_FIRST_WAIT_UNUSABLE = 0.25  # the server is well
_FIRST_WAIT_REFUSED = 0.15  # without a wait asked for: the pace does the rest
_MIN_ATTEMPTS = 4  # for slow teachers, whose attempts alone are longer than the patience
_LEAST_TO_GIVE_UP = 8  # attempts; they take about half a minute
_SUSPECT = 3  # attempts are enough for one that was given up by an earlier command
_CHANCE = 1e-6  # of meeting so many faults in a row where others meet so few: then it is the prompt
_NEVER_ANY, _NEVER_ANY_SECONDS = 12, 5.0  # so many unusable answers for so long before the first usable one


@dataclasses.dataclass(slots=True)
class _Asked:
    """One request: what all requests together had met when it was first and last asked."""

    answers: int
    faults: int
    answers_lately: int


class RetryingBackend:
    """Asks again after a transient fault, for up to ``patience`` seconds a request (at least four attempts).

    ``on_trouble`` is told what is being waited for, in words. Nothing is given up in silence: see GivenUp and Stopped.
    """

    def __init__(self, endpoints: Endpoints, *, patience: float, on_trouble: Callable[[str], None]) -> None:
        self._endpoints = endpoints
        self._patience = patience
        self._on_trouble = on_trouble
        self._halted = asyncio.Event()
        self._last_answer = time.monotonic()
        self._answers = self._faults = self._unusable = 0
        self._first_unusable = 0.0
        self.name = endpoints.name
        self.max_in_flight = endpoints.max_in_flight

    async def complete(self, prompt: Prompt) -> Completion:
        """Ask until there is an answer. Raises PromptRefused, GivenUp, a TeacherFault, or what the last attempt met."""
        asked = _Asked(self._answers, self._faults, self._answers)
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(TransientFault),
            wait=_pause,
            stop=partial(self._is_over, prompt, asked),
            sleep=self._sleep,
            reraise=True,
        )
        try:
            async for attempt in retrying:
                with attempt:
                    completion = await self._endpoints.complete(prompt)
        except (TeacherFault, Stopped):
            self.halt()
            raise
        self._last_answer = time.monotonic()
        self._answers += 1
        attempts = retrying.statistics["attempt_number"]
        return completion if attempts == 1 else dataclasses.replace(completion, attempts=attempts)

    def halt(self) -> None:
        """Send nothing more: what waits ends with Stopped, what is on its way may arrive."""
        self._halted.set()
        self._endpoints.halt()

    async def aclose(self) -> None:
        await self._endpoints.aclose()

    def _is_over(self, prompt: Prompt, asked: _Asked, state: RetryCallState) -> bool:
        """After a failed attempt: True when there will be no other, or an error that says more than the fault."""
        error = state.outcome.exception() if state.outcome else None
        if not isinstance(error, TransientFault):
            return True
        now = time.monotonic()
        since = state.start_time
        self._faults += 1
        if isinstance(error, RateLimited):
            since = max(since, self._last_answer)  # others are answered: it will be our turn
            self._respect(error)
        if prompt.was_given_up and state.attempt_number >= _SUSPECT:
            raise GivenUp(f"request {prompt.request_no} is given up again: {error.message}", reason="no answer")
        if not prompt.was_given_up:
            self._judge_first_answers(error, now)
        if self._is_no_chance(asked, state.attempt_number):
            raise _given_up(prompt, error, state.attempt_number)
        enough = state.attempt_number >= _MIN_ATTEMPTS or now - self._last_answer > self._patience
        if enough and now + state.upcoming_sleep - since > self._patience:
            if self._answers > asked.answers_lately:
                raise _given_up(prompt, error, state.attempt_number)
            return True
        asked.answers_lately = self._answers
        self._on_trouble(f"request {prompt.request_no}, attempt {state.attempt_number + 1}: {error.message[:80]}")
        return False

    async def _sleep(self, seconds: float) -> None:
        """Wait before the next attempt; Stopped when there will be none because the run ends."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._halted.wait(), seconds)
            raise Stopped("no more requests are sent")

    def _respect(self, error: RateLimited) -> None:
        """See what the endpoints ask for: a pause within our patience is kept by all, a longer one ends the run."""
        pause = self._endpoints.opens_in()
        if error.retry_after is None or pause < 1:
            return
        style = "%H:%M:%S" if pause < 43_200 else "%Y-%m-%d %H:%M"
        until = time.strftime(style, time.localtime(time.time() + pause))
        if pause > self._patience:
            raise Stopped(
                f"{error.message}; it asks for a pause until {until} ({pause:.0f} s), longer than the patience of "
                f"{self._patience:g} s",
                hint=f"resume after {until}; a run begun with --set patience={pause + 60:.0f} would have waited",
            ) from error
        self._on_trouble(f"paused until {until}, as the teacher asks")

    def _judge_first_answers(self, error: TransientFault, now: float) -> None:
        """Stop when all that the teacher has said so far is of no use: it will not get better by asking."""
        if self._answers or not isinstance(error, UnusableAnswer):
            return
        self._first_unusable = self._first_unusable or now
        self._unusable += 1
        if self._unusable >= _NEVER_ANY and now - self._first_unusable >= _NEVER_ANY_SECONDS:
            raise Stopped(
                f"{self._unusable} answers and none is usable: {error.message}",
                hint=error.hint or "check --base-url, --teacher and --api chat|completions",
            ) from error

    def _is_no_chance(self, asked: _Asked, attempts: int) -> bool:
        """True when so many faults in a row say something about the prompt, by what others met meanwhile."""
        answers = self._answers - asked.answers
        faults = self._faults - asked.faults - attempts
        share = (faults + 1) / (answers + faults + 2)
        return answers > 0 and attempts >= _LEAST_TO_GIVE_UP and share**attempts < _CHANCE


def _given_up(prompt: Prompt, error: TransientFault, attempts: int) -> GivenUp:
    reason = "no usable answer" if isinstance(error, UnusableAnswer) else "no answer"
    return GivenUp(
        f"request {prompt.request_no} is given up for now, after {attempts} attempts while others were answered; the "
        f"last: {error.message}",
        reason=reason,
    )


def _pause(state: RetryCallState) -> float:
    """Seconds before the next attempt: doubling, jittered, by the kind of fault."""
    error = state.outcome.exception() if state.outcome else None
    first = (
        _FIRST_WAIT_UNUSABLE
        if isinstance(error, UnusableAnswer)
        else _FIRST_WAIT_REFUSED
        if isinstance(error, RateLimited)
        else _FIRST_WAIT
    )
    return min(_LONGEST_WAIT, first * 2.0 ** min(state.attempt_number - 1, 20)) * random.uniform(1.0, 1.5)
