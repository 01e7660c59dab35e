"""The journal: what was recorded is there, what was damaged is named or worked out again, old journals are read."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from selfinstruct.config import as_yaml
from selfinstruct.errors import DamagedFile, OutputError, RunLocked
from selfinstruct.records import Completion, Draft, Loss, Prompt, Reading, SeedTask, Verdict
from selfinstruct.run import inspection, seal
from selfinstruct.run.entries import Judged
from selfinstruct.run.folder import holds_run, recorded_config
from selfinstruct.run.journal import FILE_NAME, Journal
from selfinstruct.run.lock import holder, run_lock
from selfinstruct.run.migrations import MIGRATIONS

FIXTURES = Path(__file__).parent / "fixtures"
IDENTITY = {"method": "alpaca", "teacher": "t", "language": "en"}
SEEDS = [SeedTask("s1", "Name a river.", "", "Tagus", False)]


def prompt(number: int) -> Prompt:
    return Prompt(number, "alpaca", text=f"prompt {number}", shown_ids=("s1",))


def judged(number: int) -> Judged:
    drafts = [Draft(number, n, f"Explain {number} {n}.", "", f"Output {number} {n}") for n in range(3)]
    verdicts = [Verdict(True, score=0.25, nearest_id="s1"), Verdict(True), Verdict(False, "not_new", "x", 0.9, "s1")]
    losses = (Loss(number, 3, "cut off"),)
    return Judged(number, Reading(tuple(drafts), losses), tuple(zip(drafts, verdicts, strict=True)))


async def fill(journal: Journal, numbers: range) -> None:
    for number in numbers:
        await journal.record_answer(prompt(number), Completion(number, f"text {number} \x00 é", "stop", model="m"))
        journal.record_judged(judged(number))
    await journal.flush()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a run that ended well after ten requests."""
    made = tmp_path / "out" / "run"
    made.mkdir(parents=True)
    journal = Journal.create(made, identity=IDENTITY, seeds=SEEDS)
    journal.begin({"num": 20})
    asyncio.run(fill(journal, range(10)))
    journal.close()
    return made


def change(folder: Path, sql: str) -> None:
    """Change a journal behind its back."""
    connection = sqlite3.connect(folder / FILE_NAME)
    connection.execute(sql)
    connection.commit()
    connection.close()


def test_what_was_recorded_is_read_again(folder: Path) -> None:
    journal = Journal.read_only(folder)
    assert (journal.identity(), journal.seeds(), journal.settings()) == (IDENTITY, SEEDS, {"num": 20})
    found = journal.answer(prompt(3))
    assert found is not None
    assert (found.text, found.finish, found.model) == ("text 3 \x00 é", "stop", "m")
    counts = journal.counts()
    assert (counts["requests"], counts["drafts"], counts["accepted"], counts["lost"]) == (10, 30, 20, {"cut off": 10})
    assert [(row.request_no, row.item_no) for row in journal.rows(5)] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    journal.close()


def test_an_ended_run_leaves_one_sealed_file(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [seal.FILE_NAME, FILE_NAME]
    assert seal.state(folder / FILE_NAME) == "good"
    Journal.read_only(folder).close()
    assert sorted(path.name for path in folder.iterdir()) == [seal.FILE_NAME, FILE_NAME]


def test_a_run_that_goes_on_breaks_the_seal_and_makes_it_again(folder: Path) -> None:
    journal = Journal.open(folder)
    journal.begin({"num": 30})
    assert (seal.state(folder / FILE_NAME), seal.announced(folder / FILE_NAME)) == ("announced", 10)
    asyncio.run(fill(journal, range(10, 12)))
    assert seal.announced(folder / FILE_NAME) == 12
    journal.close()
    assert seal.state(folder / FILE_NAME) == "good"
    journal = Journal.read_only(folder)
    assert (journal.counts()["requests"], journal.settings()) == (12, {"num": 30})
    journal.close()


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE answers SET text = 'another' WHERE request_no = 4",
        "UPDATE answers SET shown_ids = '[]' WHERE request_no = 4",
        "UPDATE answers SET seconds = 1.5 WHERE request_no = 4",
        "UPDATE meta SET value = replace(value, 'alpaca', 'alpacA') WHERE key = 'identity'",
    ],
)
def test_a_changed_answer_or_setting_is_refused_with_the_files_name(sql: str, folder: Path) -> None:
    change(folder, sql)
    with pytest.raises(DamagedFile, match=FILE_NAME):
        Journal.open(folder)
    with pytest.raises(DamagedFile, match=FILE_NAME):
        Journal.read_only(folder).counts()


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE drafts SET output = 'another' WHERE request_no = 4 AND item_no = 1",
        "UPDATE drafts SET instruction = CAST(x'ff' AS TEXT) WHERE request_no = 4 AND item_no = 1",
        "UPDATE drafts SET accepted = 1 WHERE request_no = 4",
        "UPDATE drafts SET request_no = 40 WHERE request_no = 4",
        "DELETE FROM drafts WHERE request_no = 4 AND item_no = 2",
        "DELETE FROM losses WHERE request_no = 4",
        "DELETE FROM judged WHERE request_no = 4",
        "UPDATE judged SET accepted = 3 WHERE request_no = 4",
    ],
)
def test_changed_judgements_are_forgotten_and_the_answers_kept(sql: str, folder: Path) -> None:
    change(folder, sql)
    with pytest.raises(DamagedFile, match="the answers are good"):
        Journal.read_only(folder).counts()
    journal = Journal.open(folder)
    assert "from 4 on" in journal.mended
    assert len(journal.judged()) == 4
    assert journal.counts()["requests"] == 10
    journal.close()


