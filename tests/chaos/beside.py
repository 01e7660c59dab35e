"""What happens beside a run: a second run, readers, a clock that jumps, a second clean run."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from chaos.world import Command, Row, TeacherProcess, generate, parquet, run, scripted, shim
from selfinstruct.run.journal import Journal

_DAY = 86_400
_CLOCKS = ((_DAY, 0), (-_DAY, 0), (-3650 * _DAY, 0), (_DAY, 7), (-_DAY, 3))


def check(folder: Path, times: int) -> list[Row]:
    """All checks here, ``times`` times where chance has a part."""
    teacher = TeacherProcess(folder, delay=0.03)
    try:
        return [_equal(folder, teacher), _second(folder, teacher, times), _readers(folder, teacher), _clocks(folder)]
    finally:
        teacher.stop()


def _equal(folder: Path, teacher: TeacherProcess) -> Row:
    found = []
    for name in ("one", "two"):
        assert run(*generate(folder / name, teacher, concurrency=16)).code == 0
        found.append(parquet(folder / name))
    return Row("two clean runs give the same bytes", 2, [] if found[0] == found[1] else ["the bytes differ"])


def _second(folder: Path, teacher: TeacherProcess, times: int) -> Row:
    violations: list[str] = []
    expected = parquet(folder / "one")
    (folder / "other").mkdir()
    other = TeacherProcess(folder / "other")
    for number in range(times):
        out = folder / f"shared-{number}"
        first = Command(generate(out, teacher))
        while not (out / "run" / "holder.json").exists():
            time.sleep(0.005)
        second = run(*generate(out, other))
        if first.running() and (second.code != 3 or second.seconds > 2 or f"process {first.pid}" not in second.err):
            violations.append(f"the second: exit code {second.code} after {second.seconds:.1f} s: {second.err[-200:]}")
        if first.wait().code != 0 or parquet(out) != expected:
            violations.append("the first was harmed")
    violations += ["the second asked its teacher"] if other.events() else []
    other.stop()
    return Row("a second run on a folder is refused in 2 s", times, violations)


def _readers(folder: Path, teacher: TeacherProcess) -> Row:
    """Versions are published while a run works; readers see only whole ones, and never fewer rows than before."""
    out, log, violations, published = folder / "read", folder / "reads", [], 0
    writer = Command(generate(out, teacher, num=400))
    while writer.running() and not (out / "v1").exists():
        time.sleep(0.05)
        run("publish", out)
    readers = [
        Command(["versions", out], before=lambda name=name: _read(name, out, log))  # type: ignore[misc]
        for name in ("load", "status")
    ]
    while writer.running():
        ended = run("publish", out)
        published += ended.code == 0
        violations += [] if ended.code == 0 else [f"publish: {ended.code}: {ended.err[-200:]}"]
    (out / "run" / "stop").touch()
    ends = [writer.wait(), *(reader.wait() for reader in readers)]
    violations += [f"exit code {ended.code}: {ended.err[-300:]}" for ended in ends if ended.code != 0]
    reads = len(log.read_text().splitlines())
    return Row("readers see whole versions and never fewer rows", reads, violations, f"{published} versions meanwhile")


def _read(how: str, out: Path, log: Path) -> None:
    """Read again and again until the run is over; raises when something is wrong."""
    import selfinstruct

    most = 0
    with log.open("a", buffering=1) as reads:
        while not (out / "run" / "stop").exists():
            if how == "load":
                rows = len(selfinstruct.load(out)) + len(selfinstruct.load(out, split=None).get("validation", ()))
            else:
                journal = Journal.read_only(out / "run")
                rows = journal.counts()["accepted"]
                journal.close()
            if rows < most:
                raise ValueError(f"{how}: {rows} rows after {most}")
            most = rows
            reads.write(f"{how} {rows}\n")


def _clocks(folder: Path) -> Row:
    promise = "a clock that jumps changes nothing"
    library = shim()
    if library is None:
        return Row(promise, 0, note="skipped: no C compiler")
    calm = run(*scripted(folder / "calm"))
    expected, violations = parquet(folder / "calm"), []
    for seconds, period in _CLOCKS:
        out = folder / "jumps"
        shutil.rmtree(out, ignore_errors=True)
        ended = run(*scripted(out), before=lambda s=seconds, p=period: library.chaos_clock(s, p))
        if ended.code != 0 or parquet(out) != expected or ended.seconds > 3 * calm.seconds + 5:
            violations.append(f"{seconds} s: exit code {ended.code} after {ended.seconds:.1f} s: {ended.err[-200:]}")
    return Row(promise, len(_CLOCKS), violations)
