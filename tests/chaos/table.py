"""Runs the checks and prints the table."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from chaos import beside, crash_points, damage, disk, faults, kills, world
from chaos.world import Row

Check = Callable[[Path, bool], list[Row]]  # an empty folder to work in, and whether to be short

CHECKS: dict[str, Check] = {
    "kills": lambda folder, short: kills.check(folder, 18 if short else 300),
    "crash": lambda folder, short: crash_points.check(folder, every=40 if short else 1),
    "disk": lambda folder, short: disk.check(folder, every=60 if short else 1),
    "damage": lambda folder, short: damage.check(folder, flips=2 if short else 40),
    "beside": lambda folder, short: beside.check(folder, times=1 if short else 10),
}


_COMPUTING = ("crash", "disk", "damage")  # the rest is sensitive to other work on the machine
_HEAD = f"{'promise':<72}{'tried':>7}{'broken':>8}{'seconds':>9}"


def main(arguments: list[str]) -> int:
    """Print the table; 0 when every promise held, else 1."""
    parser = argparse.ArgumentParser(description="Try what the project promises, and print a table.")
    parser.add_argument("--short", action="store_true", help="a sample, in less than a minute")
    parser.add_argument("--only", choices=[*CHECKS, "faults"], action="append", help="only this check; may be repeated")
    flags = parser.parse_args(arguments)
    if not (flags.only or flags.short):
        return _in_two_processes()
    world.with_shim([str(Path(__file__).parent), *arguments])
    world.warm()
    print(_HEAD)
    broken = 0
    for name in flags.only or [*CHECKS, "faults"]:
        start = time.monotonic()
        for row in _rows(name, short=flags.short):
            seconds = time.monotonic() - start
            print(f"{row.promise:<72}{row.tried:>7}{len(row.violations):>8}{seconds:>9.1f}", flush=True)
            for line in ([row.note] if row.note else []) + row.violations[:5]:
                print(f"    {line}", flush=True)
            broken += len(row.violations)
    world.remove_shim()
    print("every promise held" if not broken else f"{broken} violations")
    return int(broken > 0)


def _in_two_processes() -> int:
    """What is a matter of time by itself, and beside it what only computes; one table."""
    begin = [sys.executable, str(Path(__file__).parent)]
    with tempfile.TemporaryFile("w+") as said:
        computing = subprocess.Popen([*begin, *(f"--only={name}" for name in _COMPUTING)], stdout=said)
        timed = subprocess.Popen(
            [*begin, *(f"--only={name}" for name in [*CHECKS, "faults"] if name not in _COMPUTING)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for line in timed.stdout or ():
            print(line, end="", flush=True)
        codes = timed.wait(), computing.wait()
        said.seek(0)
        print(said.read(), end="")
    return max(codes)


def _rows(name: str, *, short: bool) -> Iterator[Row]:
    if name == "faults":
        yield from _faults(short=short)
        return
    folder = Path(tempfile.mkdtemp(prefix=f"chaos-{name}-"))
    try:
        yield from CHECKS[name](folder, short)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _faults(*, short: bool) -> Iterator[Row]:
    """The teacher's faults: each check gives (promise, how often it was tried, violations)."""
    for check in faults.SHORT if short else faults.FULL:
        promise, tried, violations = check()
        yield Row(promise, tried, list(violations))
