"""Disks that fill up, fail or cannot be written to: told in one line with the file's name, and resumed."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from chaos import crash_points
from chaos.world import Ended, Row, parquet, run, scripted, shim

_DISKS_KIB = (160, 320, 480)
_LINKS = ("lock", "journal.sqlite", "journal.sqlite.new", "config.yaml", "holder.json")
_LIMITS_KIB = (20, 60, 120, 250)


def check(folder: Path, every: int) -> list[Row]:
    """All checks here; ``every`` thins out the operations that are made to fail."""
    whole = folder / "whole" / "out"
    whole.parent.mkdir()
    assert run(*scripted(whole)).code == 0
    expected = parquet(whole)
    return [
        _failing_operations(folder, expected, every),
        _file_size_limits(folder, expected),
        _small_disks(folder, expected),
        _not_writable(folder),
    ]


def _failing_operations(folder: Path, expected: dict[str, bytes], every: int) -> Row:
    promise = "a disk that fills up or fails is told, then resumed"
    library = shim()
    if library is None:
        return Row(promise, 0, note="skipped: no C compiler")
    recorded = folder / "recorded" / "out"
    recorded.parent.mkdir()
    _, operations = crash_points.record(recorded, folder / "operations")
    base = folder / "failing"
    violations: list[str] = []
    tried = harmless = 0
    for action in (errno.ENOSPC, -errno.EIO):  # full from then on; a single error
        for number in range(0, len(operations), every):
            out = _fresh(base)
            ended = run(*scripted(out), before=_arm(base, number, action), seconds=60)
            tried += 1
            what = f"{errno.errorcode[abs(action)]} at operation {number} ({operations[number].path})"
            if ended.code == 0:
                harmless += 1  # of a file that was to be removed, say
                violations += [] if parquet(out) == expected else [f"{what}: exit 0 and other bytes"]
            else:
                violations += _untold(ended, what) + _not_resumed(out, expected, what)
    return Row(promise, tried, violations, f"{len(operations)} operations; {harmless} failures did no harm")


def _arm(base: Path, number: int, action: int) -> Callable[[], None]:
    return lambda: shim().chaos_arm(str(base).encode(), b"", number, action)


def _file_size_limits(folder: Path, expected: dict[str, bytes]) -> Row:
    violations: list[str] = []
    for limit in _LIMITS_KIB:
        out = _fresh(folder / "limited")
        ended = run(*scripted(out), before=_limit(limit * 1024), seconds=60)
        violations += _untold(ended, f"RLIMIT_FSIZE {limit} KiB") + _not_resumed(out, expected, f"{limit} KiB")
    return Row("a limit on file sizes is told, then resumed", len(_LIMITS_KIB), violations)


def _limit(size: int) -> Callable[[], None]:
    def before() -> None:
        # The command's own output goes to small files; only OUT's files come near the limit.
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return before


def _small_disks(folder: Path, expected: dict[str, bytes]) -> Row:
    promise = "a small disk that is full is told, then resumed"
    mount = folder / "disk"
    mount.mkdir()
    violations: list[str] = []
    for size in _DISKS_KIB:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", mount]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            return Row(promise, 0, note="skipped: file systems cannot be mounted here")
        try:
            out = mount / "out"
            violations += _untold(run(*scripted(out), seconds=60), f"a disk of {size} KiB")
            subprocess.run(["mount", "-o", "remount,size=64m", mount], check=True)
            violations += _not_resumed(out, expected, f"a disk of {size} KiB")
        finally:
            subprocess.run(["umount", mount], check=True)
    return Row(promise, len(_DISKS_KIB), violations)


def _not_writable(folder: Path) -> Row:
    """Refused in 2 s before anything is asked; what is there stays."""
    violations: list[str] = []
    file = folder / "a-file"
    file.write_text("mine")
    places = [file, file / "out", Path("/proc/selfinstruct")]
    foreign = folder / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    places.append(foreign)
    victim = folder / "victim"
    victim.write_text("mine")
    for name in ("run", *(f"run/{name}" for name in _LINKS)):
        out = folder / f"planted-{name.replace('/', '-')}"
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(victim if "/" in name else folder, out / name)
        places.append(out)
    for place in places:
        ended = run(*scripted(place))
        if ended.code not in (2, 3) or ended.seconds > 2 or str(place) not in ended.err or "Traceback" in ended.err:
            violations.append(f"{place}: exit code {ended.code} after {ended.seconds:.1f} s: {ended.err[-200:]}")
    if any(mine.read_text() != "mine" for mine in (file, victim, foreign / "notes.txt")):
        violations.append("something that is not ours was changed")
    return Row("an OUT that cannot be used is refused in 2 s", len(places), violations)


def _fresh(base: Path) -> Path:
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir()
    return base / "out"


def _untold(ended: Ended, what: str) -> list[str]:
    """What is wrong with how a command took a failing disk."""
    if ended.code in (0, 1, -9) or "Traceback" in ended.err:
        return [f"{what}: exit code {ended.code} after {ended.seconds:.1f} s: {ended.err[-400:]}"]
    said = next((line for line in ended.err.splitlines() if line.startswith("error: ")), "")
    return [] if "/" in said else [f"{what}: no file is named: {ended.err[-400:]}"]


def _not_resumed(out: Path, expected: dict[str, bytes], what: str) -> list[str]:
    ended = run(*scripted(out))
    if ended.code == 0 and parquet(out) == expected:
        return []
    return [f"{what}: when there was room again: exit code {ended.code}: {ended.err[-300:]}"]
