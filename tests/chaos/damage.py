"""Every file of a finished run damaged in every way: ``verify`` finds it, and resuming heals it or names the file."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from chaos.world import Row, parquet, run, scripted

KINDS = ("truncated", "NUL tail", "garbage appended", "record repeated", "one bit flipped", "emptied", "deleted")
_PAGE = 4096


def damaged(kind: str, whole: bytes, rng: random.Random) -> bytes | None:
    """The content after one such damage; None when it would be no change."""
    size = len(whole)
    if not size:
        return b"garbage" if kind == "garbage appended" else None
    if kind == "truncated":
        return whole[: rng.randrange(size)]
    if kind == "NUL tail":
        length = rng.randrange(1, min(size, 512) + 1)
        changed = whole[:-length] + bytes(length)
    elif kind == "garbage appended":
        return whole + rng.randbytes(rng.randrange(1, 200))
    elif kind == "record repeated":
        one, two = (rng.randrange(-(-size // _PAGE)) * _PAGE for _ in range(2))
        changed = whole[:one] + whole[two : two + _PAGE] + whole[one + _PAGE :]
        changed = changed if size > _PAGE else whole + whole[size // 2 :]
    elif kind == "one bit flipped":
        at = rng.randrange(size)
        changed = whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :]
    else:
        changed = b""
    return changed if changed != whole else None


def check(folder: Path, flips: int, seed: int = 0) -> list[Row]:
    """Damage each file; ``flips`` bit flips a file, four times as many in the journal, and some of every other kind."""
    rng, whole, out = random.Random(seed), folder / "whole", folder / "damaged"
    for num in (40, 60):
        assert run(*scripted(whole, num)).code == 0
    expected = parquet(whole)
    assert run("verify", whole).code == 0
    found: list[str] = []
    silent: list[str] = []
    tried = 0
    for path in sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file()):
        for kind in KINDS:
            times = {"emptied": 1, "deleted": 1, "one bit flipped": flips}.get(kind, max(1, flips // 8))
            for _ in range(times * (4 if path.name == "journal.sqlite" and times > 1 else 1)):
                shutil.rmtree(out, ignore_errors=True)
                shutil.copytree(whole, out)
                content = damaged(kind, (out / path).read_bytes(), rng)
                if kind == "deleted":
                    (out / path).unlink()
                elif content is None:
                    continue
                else:
                    (out / path).write_bytes(content)
                tried += 1
                checked = run("verify", out)
                if checked.code != 3 or path.stem not in checked.out or "Traceback" in checked.err:
                    found.append(f"{path} {kind}: verify ended with {checked.code}: {checked.out[-200:]}")
                silent += _silent(out, path, kind, expected)
    return [
        Row("verify finds and names every damaged file", tried, found),
        Row("resuming heals damage or refuses with the file's name", tried, silent),
    ]


def _silent(out: Path, path: Path, kind: str, expected: dict[str, bytes]) -> list[str]:
    ended = run("resume", out)
    if "Traceback" in ended.err or ended.code not in (0, 3):
        return [f"{path} {kind}: {ended.code}: {ended.err[-300:]}"]
    if ended.code == 3:
        return [] if path.name in ended.err else [f"{path} {kind}: refused without its name: {ended.err[-300:]}"]
    if parquet(out) != expected:
        return [f"{path} {kind}: resumed to other bytes"]
    return [] if run("verify", out).code == 0 else [f"{path} {kind}: not healed"]
