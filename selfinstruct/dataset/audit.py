"""Looking for damage in a published dataset: every version's manifest and shards, and the card."""

from __future__ import annotations

from pathlib import Path

from selfinstruct import durable
from selfinstruct.dataset import card, store
from selfinstruct.errors import DamagedFile

Finding = tuple[Path, str]  # a file, and what is wrong with it


def examine(root: Path) -> tuple[list[Path], list[Finding]]:
    """All files that the dataset in ``root`` is made of, and every damage in them. OutputError without access."""
    files: list[Path] = []
    findings: list[Finding] = []
    versions: list[store.Version] = []
    numbers = store.numbers(root)
    for number in numbers:
        folder = root / f"v{number}"
        files.append(folder / store.MANIFEST)
        try:
            version = store.read_version(root, number)
        except DamagedFile as error:
            named = files[-1] if error.message.startswith(str(files[-1])) else folder
            findings.append((named, error.message.removeprefix(f"{named}: ")))
            continue
        versions.append(version)
        for shard in version.shards:
            files.append(version.folder / shard.name)
            wrong = store.damage_of(version, shard)
            if wrong:
                findings.append((files[-1], wrong))
        expected = {store.MANIFEST, *(shard.name for shard in version.shards)}
        for extra in sorted(entry for entry in version.folder.iterdir() if entry.name not in expected):
            findings.append((extra, "is not in the manifest"))
    path = root / card.FILE_NAME
    if numbers or path.exists():
        files.append(path)
        wrong = _damage_of_card(path, versions, are_all=len(versions) == len(numbers))
        if wrong:
            findings.append((path, wrong))
    return files, findings


def _damage_of_card(path: Path, versions: list[store.Version], *, are_all: bool) -> str:
    """What is wrong with the card; "" also when its successor lies beside it: then a publisher was killed."""
    wrong = _wrong_in_card(path, versions, are_all=are_all)
    return wrong and _wrong_in_card(durable.unfinished(path), versions, are_all=are_all) and wrong


def _wrong_in_card(path: Path, versions: list[store.Version], *, are_all: bool) -> str:
    if path.is_symlink():
        return "is a link, not the file that was written"
    try:
        text = durable.read(path).decode("utf-8", "replace")
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    if not card.is_whole(text):
        return "is not what was written (its SHA-256 differs)"
    if are_all and card.versions_in(text) != {version.name for version in versions}:
        return "does not speak of the versions that are there; selfinstruct publish writes it again"
    return ""
