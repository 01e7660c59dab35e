"""One process works on a run at a time. The lock is the operating system's: it dies with its holder."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from selfinstruct import durable
from selfinstruct.errors import OutputError, RunLocked

LOCK, PUBLISH_LOCK, _HOLDER = "lock", "publish.lock", "holder.json"
_PUBLISH_WAIT_SECONDS = 60.0


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the run folder for this process; RunLocked, naming the holder, when another has it."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunLocked(
            f"{folder}: another process works on this run{_described(folder)}",
            hint="wait for it, or stop it; to look at it: selfinstruct status",
        ) from None
    except OSError as error:
        raise OutputError(f"{folder}: cannot be locked ({error.strerror or error})") from error
    described = folder / _HOLDER
    try:
        try:
            durable.write_text(described, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        except OSError as error:
            raise OutputError(
                f"{described}: cannot be written ({error.strerror or error})", hint="it needs a disk with free space"
            ) from error
        yield
    finally:
        with suppress(OSError):  # a holder that is named after its end does no harm
            described.unlink(missing_ok=True)
        lock.release()


def holder(folder: Path) -> str:
    """Who works on the run now (" (process 12 on host)"), "" when nobody does."""
    lock = FileLock(folder / LOCK)
    if not (folder / LOCK).exists():
        return ""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return _described(folder) or " (unknown)"
    except OSError:
        return ""
    lock.release()
    return ""


def _described(folder: Path) -> str:
    try:
        found = json.loads((folder / _HOLDER).read_text(encoding="utf-8"))
        return f" (process {int(found['pid'])} on {str(found['host'])[:80]})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


@contextmanager
def publish_lock(folder: Path) -> Iterator[None]:
    """Hold the right to make a version; waits for another publisher, which takes seconds at most."""
    lock = FileLock(folder / PUBLISH_LOCK)
    try:
        lock.acquire(timeout=_PUBLISH_WAIT_SECONDS)
    except Timeout:
        raise RunLocked(f"{folder}: another process is publishing", hint="try again when it is done") from None
    except OSError as error:
        raise OutputError(f"{folder}: cannot be locked ({error.strerror or error})") from error
    try:
        yield
    finally:
        lock.release()
