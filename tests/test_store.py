"""Versions on disk: whole or not at all, named by content, never read or written through a link."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import selfinstruct
from selfinstruct import durable
from selfinstruct.dataset import card, store
from selfinstruct.dataset.publish import publish
from selfinstruct.errors import DamagedFile, OutputError, UsageError
from selfinstruct.run.journal import Journal


@pytest.fixture
def out(run: Any, tmp_path: Path) -> Path:
    """A dataset of two versions."""
    made = tmp_path / "out"
    for num in (40, 60):
        assert run("generate", made, "--teacher", "scripted", "--num", num).returncode == 0
    return made


def shards(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.parquet")}


def test_what_a_killed_publisher_left_is_swept(run: Any, out: Path) -> None:
    (out / ".v.tmp12").mkdir()
    (out / ".v.tmp12" / "train-00000.parquet").write_bytes(b"half")
    (out / ".README.md.tmp").write_text("half")
    (out / "README.md").unlink()
    assert run("publish", out).returncode == 0
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "run", "v1", "v2"]
    assert "v2" in (out / "README.md").read_text()


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_damaged_shard_of_any_version_is_written_again(version: str, run: Any, out: Path) -> None:
    before = shards(out)
    path = next((out / version).glob("train-*.parquet"))
    path.write_bytes(path.read_bytes()[:-9])
    assert run("resume", out).returncode == 0
    assert shards(out) == before


def hinted(ended: Any) -> list[str]:
    return [line.removeprefix("hint: ") for line in ended.stderr.splitlines() if line.startswith("hint: ")]


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("kind", ["changed", "missing", "a link", "a folder"])
def test_the_remedy_for_a_damaged_shard_mends_it(kind: str, version: str, run: Any, out: Path) -> None:
    before = shards(out)
    path = next((out / version).glob("train-*.parquet"))
    content = path.read_bytes()
    path.unlink()
    if kind == "changed":
        path.write_bytes(content[:-9])
    elif kind == "a link":
        path.symlink_to(out / "README.md")
    elif kind == "a folder":
        path.mkdir()
        remedy = f"remove {path}, then: selfinstruct publish {out}"
        assert hinted(run("show", out, "--version", version)) == hinted(run("publish", out)) == [remedy]
        path.rmdir()
    if kind != "a folder":
        assert hinted(run("show", out, "--version", version))[0].startswith(f"selfinstruct publish {out} (")
    assert run("publish", out).returncode == 0
    assert shards(out) == before
    assert run("verify", out).returncode == 0


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("kind", ["changed", "missing", "a link"])
def test_the_remedy_for_a_damaged_manifest_leaves_a_sound_dataset(kind: str, version: str, run: Any, out: Path) -> None:
    path = out / version / store.MANIFEST
    content = path.read_text()
    path.unlink()
    if kind == "changed":
        path.write_text(content.replace('"rows"', '"cows"'))
    elif kind == "a link":
        path.symlink_to(out / "README.md")
    remedy = f"remove {out / version}, then: selfinstruct publish {out}"
    assert hinted(run("show", out, "--version", version)) == hinted(run("publish", out)) == [remedy]
    shutil.rmtree(out / version)
    assert run("publish", out).returncode == 0
    assert run("verify", out).returncode == 0
    assert store.find(out, "latest").rows == 60


def test_a_shard_that_the_run_cannot_write_again_has_another_remedy(run: Any, out: Path) -> None:
    path = next((out / "v1").glob("train-*.parquet"))
    path.unlink()
    journal = Journal.read_only(out / "run")
    with pytest.raises(DamagedFile, match=path.name) as caught:
        publish(out, journal, target=60, validation=0.9)
    journal.close()
    assert caught.value.hint == f"remove {out / 'v1'}, then: selfinstruct publish {out}"


def test_a_manifest_cannot_name_files_elsewhere(out: Path) -> None:
    path = out / "v2" / store.MANIFEST
    said = json.loads(path.read_text())
    for name in ("../v1/" + said["files"][0]["name"], "/etc/passwd", "other.parquet"):
        said["files"][0]["name"] = name
        path.write_text(json.dumps(said))
        with pytest.raises(DamagedFile, match=store.MANIFEST):
            store.find(out, "latest")


def test_a_changed_manifest_is_refused_and_others_are_still_read(out: Path) -> None:
    path = out / "v1" / store.MANIFEST
    path.write_text(path.read_text().replace('"rows": 40', '"rows": 41'))
    with pytest.raises(DamagedFile, match=f"v1/{store.MANIFEST}"):
        store.find(out, "v1")
    assert store.find(out, "latest").name == "v2"
    with pytest.raises(UsageError, match="v9"):
        store.find(out, "v9")


@pytest.mark.parametrize("what", ["version", "manifest", "shard"])
def test_links_in_a_dataset_are_not_followed(what: str, out: Path, tmp_path: Path) -> None:
    version = out / "v2"
    planted = {
        "version": version,
        "manifest": version / store.MANIFEST,
        "shard": next(version.glob("train-*.parquet")),
    }[what]
    moved = tmp_path / "moved"
    planted.rename(moved)
    planted.symlink_to(moved)
    with pytest.raises(DamagedFile, match="is a link"):
        store.verify(store.find(out, "latest"))


def test_a_link_in_the_place_of_a_file_is_replaced_and_its_target_left_alone(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in ("README.md", ".README.md.tmp"):
        (tmp_path / name).symlink_to(victim)
    durable.write_text(tmp_path / "README.md", "new")
    assert (victim.read_text(), (tmp_path / "README.md").read_text()) == ("mine", "new")
    assert not (tmp_path / "README.md").is_symlink()


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a link", "a socket", "missing"])
def test_a_file_of_ours_that_is_none_is_never_waited_for(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "f"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a link":
        path.symlink_to(__file__)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    with pytest.raises(OSError):
        durable.read(path)


@pytest.mark.parametrize("kind", ["a file", "a link to nothing", "a link to a file", "a pipe"])
def test_what_only_has_the_name_of_a_version_is_named(kind: str, run: Any, out: Path) -> None:
    planted = out / "v3"
    if kind == "a file":
        planted.write_text("mine")
    elif kind == "a pipe":
        os.mkfifo(planted)
    else:
        planted.symlink_to(out / "README.md" if kind == "a link to a file" else out / "nothing")
    for command in (("resume", out, "--num", "80"), ("publish", out), ("versions", out), ("show", out)):
        ended = run(*command)
        assert ended.returncode == 3, command
        assert f"{planted}: is " in ended.stderr
        assert f"remove {planted}, then: selfinstruct publish {out}" in ended.stderr
    assert f"{planted}: is " in run("verify", out).stdout
    planted.unlink()
    assert run("resume", out, "--num", "80").returncode == run("verify", out).returncode == 0


def test_a_manifest_with_an_infinite_number_is_damaged(run: Any, out: Path) -> None:
    path = out / "v2" / store.MANIFEST
    path.write_text(re.sub(r'"rows": \d+,', '"rows": Infinity,', path.read_text()))
    for command in ("verify", "versions"):
        ended = run(command, out)
        assert ended.returncode == 3
        assert f"{path}: is damaged" in ended.stdout + ended.stderr


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        durable.write_text(tmp_path / "folder", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("split", ["train", None])
def test_only_columns_that_are_there_can_be_loaded(split: str | None, streaming: bool, out: Path) -> None:
    with pytest.raises(UsageError, match="v2: has no column 'nope'") as caught:
        selfinstruct.load(out, split=split, streaming=streaming, columns=["id", "nope"])
    assert caught.value.hint.startswith("it has id, instruction, input, output, ")
    found = selfinstruct.load(out, split=split, streaming=streaming, columns=["output", "id"])
    assert set(next(iter(found if split else found["train"]))) == {"id", "output"}


def test_a_card_knows_whether_it_is_whole(out: Path) -> None:
    text = (out / "README.md").read_text()
    assert card.is_whole(text)
    assert not card.is_whole(text.replace("40", "41", 1))
    assert not card.is_whole(text[:-1])
    assert not card.is_whole("")


def test_an_out_that_is_no_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="none"):
        store.versions(tmp_path / "none")


def test_a_full_disk_is_told_once_and_not_again_when_the_writer_is_collected(tmp_path: Path) -> None:
    program = """
import resource, sys
from pathlib import Path
import pyarrow as pa
from selfinstruct.dataset.parquet import open_writer
columns = pa.schema([("text", pa.binary())])

def write():
    with open_writer(Path(sys.argv[1]), columns) as writer:
        writer.write_table(pa.table({"text": [b"of another shard"]}, schema=columns))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        raise OSError("the disk is full")

try:
    write()
except OSError as error:
    print("told")
"""
    ended = subprocess.run([sys.executable, "-c", program, tmp_path / "x.parquet"], capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("told\n", "")
