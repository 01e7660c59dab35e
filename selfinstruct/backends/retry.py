"""The one place that retries: with growing, jittered waits, within a budget of time for each request.

What becomes of a fault:

=====================  ==========================================================================================
TransientFault         asked again; the run stops, resumable, when ``patience`` is used up
RateLimited            all requests to that endpoint wait (``endpoints.py``); the run stops when the wait asked for is
                       longer than ``patience``, or when nothing was answered for so long
UnusableAnswer         asked again a few times, then skipped and counted; when nobody gets a usable answer it is the
                       teacher and not the prompt: then like TransientFault
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
    PromptRefused,
    RateLimited,
    SelfInstructError,
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
_MOST_UNUSABLE = 6  # attempts for a prompt that never gets a usable answer
_NOBODY = 8  # so many prompts without a usable answer, and none with one in between: it is the teacher
_NEVER_ANY = 20  # so many unusable answers before the first usable one: the settings are wrong


class RetryingBackend:
    """Asks again after a transient fault, for up to ``patience`` seconds a request (at least four attempts).

    ``on_trouble`` is told what is being waited for, in words. Nothing is given up in silence: a request that may
    succeed later stops the run, resumable; one that will not is refused, which the run counts.
    """

    def __init__(self, endpoints: Endpoints, *, patience: float, on_trouble: Callable[[str], None]) -> None:
        self._endpoints = endpoints
        self._patience = patience
        self._on_trouble = on_trouble
        self._halted = asyncio.Event()
        self._last_answer = time.monotonic()
        self._answers = self._unusable = 0
        self._without: set[int] = set()  # requests without a usable answer, since the last usable one
        self.name = endpoints.name
        self.max_in_flight = endpoints.max_in_flight

    async def complete(self, prompt: Prompt) -> Completion:
        """Ask until there is an answer. Raises PromptRefused, a TeacherFault, or what the last attempt met."""
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(TransientFault),
            wait=_pause,
            stop=partial(self._is_over, prompt),
            sleep=self._sleep,
            reraise=True,
        )
        try:
            async for attempt in retrying:
                with attempt:
                    completion = await self._endpoints.complete(prompt)
        except TeacherFault:
            self.halt()
            raise
        self._last_answer = time.monotonic()
        self._answers += 1
        self._without.clear()
        attempts = retrying.statistics["attempt_number"]
        return completion if attempts == 1 else dataclasses.replace(completion, attempts=attempts)

    def halt(self) -> None:
        """Send nothing more: what waits ends with Stopped, what is on its way may arrive."""
        self._halted.set()
        self._endpoints.halt()

    async def aclose(self) -> None:
        await self._endpoints.aclose()

    def _is_over(self, prompt: Prompt, state: RetryCallState) -> bool:
        """After a failed attempt: True when there will be no other, or an error that says more than the fault."""
        error = state.outcome.exception() if state.outcome else None
        if not isinstance(error, TransientFault):
            return True
        now = time.monotonic()
        since = state.start_time
        if isinstance(error, UnusableAnswer):
            self._judge_unusable(prompt, error, state.attempt_number)
        elif isinstance(error, RateLimited):
            since = max(since, self._last_answer)  # others are answered: it will be our turn
            self._respect(error)
        enough = state.attempt_number >= _MIN_ATTEMPTS or now - self._last_answer > self._patience
        if enough and now + state.upcoming_sleep - since > self._patience:
            return True
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

    def _judge_unusable(self, prompt: Prompt, error: SelfInstructError, attempt: int) -> None:
        self._without.add(prompt.request_no)
        self._unusable += 1
        if self._answers == 0 and self._unusable >= _NEVER_ANY and attempt >= _MIN_ATTEMPTS:
            raise Stopped(
                f"{self._unusable} answers and none is usable: {error.message}",
                hint="check --base-url, --teacher and --api chat|completions",
            ) from error
        if attempt >= _MOST_UNUSABLE and len(self._without) < _NOBODY:
            raise PromptRefused(error.message, reason=f"no usable answer in {_MOST_UNUSABLE} attempts") from error


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
