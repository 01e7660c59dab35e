"""One command's work on a run: lock, journal, teacher, loop, signals."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from selfinstruct import seeds as seed_files
from selfinstruct.backends.base import Backend
from selfinstruct.config import RunConfig
from selfinstruct.errors import SelfInstructError
from selfinstruct.languages import LANGUAGES
from selfinstruct.methods.alpaca import Alpaca
from selfinstruct.methods.base import Method
from selfinstruct.quality.gate import Gate
from selfinstruct.records import SeedTask
from selfinstruct.run import folder as run_folder
from selfinstruct.run.again import Again
from selfinstruct.run.generate import Generation, Outcome
from selfinstruct.run.journal import Journal
from selfinstruct.run.limits import Limits, Spent
from selfinstruct.run.lock import run_lock
from selfinstruct.run.pool import Pool
from selfinstruct.run.progress import Observer, Snapshot, observer
from selfinstruct.run.prompts import Prompts
from selfinstruct.servers.teachers import Teacher, open_teacher

Evaluation = Sequence[tuple[str, str]]
"""Tasks that no row may resemble: (where it stands, its text)."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A command's work is over: how, and by which signal if one came."""

    outcome: Outcome
    signal: int | None


def method_of(config: RunConfig) -> Method:
    """The method that resolved settings ask for."""
    return Alpaca(
        LANGUAGES[config.language],
        shots=config.shots,
        tasks=config.tasks,
        form=config.form or "text",
        api=config.api or "chat",
        max_new_tokens=config.max_new_tokens or 200 * config.tasks,
        with_seed=config.teacher_kind == "local",
    )


def gate_of(config: RunConfig, method: Method, seeds: list[SeedTask], evaluation: Evaluation = ()) -> Gate:
    """The gate that resolved settings ask for."""
    return Gate(
        seeds,
        language=LANGUAGES[config.language],
        rules=method.rules,
        threshold=config.threshold,
        tokenizer=config.tokenizer or "rouge",
        evaluation=evaluation,
        secrets=config.secrets,
    )


def work(
    root: Path,
    config: RunConfig,
    seeds: list[SeedTask],
    evaluation: Evaluation,
    teacher: Teacher,
    say: Callable[[str], None],
    *,
    forget_damaged: bool = False,
) -> Ended:
    """Begin the run in ``root`` or go on with it, until its target or whatever ends it before.

    ``seeds`` must be those of the run. ``say`` is told the start line. ``forget_damaged`` answers are asked for again.
    Publishes nothing.
    """
    method = method_of(config)
    method.opening(0, Pool(seeds).view(0), random.Random(0))  # too few seeds are told before anything is written
    folder = run_folder.prepare(root)
    with run_lock(folder):
        identity = config.identity(
            seeds_sha256=seed_files.digest(seeds),
            evaluation_sha256=_evaluation_sha256(evaluation),
            method_fingerprint=method.fingerprint,
        )
        is_new = not run_folder.holds_run(root)
        journal = (
            run_folder.create(folder, config, identity, seeds)
            if is_new
            else run_folder.reopen(folder, config, identity, forget_damaged=forget_damaged)
        )
        if journal.mended:
            say(journal.mended)
        try:
            gate = gate_of(config, method, seeds, evaluation)
            return asyncio.run(_generate(config, seeds, method, gate, teacher, journal, say))
        finally:
            journal.close()


def _evaluation_sha256(evaluation: Evaluation) -> str:
    texts = json.dumps([text for _, text in evaluation])
    return hashlib.sha256(texts.encode()).hexdigest() if evaluation else ""


async def _generate(
    config: RunConfig,
    seeds: list[SeedTask],
    method: Method,
    gate: Gate,
    teacher: Teacher,
    journal: Journal,
    say: Callable[[str], None],
) -> Ended:
    before = journal.counts()["accepted"]
    say(_start_line(config, teacher, gate, len(seeds), before))
    watcher = observer(config.num, before)
    received: list[int] = []
    at_work: list[Again | Generation] = []
    async with open_teacher(
        config, teacher, on_trouble=lambda said: at_work[-1].complain(said) if at_work else None, on_closed=watcher.say
    ) as backend:
        try:
            fault = await _ask_again(config, seeds, method, backend, journal, watcher, at_work, received)
            if fault is not None:
                given_up = len(journal.given_up())
                return Ended(Outcome("fault", fault.message, before, Spent(), given_up, fault), None)
            pool, prompts = _restored(config, seeds, method, journal)
            generation = Generation(
                target=config.num,
                concurrency=min(config.concurrency or 32, backend.max_in_flight),
                method=method,
                prompts=prompts,
                pool=pool,
                gate=gate,
                backend=backend,
                journal=journal,
                limits=Limits(
                    max_requests=config.max_requests,
                    max_tokens=config.max_tokens,
                    max_minutes=config.max_minutes,
                    min_acceptance=config.min_acceptance,
                    acceptance_window=config.acceptance_window,
                ),
                observer=watcher,
            )
            at_work.append(generation)
            if received:
                generation.interrupt()
            with _signals(generation, received):
                outcome = await generation.run()
        finally:
            watcher.close()
    return Ended(outcome, received[0] if received else None)


async def _ask_again(
    config: RunConfig,
    seeds: list[SeedTask],
    method: Method,
    backend: Backend,
    journal: Journal,
    watcher: Observer,
    at_work: list[Again | Generation],
    received: list[int],
) -> SelfInstructError | None:
    """Ask once more what was given up, if anything was; what ended it, if the run cannot go on."""
    numbers = journal.given_up()
    if not numbers:
        return None
    pool, prompts = _restored(config, seeds, method, journal)
    again = Again(
        backend=backend,
        journal=journal,
        concurrency=min(config.concurrency or 32, backend.max_in_flight),
        observer=watcher,
        shown=Snapshot(len(pool), config.num, prompts.judged, 0, 0.0, 1.0, given_up=len(numbers)),
    )
    at_work.append(again)
    with _signals(again, received):
        return await again.run([prompts.make(number) for number in numbers])


def _restored(config: RunConfig, seeds: list[SeedTask], method: Method, journal: Journal) -> tuple[Pool, Prompts]:
    """The pool and the maker of prompts as the journal says that they were."""
    pool = Pool(seeds)
    prompts = Prompts(method, seed=config.seed, pool_lag=config.pool_lag, pool=pool)
    prompts.restore(journal)
    return pool, prompts


@contextmanager
def _signals(work: Again | Generation, received: list[int]) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP (the terminal is gone) end the work softly, a second one at once."""
    loop = asyncio.get_running_loop()

    def interrupt(number: int) -> None:
        received.append(number)
        work.interrupt()

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    heard = [number for number, handler in before.items() if handler != signal.SIG_IGN]  # nohup: not this one
    for number in heard:
        loop.add_signal_handler(number, interrupt, number)
    try:
        yield
    finally:
        for number in heard:
            loop.remove_signal_handler(number)
            signal.signal(number, before[number])


def _start_line(config: RunConfig, teacher: Teacher, gate: Gate, seeds: int, before: int) -> str:
    parts = [
        f"teacher {teacher.about}",
        f"method {config.method} ({config.form} form, {config.api})",
        f"{seeds} seeds ({config.language})",
        f"ROUGE-L > {config.threshold:g} is not new ({gate.engine} engine, {config.tokenizer} tokenizer)",
        f"{config.concurrency} in flight",
        f"target {config.num}" + (f", {before} kept before" if before else ""),
    ]
    return "; ".join(parts)
