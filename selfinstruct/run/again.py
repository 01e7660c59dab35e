"""Before a run goes on: what earlier commands gave up is asked once more.

Nothing else happens meanwhile, and nothing is forgotten until there is an answer: a prompt that still meets nothing but
faults leaves the run as it was.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Sequence

from selfinstruct.backends.base import Backend
from selfinstruct.errors import GivenUp, PromptRefused, SelfInstructError, Stopped, TeacherFault, TransientFault
from selfinstruct.records import Completion, Prompt
from selfinstruct.run.journal import Journal
from selfinstruct.run.progress import Observer, Snapshot

_TICK_SECONDS = 0.5
_GRACE_SECONDS = 8.0  # for what is on its way when a signal comes


class Again:
    """One command's attempt at the requests that were given up; ``shown`` is the state of the run meanwhile."""

    def __init__(
        self, *, backend: Backend, journal: Journal, concurrency: int, observer: Observer, shown: Snapshot
    ) -> None:
        self._backend, self._journal, self._observer, self._shown = backend, journal, observer, shown
        self._slots = asyncio.Semaphore(concurrency)
        self._fault: SelfInstructError | None = None
        self._trouble = ""
        self._signals = 0

    def interrupt(self) -> None:
        """Send nothing more, and wait no longer for what is on its way at the second call. For signal handlers."""
        self._signals += 1
        self._backend.halt()

    def complain(self, trouble: str) -> None:
        """Show what is being waited for."""
        self._trouble = trouble

    async def run(self, prompts: Sequence[Prompt]) -> SelfInstructError | None:
        """Ask these prompts again; what ended it, if that will not let the run go on either."""
        many = "1 request that was" if len(prompts) == 1 else f"{len(prompts)} requests that were"
        self._observer.say(f"{many} given up: asked again")
        tasks = {asyncio.create_task(self._ask(dataclasses.replace(p, was_given_up=True))) for p in prompts}
        waiting, signalled_at = tasks, 0.0
        while waiting:
            _, waiting = await asyncio.wait(waiting, timeout=_TICK_SECONDS)
            shown = dataclasses.replace(self._shown, in_flight=len(waiting), trouble=self._trouble)
            self._observer.show(shown)
            signalled_at = signalled_at or (time.monotonic() if self._signals else 0.0)
            if self._signals > 1 or (signalled_at and time.monotonic() - signalled_at > _GRACE_SECONDS):
                for task in waiting:
                    task.cancel()
        for task in tasks:
            if not task.cancelled():
                task.result()
        return None if self._signals else self._fault

    async def _ask(self, prompt: Prompt) -> None:
        try:
            async with self._slots:
                completion = await self._backend.complete(prompt)
        except PromptRefused as error:
            completion = Completion(prompt.request_no, error.reason, "refused", model=self._backend.name)
        except (GivenUp, TransientFault) as error:
            self._observer.say(error.message)
            return
        except (TeacherFault, Stopped) as error:
            self._fault = self._fault or error
            return
        await self._journal.record_late_answer(prompt, completion)
