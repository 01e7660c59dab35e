"""One process works on a run, or on a file of answers, at a time; the lock dies with its holder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selfinstruct.errors import OutputError, RunLocked


@contextmanager
def held(what: Path, lock: Path) -> Iterator[None]:
    """Hold ``what`` for this process by the file ``lock``; RunLocked when another holds it, OutputError."""
    from filelock import FileLock, Timeout

    found = FileLock(lock)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        found.acquire(timeout=0)
    except Timeout:
        raise RunLocked(f"{what}: another process writes to it", hint="wait for it, or stop it") from None
    except OSError as error:
        raise OutputError(
            f"{what}: cannot be written ({error.strerror or error})", hint="free disk space, or choose another -o"
        ) from error
    try:
        yield
    finally:
        found.release()
