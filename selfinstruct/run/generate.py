"""The loop. Prompts go out many at a time and come back in any order; they are judged in the order of their numbers.

So the rows do not depend on concurrency, latency or the number of endpoints, and resuming is walking the same road
again: a request whose answer the journal holds is not sent. Prompt n may show the pool as it was ``pool_lag``
requests earlier, which is what lets that many requests be on their way.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from selfinstruct.backends.base import Backend
from selfinstruct.errors import EnvironmentFault, GivenUp, PromptRefused, SelfInstructError, Stopped, TransientFault
from selfinstruct.methods.base import Method
from selfinstruct.quality.gate import Gate
from selfinstruct.records import Completion, Loss, Prompt, Reading
from selfinstruct.run.entries import Judged
from selfinstruct.run.journal import Journal
from selfinstruct.run.limits import Limits, Spent, requests_needed
from selfinstruct.run.pool import Pool
from selfinstruct.run.progress import Observer, Snapshot
from selfinstruct.run.prompts import Prompts

_GRACE_SECONDS = 8.0  # for requests in flight when the run ends: they are paid for
_GRACE_SECONDS_OF_FAULTS = 3.5  # no credit, a wrong key: whoever waits is to hear of it soon
_REFRESH_SECONDS = 1.0
_WORRY_SECONDS = 5.0  # no answer for so long: say what is being waited for
_TURN_SECONDS = 0.005  # of judging, then the event loop gets its turn: a pause asked for is to be seen at once
_MOST_REFUSALS_AT_FIRST, _MOST_REFUSALS_IN_A_ROW = 8, 32  # then the settings or the server are wrong, not the prompts


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended. ``fault`` is what stopped it, when something did; ``reason`` says it in words.

    ``given_up`` requests were left out for now: they met nothing but faults while others were answered.
    """

    end: Literal["target", "limit", "signal", "fault"]
    reason: str
    kept: int
    spent: Spent
    given_up: int = 0
    fault: SelfInstructError | None = None


