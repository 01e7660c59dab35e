"""Runs killed at random moments, up to twice each, and resumed: to the bytes of a run that nothing happened to."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq

from chaos.world import Command, Ended, Row, TeacherProcess, generate, parquet, run

DURABLE_SECONDS = 0.05  # an answer handed over longer ago than this is on the disk
_UNDERWAY_SECONDS = 0.02  # a request takes this long from the killed client to the teacher, at most
Strike = tuple[float, int]  # when, and which signal


def check(folder: Path, kills: int, seed: int = 0) -> list[Row]:
    """``kills`` kills, a third each by SIGKILL, SIGTERM and SIGINT."""
    teacher, fsyncs = TeacherProcess(folder), _Fsyncs(folder)
    try:
        return _check(folder, teacher, fsyncs, kills, random.Random(seed))
    finally:
        teacher.stop()
        fsyncs.stop()


def _check(folder: Path, teacher: TeacherProcess, fsyncs: _Fsyncs, kills: int, rng: random.Random) -> list[Row]:
    whole = folder / "whole"
    reference = run(*generate(whole, teacher))
    assert reference.code == 0, reference.err
    expected, rows = parquet(whole), _rows(whole)
    left = Counter(dict.fromkeys((signal.SIGKILL, signal.SIGTERM, signal.SIGINT), kills // 3))
    bytes_differ: list[str] = []
    counts_differ: list[str] = []
    repeats: list[str] = []
    manners: list[str] = []
    took: list[float] = []
    slow: dict[float, float] = {}  # what an fsync took around each strike
    done = trials = 0
    while +left:
        out = folder / f"killed-{trials}"
        trials += 1
        start = len(teacher.events())
        strikes: list[Strike] = []
        for _ in range(2):
            number = rng.choice(sorted(+left)) if +left else None
            if number is None:
                break
            command = Command(generate(out, teacher))
            time.sleep(rng.uniform(0.02, reference.seconds))
            if not command.running():
                continue
            left[number] -= 1
            done += 1
            at = command.strike(number)
            strikes.append((at, number))
            ended = command.wait(30)
            slow[at] = fsyncs.around(at)
            took.append(time.monotonic() - at)
            asked = any(event[1] > command.started for event in teacher.events(start))
            manners += _manners(ended, number, at - command.started, took[-1], out, asked=asked)
        ended = run(*generate(out, teacher))
        if ended.code != 0:
            bytes_differ.append(f"{out.name}: resume ended with {ended.code}: {ended.err[-200:]}")
        elif parquet(out) != expected:
            bytes_differ.append(f"{out.name}: other bytes after {strikes}")
            counts_differ += _difference(_rows(out), rows)
        repeats += _repeats(teacher.events(start), strikes, slow)
    took.sort()
    disk = f"an fsync took {max(slow.values()):.3f} s at most"
    note = f"{trials} runs; {disk}; gone after {took[len(took) // 2]:.2f} s (median), {took[-1]:.2f} s (longest)"
    return [
        Row("a killed run ends byte-identical", done, bytes_differ, note),
        Row("no row missing, extra or doubled", done, counts_differ),
        Row("no answer is paid twice that was there 50 ms before", done, repeats),
        Row("SIGTERM and SIGINT end a run softly", done * 2 // 3, manners),
    ]


def _manners(ended: Ended, number: int, age: float, took: float, out: Path, *, asked: bool) -> list[str]:
    """What is wrong with how a command took a signal. Before its first request it may die of the signal itself."""
    if number == signal.SIGKILL or (not asked and took < 10):
        return []
    what = f"{signal.Signals(number).name} after {age:.2f} s"
    wrong = [f"{what}: gone after {took:.1f} s"] if took > 10 else []
    if "Traceback" in ended.err:
        wrong.append(f"{what}: a traceback: {ended.err[-300:]}")
    if ended.code == 0:
        return wrong
    last = (ended.err.strip().splitlines() or [""])[-1]
    if ended.code != 128 + number:
        wrong.append(f"{what}: exit code {ended.code}; last line {last!r}")
    elif last != f"resume with: selfinstruct resume {out}":
        wrong.append(f"{what}: the last line is {last!r}")
    return wrong


def _repeats(events: list[tuple[str, float, str]], strikes: list[Strike], slow: dict[float, float]) -> list[str]:
    """Prompts asked again though their answer had come: 50 ms before a SIGKILL, or ever before a softer signal.

    ``slow`` has what an fsync took around each strike: a disk that stalls is no fault of the run.
    """
    told: dict[str, float] = {}
    asked: dict[str, float] = {}
    found = []
    for what, at, prompt in events:
        if what == "told":
            told[prompt] = at
        elif what == "asked":
            if prompt in asked:
                before = told.get(prompt)
                since = asked[prompt] - _UNDERWAY_SECONDS
                kill = min((strike for strike in strikes if strike[0] >= since), default=None)
                if kill is None:
                    found.append(f"asked twice, {at - asked[prompt]:.3f} s apart, {_story(events, strikes, prompt)}")
                elif kill[1] != signal.SIGKILL:
                    name = signal.Signals(kill[1]).name
                    found.append(f"asked again after {name}: {_story(events, strikes, prompt)}")
                elif before is not None and kill[0] - before > DURABLE_SECONDS + 2 * slow[kill[0]]:
                    found.append(f"asked again though answered: {_story(events, strikes, prompt)}")
            asked[prompt] = at
    return found


def _story(events: list[tuple[str, float, str]], strikes: list[Strike], prompt: str) -> str:
    mine = [(at, what) for what, at, said in events if said == prompt]
    return str([f"{what} {at - mine[0][0]:.3f}" for at, what in sorted(mine + [(at, str(n)) for at, n in strikes])])


class _Fsyncs:
    """A process that measures what an fsync takes, again and again."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "fsyncs"
        self._log.touch()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                with self._log.open("a", buffering=1) as log, (folder / "probe").open("wb", buffering=0) as probe:
                    while os.getppid() != 1:
                        start = time.monotonic()
                        probe.write(bytes(4096))
                        os.fsync(probe.fileno())
                        log.write(f"{start} {time.monotonic() - start}\n")
                        time.sleep(0.01)
            finally:
                os._exit(0)

    def around(self, at: float) -> float:
        """The longest in the two seconds around a moment (seconds)."""
        pairs = [tuple(map(float, line.split())) for line in self._log.read_text().splitlines()[-500:]]
        return max((took for start, took in pairs if abs(start - at) < 1), default=0.0)

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _rows(out: Path) -> Counter[str]:
    return Counter(row["id"] for path in sorted(out.glob("v*/*.parquet")) for row in pq.read_table(path).to_pylist())


def _difference(seen: Counter[str], expected: Counter[str]) -> list[str]:
    missing, extra = expected - seen, seen - expected
    return [f"missing {sum(missing.values())}, extra {sum(extra.values())}"] if missing or extra else []
