"""Answers that went with SQLite's log (``-wal``) after a kill are told, and nothing is told where none are lost."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tasks import by_prompt
from teacher import Teacher

from selfinstruct.errors import DamagedFile
from selfinstruct.records import Completion, Prompt, SeedTask
from selfinstruct.run import inspection, seal
from selfinstruct.run.journal import FILE_NAME, Journal

LOG = f"{FILE_NAME}-wal"
IN_FLIGHT = 4
PROGRAM = [sys.executable, "-c", "from selfinstruct.cli.main import run; run()"]


def parquet(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.glob("v*/*.parquet"))}


def answers_in(folder: Path, log: bytes | None) -> int:
    """Answers that SQLite finds in a copy of the journal with this log."""
    copy = folder.parent / "looked at"
    copy.mkdir()
    shutil.copyfile(folder / FILE_NAME, copy / FILE_NAME)
    if log is not None:
        (copy / LOG).write_bytes(log)
    connection = sqlite3.connect(copy / FILE_NAME)
    (count,) = connection.execute("SELECT COUNT(*) FROM answers").fetchone()
    connection.close()
    shutil.rmtree(copy)
    return int(count)


@dataclass
class Killed:
    """A run of 200 rows against a real teacher, killed after half its answers, and the same run unbroken."""

    out: Path
    whole: Path
    server: Teacher


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killed]:
    base = tmp_path_factory.mktemp("killed")
    with Teacher(by_prompt(), delay=0.02) as server:
        asked = ["--teacher", "mock", "--base-url", server.url, "--num", "200", "--concurrency", str(IN_FLIGHT)]
        guard = {**os.environ, "PYTHONPATH": str(Path(__file__).parent / "guard")}
        subprocess.run([*PROGRAM, "generate", base / "whole", *asked], env=guard, check=True, capture_output=True)
        needed = len(server.requests)
        child = subprocess.Popen([*PROGRAM, "generate", base / "out", *asked], env=guard, stderr=subprocess.DEVNULL)
        while len(server.requests) < needed + needed // 2 and child.poll() is None:
            time.sleep(0.01)
        child.kill()
        assert child.wait() == -signal.SIGKILL
        yield Killed(base / "out", base / "whole", server)


@pytest.fixture
def out(killed: Killed, tmp_path: Path) -> Path:
    """A copy of the killed run's whole folder."""
    return Path(shutil.copytree(killed.out, tmp_path / "out"))


def test_what_was_announced_is_what_was_on_the_disk(out: Path) -> None:
    folder = out / "run"
    there = answers_in(folder, (folder / LOG).read_bytes())
    assert there >= 10
    assert there - IN_FLIGHT <= seal.announced(folder / FILE_NAME) <= there  # a commit may have been under way


