"""Files that are on the disk whole or not at all, whatever ends the process or the machine in between."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import IO


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by UTF-8 ``text``: written beside it, flushed to the disk, renamed, and the folder flushed.

    A link planted under either name is replaced and never followed. Raises OSError; then ``path`` is as it was.
    """
    with replacing(path, unfinished(path)) as stream:
        stream.write(text.encode())


def unfinished(path: Path) -> Path:
    """Where ``write_text`` writes; a process that is killed leaves it."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def replacing(path: Path, temporary: Path) -> Iterator[IO[bytes]]:
    """A new file ``temporary`` to write to; at the end it is flushed to the disk and takes the name ``path``.

    A link planted under either name is replaced and never followed. Whatever is raised, ``path`` then is as it was.
    """
    temporary.unlink(missing_ok=True)  # of a process that was killed
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            flush(stream)
        temporary.replace(path)
    except BaseException:  # Ctrl-C included: nothing half written stays
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def flush(stream: IO[bytes]) -> None:
    """Flush what was written so far to the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def opened(path: Path) -> BufferedReader:
    """A file of ours, to be read. OSError when a link, a folder, a pipe or a device has its place; never waits."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read(path: Path) -> bytes:
    """The content of a file of ours; as ``opened``."""
    with opened(path) as stream:
        return stream.read()


def publish(work: Path, target: Path) -> None:
    """Give a finished folder its name: all that is in it flushed to the disk, then one rename. Raises OSError."""
    for path in [*work.rglob("*"), work]:
        sync(path)
    work.rename(target)
    sync(target.parent)


def remove(path: Path) -> None:
    """Let a file, a link (never what it points to) or a folder with all that is in it be gone, as far as we may."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Make a folder with its parents, each name flushed to the disk. Raises OSError."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk; of a folder, the names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
