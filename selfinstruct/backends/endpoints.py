"""Several endpoints with one face: requests go where the fewest are in flight, and around an endpoint that fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from selfinstruct.backends.base import Backend
from selfinstruct.errors import RateLimited, TransientFault
from selfinstruct.records import Completion, Prompt

_FIRST_REST, _LONGEST_REST = 1.0, 30.0  # seconds that a failing endpoint is left alone, doubling


class _Endpoint:
    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.in_flight = 0
        self.free_at = 0.0  # monotonic time before which nothing is sent
        self.failures = 0

    def succeeded(self) -> None:
        self.failures = 0

    def rest(self, seconds: float) -> None:
        self.free_at = max(self.free_at, time.monotonic() + seconds)


class Endpoints:
    """Spreads prompts over backends. A wait that one endpoint asks for holds all requests to it, not just one."""

    def __init__(self, backends: Sequence[Backend]) -> None:
        self._endpoints = [_Endpoint(backend) for backend in backends]
        self.name = backends[0].name
        self.max_in_flight = sum(backend.max_in_flight for backend in backends)

    async def complete(self, prompt: Prompt) -> Completion:
        endpoint = await self._free_endpoint()
        endpoint.in_flight += 1
        try:
            completion = await endpoint.backend.complete(prompt)
        except RateLimited as error:
            if error.retry_after is not None:
                endpoint.rest(error.retry_after)
            elif len(self._endpoints) > 1:
                endpoint.rest(_FIRST_REST)
            raise
        except TransientFault:
            endpoint.failures += 1
            if len(self._endpoints) > 1:
                endpoint.rest(min(_LONGEST_REST, _FIRST_REST * 2 ** min(endpoint.failures - 1, 10)))
            raise
        finally:
            endpoint.in_flight -= 1
        endpoint.succeeded()
        return completion

    async def aclose(self) -> None:
        for endpoint in self._endpoints:
            await endpoint.backend.aclose()

    async def _free_endpoint(self) -> _Endpoint:
        while True:
            now = time.monotonic()
            free = [endpoint for endpoint in self._endpoints if endpoint.free_at <= now]
            if free:
                return min(free, key=lambda endpoint: endpoint.in_flight)
            await asyncio.sleep(min(endpoint.free_at for endpoint in self._endpoints) - now + 0.001)