def test_a_killed_run_whose_log_is_there_is_well_and_resumes(run: Any, killed: Killed, out: Path) -> None:
    assert (out / "run" / LOG).stat().st_size
    asked = len(killed.server.requests)
    ended = run("verify", out)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert run("status", out).returncode == 0  # the last to leave brings the log into the file: it is gone now
    assert not (out / "run" / LOG).exists()
    assert run("verify", out).returncode == 0
    ended = run("resume", out)
    assert ended.returncode == 0, ended.stderr
    assert "asked for again" not in ended.stderr
    assert parquet(out) == parquet(killed.whole)
    assert len({json.dumps(body) for body in killed.server.requests[asked:]}) == len(killed.server.requests) - asked
    assert run("verify", out).returncode == 0


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "deleted": lambda _: None,
    "emptied": lambda _: b"",
    "truncated": lambda log: log[: len(log) // 2],
    "one bit flipped": lambda log: log[: len(log) // 3] + bytes([log[len(log) // 3] ^ 4]) + log[len(log) // 3 + 1 :],
    "first bit flipped": lambda log: bytes([log[0] ^ 128]) + log[1:],
    "NUL tail": lambda log: log[: len(log) // 2] + bytes(len(log) - len(log) // 2),
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("first", ["verify", "resume"])
def test_answers_lost_with_the_log_are_told_with_their_number(
    first: str, kind: str, run: Any, killed: Killed, out: Path
) -> None:
    folder, log = out / "run", out / "run" / LOG
    damaged = DAMAGES[kind](log.read_bytes())
    left, announced = answers_in(folder, damaged), seal.announced(folder / FILE_NAME)
    assert left < announced
    if damaged is None:
        log.unlink()
    else:
        log.write_bytes(damaged)
    asked = len(killed.server.requests)
    told = f"{announced - left} of {announced} answers are missing"
    for command in (first, "verify", "resume", "status"):
        ended = run(command, out)
        assert ended.returncode == 3, (command, ended.stderr)
        assert told in ended.stdout + ended.stderr
        assert str(folder / FILE_NAME) in ended.stdout + ended.stderr
        assert f"selfinstruct resume {out}" in ended.stderr
    assert "--forget-damaged" in run("resume", out).stderr
    assert len(killed.server.requests) == asked
    mended = run("resume", out, "--forget-damaged")
    assert mended.returncode == 0, mended.stderr
    assert re.search(rf"{announced - left} missing answers? (is|are) asked for again", mended.stderr)
    assert parquet(out) == parquet(killed.whole)
    assert run("verify", out).returncode == 0


@pytest.mark.parametrize("kept", [{FILE_NAME}, {FILE_NAME, LOG, "lock"}])
def test_a_copy_without_the_announcement_is_told(kept: set[str], run: Any, killed: Killed, out: Path) -> None:
    for path in (out / "run").iterdir():
        if path.name not in kept:
            path.unlink()
    for command in ("verify", "resume"):
        ended = run(command, out)
        assert ended.returncode == 3
        assert seal.FILE_NAME in ended.stdout + ended.stderr
        assert "is missing, and says how many answers" in ended.stdout + ended.stderr
    assert f"selfinstruct resume {out} --forget-damaged" in ended.stderr
    mended = run("resume", out, "--forget-damaged")
    assert mended.returncode == 0, mended.stderr
    assert parquet(out) == parquet(killed.whole)
    assert run("verify", out).returncode == 0


@pytest.mark.parametrize("content", [b"", b"garbage", b"announced 000000000009"])
def test_a_damaged_announcement_is_told(content: bytes, run: Any, out: Path) -> None:
    (out / "run" / seal.FILE_NAME).write_bytes(content)
    assert seal.FILE_NAME in run("verify", out).stdout
    ended = run("resume", out)
    assert (ended.returncode, f"{seal.FILE_NAME}: is damaged" in ended.stderr) == (3, True)


def test_what_a_loss_of_power_leaves_of_an_announcement_is_no_damage(run: Any, killed: Killed, out: Path) -> None:
    path = out / "run" / seal.FILE_NAME
    whole = path.read_bytes()
    for content in (bytes(len(whole)), whole[:16] + bytes(len(whole) - 16)):
        path.write_bytes(content)
        assert run("verify", out).returncode == 0
    seal.announce(out / "run" / FILE_NAME, 0)  # as it was when the run began
    assert run("verify", out).returncode == 0
    path.write_bytes(bytes(len(whole)))
    assert run("resume", out).returncode == 0
    assert parquet(out) == parquet(killed.whole)


def test_a_run_that_an_earlier_release_left_is_well(run: Any, killed: Killed, out: Path) -> None:
    (out / "run" / seal.FILE_NAME).unlink()  # it had none while a run was at work, and said "open"
    connection = sqlite3.connect(out / "run" / FILE_NAME)
    values = ("open", seal.checksum(["state", "open"]))
    connection.execute("UPDATE meta SET value = ?, crc = ? WHERE key = 'state'", values)
    connection.commit()
    connection.close()
    assert run("verify", out).returncode == 0
    ended = run("resume", out)
    assert ended.returncode == 0, ended.stderr
    assert parquet(out) == parquet(killed.whole)
    assert run("verify", out).returncode == 0


def test_a_killed_run_in_a_folder_that_nobody_can_write_to_is_not_missing_answers(out: Path, run: Any) -> None:
    folder = out / "run"
    folder.chmod(0o555)
    try:
        if os.access(folder, os.W_OK):
            pytest.skip("whoever runs this test can write everywhere")
        assert "missing" not in run("verify", out).stdout
        assert "read-only: journal.sqlite-wal" in run("verify", out).stderr
        assert "are not counted" in run("status", out).stderr
        folder.chmod(0o755)
        (folder / LOG).unlink()
        folder.chmod(0o555)
        assert "answers are missing" in run("verify", out).stdout
    finally:
        folder.chmod(0o755)


# What follows is about the journal alone.


def prompt(number: int) -> Prompt:
    return Prompt(number, "alpaca", text=f"prompt {number}", shown_ids=("s1",))


async def record(journal: Journal, numbers: range, size: int = 2000) -> None:
    for number in numbers:
        await journal.record_answer(prompt(number), Completion(number, "x" * size, "stop"))


def begun(folder: Path) -> Journal:
    """A journal at work, with 20 answers in its log."""
    folder.mkdir(parents=True)
    made = Journal.create(
        folder, identity={"method": "alpaca"}, seeds=[SeedTask("s1", "Name a river.", "", "T", False)]
    )
    made.begin({"num": 20})
    asyncio.run(record(made, range(20)))
    return made


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    made = begun(tmp_path / "out" / "run")
    yield made
    made.close()


def problems(journal: Journal, *, without_log: bool) -> list[str]:
    """What ``verify`` finds in a copy, as after a kill."""
    copy = journal.path.parent.parent.parent / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(journal.path.parent, copy / "run")
    if without_log:
        (copy / "run" / LOG).unlink()
    return [problem for _, problem in inspection.inspect(copy)[1]]


def test_only_what_was_in_the_log_alone_is_missing(journal: Journal) -> None:
    assert problems(journal, without_log=False) == []
    assert problems(journal, without_log=True)[0].startswith("20 of 20 answers are missing")
    connection = sqlite3.connect(journal.path)
    assert connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[0] == 0
    connection.close()
    assert problems(journal, without_log=True) == []
    asyncio.run(record(journal, range(20, 23)))
    assert problems(journal, without_log=True)[0].startswith("3 of 23 answers are missing")
    asyncio.run(record(journal, range(23, 60), size=200_000))  # SQLite brings the log in by itself
    assert 0 < answers_in(journal.path.parent, None) < 60
    lost = 60 - answers_in(journal.path.parent, None)
    assert problems(journal, without_log=True)[0].startswith(f"{lost} of 60 answers are missing")
    assert problems(journal, without_log=False) == []


def test_what_was_given_up_is_no_answer_until_it_is_asked_again(journal: Journal) -> None:
    given_up = Completion(20, "busy", "given_up")
    asyncio.run(journal.record_answer(prompt(20), given_up))
    assert seal.announced(journal.path) == 20
    connection = sqlite3.connect(journal.path)
    connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
    connection.close()
    asyncio.run(journal.record_late_answer(prompt(20), Completion(20, "text", "stop")))
    assert seal.announced(journal.path) == 21
    assert problems(journal, without_log=False) == []
    assert problems(journal, without_log=True)[0].startswith("1 of 21 answers are missing")


def test_a_run_that_goes_on_misses_only_what_it_lost(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "run"
    begun(folder).close()
    again = Journal.open(folder)
    again.begin({"num": 30})
    assert problems(again, without_log=False) == []
    asyncio.run(record(again, range(20, 25)))
    assert problems(again, without_log=True)[0].startswith("5 of 25 answers are missing")
    copy = folder.parent.parent / "copy" / "run"
    with pytest.raises(DamagedFile, match="5 of 25 answers"):
        Journal.open(copy)
    mended = Journal.open(copy, forget_damaged=True)
    assert "5 missing answers are asked for again" in mended.mended
    mended.begin({"num": 30})
    assert seal.announced(copy / FILE_NAME) == 20
    mended.close()
    again.close()


def test_damaged_and_missing_answers_are_told_together_and_forgotten_together(journal: Journal) -> None:
    connection = sqlite3.connect(journal.path)
    connection.execute("UPDATE answers SET text = 'another' WHERE request_no IN (3, 5)")
    connection.commit()
    connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
    connection.close()
    asyncio.run(record(journal, range(20, 24)))
    found = problems(journal, without_log=True)
    assert found[0].startswith("4 of 24 answers are missing")
    assert found[1:] == [f"the answer to request {number} is not what was written" for number in (3, 5)]
    mended = Journal.open(journal.path.parent.parent.parent / "copy" / "run", forget_damaged=True)
    assert "2 damaged and 4 missing answers are asked for again" in mended.mended
    assert len(mended.answered_beyond(0)) == 18
    mended.close()


def test_nothing_is_missed_in_a_run_at_work(journal: Journal) -> None:
    found: list[Any] = []
    looks = 0
    stop = threading.Event()

    def look() -> None:
        nonlocal looks
        while not stop.is_set():
            found.extend(inspection.inspect(journal.path.parent.parent)[1])
            looks += 1

    thread = threading.Thread(target=look)
    thread.start()
    asyncio.run(record(journal, range(20, 400)))
    stop.set()
    thread.join()
    assert looks > 5
    assert found == []


@pytest.mark.parametrize(
    "look",
    ["status", "verify", *(pytest.param(name, marks=pytest.mark.slow) for name in ("publish", "versions", "show"))],
)
def test_looking_at_a_run_that_goes_on_after_its_end_takes_nothing_away(
    killed: Killed, tmp_path: Path, look: str
) -> None:
    out = Path(shutil.copytree(killed.whole, tmp_path / "out"))
    guard = {**os.environ, "PYTHONPATH": str(Path(__file__).parent / "guard")}
    before = len(killed.server.requests)
    child = subprocess.Popen([*PROGRAM, "resume", out, "--num", "20000"], env=guard, stderr=subprocess.DEVNULL)
    while len(killed.server.requests) < before + 20 and child.poll() is None:
        time.sleep(0.01)
    log = (out / "run" / LOG).stat()
    subprocess.run([*PROGRAM, look, out], env=guard, check=look != "show", capture_output=True)
    assert child.poll() is None
    assert (out / "run" / LOG).stat().st_ino == log.st_ino
    child.kill()
    child.wait()
    there = answers_in(out / "run", (out / "run" / LOG).read_bytes())
    assert there >= seal.announced(out / "run" / FILE_NAME) >= 20
    assert inspection.inspect(out)[1] == []


def test_a_seal_that_a_beginning_run_replaces_is_not_broken(
    killed: Killed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Path(shutil.copytree(killed.whole, tmp_path / "out")) / "run" / FILE_NAME
    true_digest = seal._digest

    def begun_meanwhile(path: Path) -> str:
        monkeypatch.setattr(seal, "_digest", true_digest)
        seal.announce(path, 5)
        with path.open("ab") as stream:
            stream.write(b"more")
        return true_digest(path)

    assert seal.state(journal) == "good"
    monkeypatch.setattr(seal, "_digest", begun_meanwhile)
    assert seal.state(journal) == "announced"
