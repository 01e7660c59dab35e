"""``selfinstruct verify``: all is well, or each damaged file by its name."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from chaos.damage import KINDS, damaged


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with two versions."""
    from selfinstruct.cli.main import app

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


def test_nothing_to_verify_is_a_usage_error(run: Any, tmp_path: Path) -> None:
    assert run("verify", tmp_path / "none").returncode == 2
    assert run("verify", tmp_path).returncode == 2
