"""The one place that retries: with growing, jittered waits, within a budget of time for each request."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_exponential_jitter

from selfinstruct.backends.base import Backend
from selfinstruct.errors import PromptRefused, RateLimited, SelfInstructError, UnusableAnswer
from selfinstruct.records import Completion, Prompt

_WAIT = wait_exponential_jitter(multiplier=0.5, max=30, jitter=0.5)
_MIN_ATTEMPTS = 4
_MOST_UNUSABLE = 6  # a prompt that always gives an empty answer must not hold up the run


class RetryingBackend:
    """Asks again after a transient fault, for up to ``patience`` seconds a request (at least four attempts).

    ``on_retry`` is told of every failed attempt, for the progress display. When the budget is spent the last fault is
    raised as it is: the run stops and can be resumed, nothing is given up in silence. A prompt that gets nothing but
    empty answers is refused instead: skipped and counted.
    """

    def __init__(self, backend: Backend, *, patience: float, on_retry: Callable[[SelfInstructError], None]) -> None:
        self._backend = backend
        self._patience = patience
        self._on_retry = on_retry
        self.name = backend.name
        self.max_in_flight = backend.max_in_flight

    async def complete(self, prompt: Prompt) -> Completion:
        retrying = AsyncRetrying(
            retry=retry_if_exception(lambda error: isinstance(error, SelfInstructError) and error.retryable),
            wait=_wait,
            stop=self._spent,
            before_sleep=self._tell,
            reraise=True,
        )
        try:
            async for attempt in retrying:
                with attempt:
                    completion = await self._backend.complete(prompt)
        except UnusableAnswer as error:
            raise PromptRefused(error.message, reason=f"no usable answer in {_MOST_UNUSABLE} attempts") from error
        attempts = retrying.statistics.get("attempt_number", 1)
        return completion if attempts == 1 else dataclasses.replace(completion, attempts=attempts)

    async def aclose(self) -> None:
        await self._backend.aclose()

    def _spent(self, state: RetryCallState) -> bool:
        if state.outcome and isinstance(state.outcome.exception(), UnusableAnswer):
            return state.attempt_number >= _MOST_UNUSABLE
        elapsed = state.seconds_since_start or 0.0
        return state.attempt_number >= _MIN_ATTEMPTS and elapsed + state.upcoming_sleep > self._patience

    def _tell(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, SelfInstructError):
            self._on_retry(error)


def _wait(state: RetryCallState) -> float:
    """The server's own wait is kept by the endpoint for all requests; here it is only waited for, never undercut."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, RateLimited) else None
    return max(asked or 0.0, _WAIT(state))
