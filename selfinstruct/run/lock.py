"""One process works on a run at a time. The lock is the operating system's: it dies with its holder."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from selfinstruct import durable
from selfinstruct.errors import OutputError, RunLocked

LOCK, PUBLISH_LOCK, _HOLDER = "lock", "publish.lock", "holder.json"
_PUBLISH_WAIT_SECONDS = 60.0
_NAME_WAIT_SECONDS = 0.5  # between taking the lock and writing one's name lies an fsync


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the run folder for this process; RunLocked, naming the holder, when another has it."""
    lock = FileLock(folder / LOCK)
    try:
        _acquire(lock, folder)
        _empty(folder / LOCK)
    except OSError as error:
        lock.release()
        raise OutputError(f"{folder / LOCK}: cannot be locked ({error.strerror or error})") from error
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


def _acquire(lock: FileLock, folder: Path) -> None:
    with suppress(Timeout):
        lock.acquire(timeout=0)
        return
    named = _described(folder)
    if not named:
        with suppress(Timeout):  # who held it only looked at it (``holder``), or has left since
            lock.acquire(timeout=0)
            return
    raise RunLocked(
        f"{folder}: another process works on this run{named}",
        hint="wait for it, or stop it; to look at it: selfinstruct status",
    )


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
    """Who has just been seen to hold the lock: named at once, or soon if it is only beginning; "" if it is not."""
    limit = time.monotonic() + _NAME_WAIT_SECONDS
    while True:
        try:
            found = json.loads(durable.read(folder / _HOLDER))
            number, host = int(found["pid"]), str(found["host"])[:80]
            if host != socket.gethostname() or _lives(number):  # else it was killed, and another has the lock now
                return f" (process {number} on {host})"
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
        if time.monotonic() > limit:
            return ""
        time.sleep(0.02)


def _lives(number: int) -> bool:
    try:
        os.kill(number, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _empty(path: Path) -> None:
    """Cut a lock that we hold to nothing, which is what locks hold; not one that has another, foreign name too."""
    descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        found = os.fstat(descriptor)
        if found.st_size and found.st_nlink == 1:
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


@contextmanager
def publish_lock(folder: Path) -> Iterator[None]:
    """Hold the right to make a version; waits for another publisher, which takes seconds at most."""
    path = folder / PUBLISH_LOCK
    lock, is_new = FileLock(path), not path.exists()
    try:
        lock.acquire(timeout=_PUBLISH_WAIT_SECONDS)
        _empty(path)
        if is_new:
            durable.sync(folder)  # each version has this lock: ``verify`` misses it
    except Timeout:
        raise RunLocked(f"{folder}: another process is publishing", hint="try again when it is done") from None
    except OSError as error:
        lock.release()
        raise OutputError(f"{path}: cannot be locked ({error.strerror or error})") from error
    try:
        yield
    finally:
        lock.release()