class Generation:
    """One command's work on a run, until the target, a limit, a fault or a signal."""

    def __init__(
        self,
        *,
        target: int,
        concurrency: int,
        method: Method,
        prompts: Prompts,
        pool: Pool,
        gate: Gate,
        backend: Backend,
        journal: Journal,
        limits: Limits,
        observer: Observer,
    ) -> None:
        self._target, self._concurrency = target, concurrency
        self._method, self._prompts, self._pool = method, prompts, pool
        self._gate, self._backend, self._journal = gate, backend, journal
        self._limits, self._observer = limits, observer
        self._asked: dict[int, Prompt] = {}
        self._ready: dict[int, Completion] = {}
        self._stored: set[int] = set()
        self._next = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()
        self._fault: SelfInstructError | None = None
        self._signalled = self._halted = False
        self._spent = Spent()
        self._given_up = 0
        self._refused_in_a_row = 0
        self._answered = False  # by this command, by any text at all
        self._trouble = ""
        self._start = self._news_at = time.monotonic()

    def interrupt(self) -> None:
        """End soon: send nothing more, keep what is in flight; at the second call end at once. For signal handlers."""
        if self._signalled:
            for task in self._tasks:
                task.cancel()
        self._signalled = True
        self._halt()
        self._news.set()

    def complain(self, trouble: str) -> None:
        """Show what is being waited for, until the next answer."""
        self._trouble = trouble

    def _halt(self) -> None:
        """Send nothing more; what is on its way may arrive."""
        self._halted = True
        self._backend.halt()

    async def run(self) -> Outcome:
        """Work until the end; every answer received is in the journal when this returns."""
        self._restore()
        try:
            while True:
                ended = await self._judge_ready() or self._ended()
                if ended:
                    break
                self._send()
                self._show()
                await self._wait()
        finally:
            await self._drain()
            await self._journal.flush()
        self._show()
        end, reason = ended
        return Outcome(end, reason, len(self._pool), self._spent, self._given_up, self._fault)

    def _restore(self) -> None:
        """Take up what the journal says was judged before."""
        for drafts, accepted in self._journal.judged():
            self._limits.note(drafts, accepted)
        self._gate.restore((draft.instruction, draft.input) for draft in self._pool.drafts)
        self._next = self._judged
        self._stored = self._journal.answered_beyond(self._judged)
        self._given_up = sum(number < self._judged for number in self._journal.given_up())

    @property
    def _judged(self) -> int:
        return self._prompts.judged

    def _ended(self) -> tuple[Literal["target", "limit", "signal", "fault"], str] | None:
        if self._signalled:
            return "signal", "interrupted"
        if len(self._pool) >= self._target:
            return "target", f"{self._target} rows reached"
        if self._fault is not None:
            return "fault", self._fault.message
        over = self._limits.saturated()
        if not over and not self._tasks and self._judged not in self._stored:
            over = self._limits.budget(self._spent)
        elif not over and self._limits.seconds_left() == 0:
            self._halt()  # what waits for its turn or for another attempt; what is on its way may arrive
        return ("limit", over) if over else None

    def _send(self) -> None:
        """Start requests while there is room in the window, a slot, a budget and a need."""
        rows, kept_after = self._target - len(self._pool), self._prompts.kept_after
        needed = requests_needed(rows, kept_after, self._method.tasks_per_request)
        while len(self._tasks) < self._concurrency and self._next < self._prompts.beyond:
            if self._next not in self._stored:
                if self._limits.budget(self._spent) or self._next - self._judged >= needed:
                    return
                self._spent.requests += 1
                prompt = self._asked[self._next] = self._prompts.make(self._next)
                task = asyncio.create_task(self._ask(prompt))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            self._next += 1

    async def _ask(self, prompt: Prompt) -> None:
        """Get one answer and write it down, durably, before anything else looks at it."""
        try:
            completion = await self._answer(prompt)
            await self._journal.record_answer(prompt, completion)
        except SelfInstructError as error:
            if not (self._halted and isinstance(error, Stopped | TransientFault)):
                self._fault = self._fault or _ends_run(error)
        else:
            self._spent.tokens += completion.prompt_tokens + completion.completion_tokens
            self._spent.tokens_written += completion.completion_tokens
            self._ready[prompt.request_no] = completion
            self._trouble = ""
            self._news_at = time.monotonic()
        finally:
            self._news.set()

    async def _answer(self, prompt: Prompt) -> Completion:
        try:
            completion = await self._backend.complete(prompt)
        except PromptRefused as error:
            self._refused_in_a_row += 1
            # Refusals come at once and answers take their time: what is in flight may still be answered.
            limit, waves = (_MOST_REFUSALS_IN_A_ROW, 2) if self._answered else (_MOST_REFUSALS_AT_FIRST, 1)
            if self._refused_in_a_row >= max(limit, waves * self._concurrency):
                raise
            return Completion(prompt.request_no, error.reason, "refused", model=self._backend.name)
        except GivenUp as error:
            self._observer.say(f"{error.message}; it is asked again on resume")
            return Completion(prompt.request_no, error.reason, "given_up", model=self._backend.name)
        self._answered = True
        self._refused_in_a_row = 0
        return completion

    async def _judge_ready(self) -> tuple[Literal["target", "limit", "signal", "fault"], str] | None:
        """Judge all requests whose turn has come; what ended the run, if the target or saturation did on the way."""
        turn = time.monotonic()
        while True:
            number = self._judged
            if len(self._pool) >= self._target or self._signalled or self._limits.saturated():
                return self._ended()
            prompt = self._asked.pop(number, None) or self._prompts.make(number)
            completion = self._ready.pop(number, None)
            if completion is None and number in self._stored:
                completion = self._journal.answer(prompt)
                self._stored.discard(number)
            if completion is None:
                self._asked[number] = prompt
                return None
            self._judge(prompt, completion)
            self._next = max(self._next, self._judged)
            if time.monotonic() - turn > _TURN_SECONDS:
                self._show()
                await asyncio.sleep(0)
                turn = time.monotonic()

    def _judge(self, prompt: Prompt, completion: Completion) -> None:
        if completion.finish in ("refused", "given_up"):
            self._given_up += completion.finish == "given_up"
            reason = f"{completion.finish.replace('_', ' ')}: {completion.text}"
            reading = Reading(losses=(Loss(prompt.request_no, 0, reason),))
        else:
            reading = self._method.parse(prompt, completion)
        verdicts = tuple(self._gate.judge(draft) for draft in reading.drafts)
        self._journal.record_judged(Judged(prompt.request_no, reading, verdicts))
        self._pool.extend(draft for draft, verdict in verdicts if verdict.accepted)
        kept_after = self._prompts.kept_after
        self._limits.note(len(verdicts), len(self._pool) - kept_after[-1])
        kept_after.append(len(self._pool))

    async def _wait(self) -> None:
        """Until something comes in, or it is time to refresh the display or to look at the clock."""
        left = self._limits.seconds_left()
        pause = _REFRESH_SECONDS if left is None else min(_REFRESH_SECONDS, left + 0.01)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), pause)
        self._news.clear()

    async def _drain(self) -> None:
        """Let the requests in flight arrive, for a bounded time; a second signal cuts it short."""
        self._halt()
        grace = _GRACE_SECONDS_OF_FAULTS if isinstance(self._fault, EnvironmentFault) else _GRACE_SECONDS
        if self._tasks:
            _, late = await asyncio.wait(set(self._tasks), timeout=grace)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _waiting(self) -> str:
        """What the run waits for, in words; "" while all goes well."""
        said = [self._trouble] if self._trouble else []
        silent = time.monotonic() - self._news_at
        if self._tasks and silent >= _WORRY_SECONDS:
            said.append(f"no answer for {silent:.0f} s, first in line is request {self._judged}")
        return "; ".join(said)

    def _show(self) -> None:
        elapsed = max(time.monotonic() - self._start, 0.001)
        self._observer.show(
            Snapshot(
                kept=len(self._pool),
                target=self._target,
                requests=self._judged,
                in_flight=len(self._tasks),
                tokens_per_second=self._spent.tokens_written / elapsed,
                acceptance=self._limits.acceptance,
                given_up=self._given_up,
                trouble=self._waiting(),
            )
        )


def _ends_run(error: SelfInstructError) -> SelfInstructError:
    """The error that ends the run when ``error`` cannot be retried any more."""
    if isinstance(error, EnvironmentFault | Stopped):
        return error
    return Stopped(error.message, hint=error.hint or "the requests in question are asked again when you resume")
