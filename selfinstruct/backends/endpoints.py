"""Several endpoints with one face: requests go where the fewest are in flight, and around an endpoint that fails.

Each endpoint has a pace (``pace.py``) and rests when nothing but faults comes from it: then one request at a time
tries it, and the rest go elsewhere or wait. An outage so costs a request every few seconds, not all of them. One that
will not serve us (wrong key, no credit, unknown model) is closed for this command while others are left.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from selfinstruct.backends.base import Backend
from selfinstruct.backends.pace import Pace
from selfinstruct.errors import PromptRefused, RateLimited, SelfInstructError, Stopped, TeacherFault, TransientFault
from selfinstruct.records import Completion, Prompt

_FAULTS_TO_REST = 5  # in a row; single faults are a matter of the request that met them
_REFUSALS_TO_CLOSE = 16  # of prompts in a row, where another endpoint answers
_FIRST_REST, _LONGEST_REST = 0.5, 5.0  # seconds, doubling; short enough to notice soon that an outage is over


class _Endpoint:
    """One backend with what we know about it."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.pace = Pace()
        self.in_flight = 0
        self.faults = 0  # in a row
        self.rests_until = 0.0
        self.probing = False
        self.closed = self.served = False
        self.refusals = 0  # of prompts, in a row

    @property
    def resting(self) -> bool:
        return self.faults >= _FAULTS_TO_REST

    def opens_at(self) -> float:
        """Monotonic time when a request may start; infinite when closed, or while a request tries it as it rests."""
        if self.closed or (self.resting and self.probing):
            return float("inf")
        return max(self.pace.opens_at(), self.rests_until if self.resting else 0.0)

    def failed(self, *, probe: bool) -> None:
        if self.resting and not probe:
            return  # sent before the rest began: nothing new
        self.faults += 1
        if self.resting:
            self.pace.forget()
            rest = min(_LONGEST_REST, _FIRST_REST * 2.0 ** min(self.faults - _FAULTS_TO_REST, 10))
            self.rests_until = max(self.rests_until, time.monotonic() + rest * random.uniform(0.75, 1.0))


class Endpoints:
    """Spreads prompts over backends. A wait that one endpoint asks for holds all requests to it, not just one.

    ``on_closed`` is told, in words, when one of several will not serve us.
    """

    def __init__(self, backends: Sequence[Backend], *, on_closed: Callable[[str], None] = lambda said: None) -> None:
        self._on_closed = on_closed
        self._endpoints = [_Endpoint(backend) for backend in backends]
        self._news = asyncio.Event()  # replaced whenever it is set: a broadcast to all that wait
        self._halted = False
        self._failed_at: dict[int, set[_Endpoint]] = {}  # where each request met a fault
        self.name = backends[0].name
        self.max_in_flight = sum(backend.max_in_flight for backend in backends)

    async def complete(self, prompt: Prompt) -> Completion:
        """Ask one endpoint once. Raises what it raises, and Stopped when halted before the request was sent."""
        failed_at = self._failed_at.setdefault(prompt.request_no, set())
        endpoint = await self._turn(failed_at)
        probe = endpoint.resting
        endpoint.probing = endpoint.probing or probe
        endpoint.in_flight += 1
        endpoint.pace.sent()
        try:
            completion = await endpoint.backend.complete(prompt)
        except TransientFault as error:
            self._note(endpoint, error, probe=probe)
            failed_at.add(endpoint)
            raise
        except SelfInstructError as error:
            endpoint.faults = 0  # a refusal is a sign of life
            endpoint.refusals += isinstance(error, PromptRefused)
            useless = endpoint.refusals >= _REFUSALS_TO_CLOSE and any(other.served for other in self._endpoints)
            if (isinstance(error, TeacherFault) or useless) and self._close(endpoint, error):
                raise TransientFault(f"{error.message}; the other endpoints go on") from error
            raise
        finally:
            endpoint.in_flight -= 1
            if probe:
                endpoint.probing = False
                self._announce()
        self._failed_at.pop(prompt.request_no, None)
        endpoint.served, endpoint.refusals = True, 0
        if endpoint.resting:
            endpoint.pace.forget()
        if endpoint.faults:
            endpoint.faults = 0
            self._announce()
        return completion

    def opens_in(self) -> float:
        """Seconds until some endpoint may be asked; infinite while the only one is being tried."""
        return max(0.0, min(endpoint.opens_at() for endpoint in self._endpoints) - time.monotonic())

    def halt(self) -> None:
        """Send nothing more: what waits ends with Stopped, what is on its way may arrive."""
        self._halted = True
        self._announce()

    async def aclose(self) -> None:
        for endpoint in self._endpoints:
            await endpoint.backend.aclose()

    def _note(self, endpoint: _Endpoint, error: TransientFault, *, probe: bool) -> None:
        if isinstance(error, RateLimited):
            endpoint.pace.refused(error.retry_after)
        if isinstance(error, RateLimited) and error.retry_after is not None:
            endpoint.faults = 0
        else:
            endpoint.failed(probe=probe)

    def _close(self, endpoint: _Endpoint, error: SelfInstructError) -> bool:
        """Ask this endpoint no more; False when it is the last one."""
        if all(other.closed for other in self._endpoints if other is not endpoint):
            return False
        if not endpoint.closed:
            endpoint.closed = True
            self._on_closed(f"{error.message}; the other endpoints go on. {error.hint}".strip())
            self._announce()
        return True

    def _announce(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def _turn(self, failed_at: set[_Endpoint]) -> _Endpoint:
        """Wait for a free endpoint and for a start time there; one where this request failed is the second choice."""
        while True:
            if self._halted:
                raise Stopped("no more requests are sent")
            now = time.monotonic()
            if len(failed_at) == len(self._endpoints):
                failed_at.clear()
            endpoint = min(
                self._endpoints,
                key=lambda one: (max(now, one.opens_at()), one in failed_at, one.in_flight),
            )
            start = endpoint.opens_at() if endpoint.resting else endpoint.pace.reserve()
            if start <= time.monotonic():
                return endpoint
            in_time = await self._wait(start - now)
            if in_time and not endpoint.resting and endpoint.pace.paused_until <= time.monotonic():
                return endpoint

    async def _wait(self, seconds: float) -> bool:
        """Wait so long, or until there is news; True when the time is over."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), None if seconds == float("inf") else seconds)
            return False
        return True
