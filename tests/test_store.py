"""Versions on disk: whole or not at all, named by content, never read or written through a link."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from selfinstruct import durable
from selfinstruct.dataset import card, store
from selfinstruct.errors import DamagedFile, OutputError, UsageError


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


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        durable.write_text(tmp_path / "folder", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_card_knows_whether_it_is_whole(out: Path) -> None:
    text = (out / "README.md").read_text()
    assert card.is_whole(text)
    assert not card.is_whole(text.replace("40", "41", 1))
    assert not card.is_whole(text[:-1])
    assert not card.is_whole("")


def test_an_out_that_is_no_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="none"):
        store.versions(tmp_path / "none")
