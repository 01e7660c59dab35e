"""The engine in a thread of its own, for requests that come from an event loop at any time."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace

from selfinstruct.errors import SelfInstructError, ServerError
from selfinstruct.student.infer.engine import Engine
from selfinstruct.student.infer.requests import News, Request


@dataclass(frozen=True, slots=True)
class _Caller:
    """Who waits for a request: its loop and its mailbox."""

    loop: asyncio.AbstractEventLoop
    mailbox: asyncio.Queue[News | SelfInstructError]

    def tell(self, what: News | SelfInstructError) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.mailbox.put_nowait, what)


class LiveEngine:
    """Requests run together as they come. ``failure`` is set when the engine broke down; it does not come back."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: queue.Queue[tuple[Request, _Caller] | int | None] = queue.Queue()
        self._callers: dict[int, _Caller] = {}
        self._numbers = itertools.count()
        self.failure: SelfInstructError | None = None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def load(self) -> tuple[int, int]:
        """(running, waiting)."""
        return self._engine.load

    def check(self, prompt: Sequence[int]) -> None:
        """UsageError for a prompt with ids that the model does not have."""
        self._engine.check(prompt)

    async def stream(self, request: Request) -> AsyncGenerator[News, None]:
        """The news of a request, up to its end. Leaving early cancels it. Raises what went wrong."""
        if self.failure is not None:
            raise self.failure
        number = next(self._numbers)
        caller = _Caller(asyncio.get_running_loop(), asyncio.Queue())
        self._inbox.put((replace(request, request_id=number), caller))
        ended = False
        try:
            while not ended:
                what = await caller.mailbox.get()
                if isinstance(what, SelfInstructError):
                    ended = True
                    raise what
                ended = what.ended is not None
                yield what
        finally:
            if not ended:
                self._inbox.put(number)

    def close(self) -> None:
        """Stop after the current step and give the memory back."""
        self._inbox.put(None)
        self._thread.join(timeout=60)

    def _work(self) -> None:
        try:
            while self._take():
                for news in self._engine.step():
                    caller = self._callers.get(news.request_id)
                    if caller is not None:
                        caller.tell(news)
                        if news.ended:
                            del self._callers[news.request_id]
        except Exception as error:  # noqa: BLE001 (the thread's border: no one else hears of it, and clients would wait)
            self.failure = ServerError(
                f"the engine broke down: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
                hint="start it again, with a smaller --batch or --context if memory was short",
            )
            for caller in self._callers.values():
                caller.tell(self.failure)
            self._refuse_rest()
        finally:
            self._engine.close()

    def _take(self) -> bool:
        """Take what came in; waits while there is nothing to do. False at the end."""
        while True:
            try:
                what = self._inbox.get(block=not self._engine.busy)
            except queue.Empty:
                return True
            if what is None:
                return False
            if isinstance(what, int):
                self._engine.cancel(what)
                self._callers.pop(what, None)
                continue
            request, caller = what
            try:
                self._engine.submit(request)
            except SelfInstructError as error:
                caller.tell(error)
            else:
                self._callers[request.request_id] = caller

    def _refuse_rest(self) -> None:
        while self.failure is not None:
            what = self._inbox.get()
            if what is None:
                return
            if not isinstance(what, int):
                what[1].tell(self.failure)