def test_a_missing_answer_is_asked_for_again(folder: Path) -> None:
    change(folder, "DELETE FROM answers WHERE request_no = 4")
    journal = Journal.open(folder)
    assert len(journal.judged()) == 4
    assert journal.answered_beyond(4) == {5, 6, 7, 8, 9}
    journal.close()


def test_a_torn_tail_is_healed(folder: Path) -> None:
    journal = Journal.open(folder)
    journal.begin({"num": 30})
    asyncio.run(fill(journal, range(10, 14)))
    copy = folder.parent / "copy"
    shutil.copytree(folder, copy)  # as after kill -9: the log is not brought in yet
    journal.close()
    log = copy / f"{FILE_NAME}-wal"
    log.write_bytes(log.read_bytes()[:-3000] + bytes(2000))
    healed = Journal.open(copy)
    healed.begin({"num": 30})
    assert 10 < healed.counts()["requests"] <= 14
    number = len(healed.judged())
    asyncio.run(fill(healed, range(number, 16)))
    assert healed.counts()["requests"] == 16
    healed.close()


def test_a_journal_of_schema_1_is_brought_up_to_date(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "run"
    shutil.copytree(FIXTURES / "journal_schema_1", folder)
    expected = json.loads((folder / "expected.json").read_text())
    old = Journal.read_only(folder)
    assert (old.identity(), old.settings()) == (expected["identity"], None)
    with pytest.raises(OutputError, match="earlier release") as caught:
        old.counts()
    assert "selfinstruct resume" in caught.value.hint
    old.close()
    assert recorded_config(folder.parent).teacher == "scripted:script.jsonl"
    journal = Journal.open(folder)
    assert journal.settings() is None
    assert journal.identity() == expected["identity"]
    assert [seed.task_id for seed in journal.seeds()] == expected["seeds"]
    assert journal.counts() == {**expected["counts"], "given_up": 0}
    assert json.loads(json.dumps([asdict(row) for row in journal.rows(100)])) == [
        {**row, "flags": []} for row in expected["rows"]
    ]
    journal.begin({"num": 400})
    journal.close()
    connection = sqlite3.connect(folder / FILE_NAME)
    assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
    connection.close()
    journal = Journal.read_only(folder)
    assert journal.counts() == {**expected["counts"], "given_up": 0}
    journal.close()


def test_a_journal_of_a_newer_release_is_refused(folder: Path) -> None:
    change(folder, "PRAGMA user_version = 99")
    with pytest.raises(OutputError, match="newer release"):
        Journal.open(folder)


def test_what_cannot_be_written_is_told_to_who_waits_and_ever_after(folder: Path) -> None:
    journal = Journal.open(folder)
    journal.begin({})
    for _ in range(2):
        with pytest.raises(OutputError, match=FILE_NAME):
            asyncio.run(asyncio.wait_for(fill_with(journal, "a lone \ud800 surrogate"), 5))
    with pytest.raises(OutputError):
        journal.close()


async def fill_with(journal: Journal, text: str) -> None:
    await journal.record_answer(prompt(10), Completion(10, text, "stop"))


def test_readers_are_not_disturbed_by_a_writer(folder: Path) -> None:
    journal = Journal.open(folder)
    journal.begin({})
    seen: list[int] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            reader = Journal.read_only(folder)
            seen.append(reader.counts()["requests"])
            reader.close()

    thread = threading.Thread(target=read)
    thread.start()
    asyncio.run(fill(journal, range(10, 200)))
    stop.set()
    thread.join()
    journal.close()
    assert seen == sorted(seen)
    assert seen[-1] > 10


def test_an_answer_is_on_the_disk_within_50_milliseconds(folder: Path) -> None:
    journal = Journal.open(folder)
    journal.begin({})

    async def record(number: int) -> float:
        start = time.monotonic()
        await journal.record_answer(prompt(number), Completion(number, "x" * 2000, "stop"))
        return time.monotonic() - start

    async def many() -> list[float]:
        return sorted([await record(number) for number in range(10, 40)])

    took = asyncio.run(many())
    journal.close()
    assert took[len(took) // 2] < 0.05


def test_a_second_run_is_refused_and_a_dead_one_blocks_nobody(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        assert holder(tmp_path)
        with pytest.raises(RunLocked, match="process"), run_lock(tmp_path):
            pass
    (tmp_path / "holder.json").write_text('{"pid": 1, "host": "gone"}')  # as kill -9 leaves it
    with run_lock(tmp_path):
        pass
    assert holder(tmp_path) == ""


def test_a_holder_that_has_just_begun_is_named(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    (tmp_path / "holder.json").write_text(json.dumps({"pid": gone.pid, "host": socket.gethostname()}))
    me = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
    with FileLock(tmp_path / "lock"):
        timer = threading.Timer(0.2, (tmp_path / "holder.json").write_text, [me])
        timer.start()
        with pytest.raises(RunLocked, match=f"process {os.getpid()} on"), run_lock(tmp_path):
            pass
        timer.join()


def test_a_run_is_not_locked_out_by_who_only_looks(tmp_path: Path) -> None:
    looking = FileLock(tmp_path / "lock", thread_local=False)
    looking.acquire()
    timer = threading.Timer(0.2, looking.release)
    timer.start()
    with run_lock(tmp_path):
        assert holder(tmp_path)
    timer.join()


@pytest.mark.parametrize("name", ["journal.sqlite", "lock", "holder.json", "config.yaml", "journal.sqlite-wal"])
def test_a_link_in_the_run_folder_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(victim)
    with pytest.raises(OutputError, match=name):
        holds_run(folder.parent)
    assert victim.read_text() == "mine"


def test_a_journal_that_was_deleted_is_missed(folder: Path) -> None:
    (folder / FILE_NAME).unlink()
    with pytest.raises(DamagedFile, match=FILE_NAME):
        holds_run(folder.parent)
    assert inspection.inspect(folder.parent)[1][0][0].name == FILE_NAME


def test_a_run_that_is_killed_while_it_is_sealed_is_not_damaged(folder: Path) -> None:
    (folder / "config.yaml").write_text(as_yaml({"num": 20}))
    (folder / "lock").touch()
    assert inspection.inspect(folder.parent)[1] == []
    seal.announce(folder / FILE_NAME, 10)
    assert seal.state(folder / FILE_NAME) == "announced"
    assert inspection.inspect(folder.parent)[1] == []
    journal = Journal.open(folder)
    journal.begin({"num": 20})
    journal.close()
    assert seal.state(folder / FILE_NAME) == "good"
    (folder / seal.FILE_NAME).unlink()
    assert [path.name for path, _ in inspection.inspect(folder.parent)[1]] == [seal.FILE_NAME]


def test_a_run_that_is_killed_before_its_settings_are_copied_is_not_damaged(folder: Path) -> None:
    journal = Journal.open(folder)
    for settings in (None, {"num": 10}):
        if settings:
            (folder / "config.yaml").write_text(as_yaml(settings))
        journal.begin({"num": 30})
        copy = folder.parent.parent / f"copy of {settings}" / "run"
        shutil.copytree(folder, copy)
        assert inspection.inspect(copy.parent)[1] == []
    journal.close()


def flipped(path: Path, at: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def test_no_flipped_bit_in_a_killed_runs_journal_goes_unnoticed(folder: Path, tmp_path: Path) -> None:
    (folder / seal.FILE_NAME).unlink()
    change(folder, "UPDATE meta SET value = 'open' WHERE key = 'state'")
    connection = sqlite3.connect(folder / FILE_NAME)
    connection.execute("UPDATE meta SET crc = ? WHERE key = 'state'", (seal.checksum(["state", "open"]),))
    connection.commit()
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    whole = Journal.read_only(folder)
    expected = (whole.identity(), whole.seeds(), list(whole.rows(100)), whole.counts())
    whole.close()
    size = (folder / FILE_NAME).stat().st_size
    noticed = unharmed = 0
    for step in range(150):
        copy: Any = tmp_path / "flipped"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        flipped(copy / FILE_NAME, step * (size // 150) + step % 7, step % 8)
        try:
            journal = Journal.read_only(copy)
            found = (journal.identity(), journal.seeds(), list(journal.rows(100)), journal.counts())
            journal.close()
        except OutputError as error:
            noticed += FILE_NAME in error.message
        else:
            unharmed += found == expected
    assert noticed + unharmed == 150
    assert noticed > 20


def test_whoever_gives_up_waiting_for_an_answer_to_be_written_harms_nobody(folder: Path) -> None:
    journal = Journal.open(folder)
    journal.begin({"num": 60})

    async def impatient() -> None:
        answers = [(prompt(n), Completion(n, "text", "stop")) for n in range(10, 60)]
        waiting = [asyncio.ensure_future(journal.record_answer(*one)) for one in answers]
        await asyncio.sleep(0)
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await asyncio.wait_for(journal.flush(), 10)

    asyncio.run(impatient())
    assert journal.answered_beyond(10) == set(range(10, 60))
    journal.close()
