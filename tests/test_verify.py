"""``selfinstruct verify``: all is well, or each damaged file by its name."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from chaos.damage import KINDS, damaged


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with two versions."""
    from selfinstruct.cli.app import app

    made = tmp_path_factory.mktemp("whole") / "out"
    for num in ("40", "60"):
        with pytest.raises(SystemExit) as ended:
            app(["generate", str(made), "--teacher", "scripted", "--num", num])
        assert ended.value.code in (0, None)
    return made


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "out"))


def test_a_finished_run_is_well(run: Any, out: Path) -> None:
    ended = run("verify", out)
    assert (ended.returncode, ended.stderr) == (0, "")
    found = json.loads(run("verify", out, "--json").stdout)
    assert (found["damaged"], found["exit_code"]) == ([], 0)
    assert found["files"] == 9


@pytest.mark.parametrize("kind", KINDS)
def test_damage_of_any_kind_in_any_file_is_found(kind: str, run: Any, whole: Path, out: Path) -> None:
    rng = random.Random(kind)
    for path in sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file()):
        content = damaged(kind, (whole / path).read_bytes(), rng)
        if kind == "deleted":
            (out / path).unlink()
        elif content is None:
            continue
        else:
            (out / path).write_bytes(content)
        ended = run("verify", out, "--json")
        named = {entry["file"] for entry in json.loads(ended.stdout)["damaged"]}
        assert (ended.returncode, str(out / path) in named) == (3, True), (path, ended.stdout)
        shutil.copyfile(whole / path, out / path)


def test_all_damaged_files_are_named_at_once(run: Any, out: Path) -> None:
    shard, manifest = next((out / "v1").glob("*.parquet")), out / "v2" / "_manifest.json"
    shard.write_bytes(b"")
    manifest.unlink()
    (out / "v1" / "planted.parquet").write_bytes(b"x")
    (out / "run" / "config.yaml").write_text("num: 3\n")
    ended = run("verify", out)
    assert ended.returncode == 3
    for name in (shard.name, "v2/_manifest.json", "planted.parquet", "config.yaml"):
        assert name in ended.stdout


def test_a_dataset_without_its_run_is_checked_too(run: Any, out: Path) -> None:
    shutil.rmtree(out / "run")
    assert run("verify", out).returncode == 0
    next((out / "v2").glob("train-*.parquet")).unlink()
    assert run("verify", out).returncode == 3


def test_a_settings_file_that_was_changed_does_not_change_the_run(run: Any, out: Path) -> None:
    (out / "run" / "config.yaml").write_text("num: 500\nteacher: other\n")
    ended = run("resume", out, "--json")
    assert (ended.returncode, json.loads(ended.stdout)["target"]) == (0, 60)
    assert run("verify", out).returncode == 0


PLACES = [
    "README.md", "run/config.yaml", "run/journal.sha256", "run/journal.sqlite", "run/journal.sqlite-wal", "run/lock",
    "run/publish.lock", "run/holder.json", "v1/_manifest.json", "v2",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["pipe", "folder", "link"])
@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_file_is_named_and_never_waited_for(place: str, kind: str, run: Any, out: Path) -> None:
    path = out / place
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(out / "nothing")
    for command in ("verify", "status", "resume", "publish"):
        ended = run(command, out)
        if ended.returncode == 0:  # it needs not this file, or a link was replaced
            assert command == "status" or (kind, place) == ("link", "README.md") or path.is_file()
        else:
            assert ended.returncode == 3
            assert str(path) in ended.stdout + ended.stderr or path.name in ended.stderr
    assert kind == "link" or run("verify", out).returncode == 3 or place == "README.md"


def test_a_lock_is_emptied_by_who_holds_it_next(run: Any, out: Path, tmp_path: Path) -> None:
    for name in ("lock", "publish.lock"):
        (out / "run" / name).write_text("garbage")
    assert run("verify", out).returncode == 3
    assert run("resume", out).returncode == 0
    assert run("verify", out).returncode == 0
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (out / "run" / "lock").unlink()
    (out / "run" / "lock").hardlink_to(victim)
    run("resume", out)
    assert victim.read_text() == "mine"


def test_nothing_to_verify_is_a_usage_error(run: Any, tmp_path: Path) -> None:
    assert run("verify", tmp_path / "none").returncode == 2
    assert run("verify", tmp_path).returncode == 2


def test_damaged_answers_are_asked_for_again_when_told_so(run: Any, whole: Path, out: Path) -> None:
    journal = out / "run" / "journal.sqlite"
    connection = sqlite3.connect(journal)
    connection.execute("UPDATE answers SET text = replace(text, 'item', 'icem') WHERE request_no IN (2, 7)")
    connection.commit()
    connection.close()
    refused = run("resume", out)
    assert refused.returncode == 3
    assert "the answer to request 2 is not what was written; the answer to request 7" in refused.stderr
    assert f"selfinstruct resume {out} --forget-damaged" in refused.stderr
    mended = run("resume", out, "--forget-damaged")
    assert mended.returncode == 0, mended.stderr
    assert "2 damaged answers are asked for again" in mended.stderr
    assert run("verify", out).returncode == 0
    for path in whole.glob("v*/*.parquet"):
        assert (out / path.relative_to(whole)).read_bytes() == path.read_bytes()
