"""What all checks use: commands started by fork from a warm process, a teacher in a process of its own, the shim.

A command costs 1.2 s of CPU to start, nearly all of it imports. Here the parent imports everything once and has one
thread; each command is a fork of it that calls the program's own entry point and leaves by ``os._exit``. So a run of
forty answers takes a third of a second, and a kill hits the same code as in a fresh process.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web
from tasks import by_prompt
from teacher import Teacher, prompt_of

SHIM = "CHAOS_SHIM"
_SOFT = (signal.SIGINT, signal.SIGTERM)
Before = Callable[[], None]


@dataclass(frozen=True)
class Row:
    """One line of the table: a promise, how often it was tried, and what broke it."""

    promise: str
    tried: int
    violations: list[str] = field(default_factory=list)
    note: str = ""


@dataclass
class Ended:
    """How a command ended. ``code`` is negative for a signal; ``seconds`` is wall time."""

    code: int
    out: str
    err: str
    seconds: float


class Command:
    """A command of the program in a forked child."""

    def __init__(self, arguments: Sequence[object], *, before: Before | None = None) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="chaos-said-"))
        self.started = time.monotonic()
        # A signal that comes before the child is a command would end this program's work in the child, rubble and all.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SOFT)
        self.pid = os.fork()
        if self.pid == 0:
            self._become([str(argument) for argument in arguments], before)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SOFT)
        self._ended: Ended | None = None

    def _become(self, arguments: list[str], before: Before | None) -> None:
        code = 70
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SOFT)
            for name, number in (("out", 1), ("err", 2)):
                descriptor = os.open(self._folder / name, os.O_WRONLY | os.O_CREAT, 0o600)
                os.dup2(descriptor, number)
                os.close(descriptor)
            if before:
                before()
            code = call(arguments)
        except BaseException:  # noqa: BLE001  (told on the command's standard error)
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def running(self) -> bool:
        if self._ended is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._note(status)
        return self._ended is None

    def strike(self, number: int) -> float:
        """Send a signal; the moment, on the monotonic clock that all processes share."""
        now = time.monotonic()
        os.kill(self.pid, number)
        return now

    def wait(self, seconds: float = 120.0) -> Ended:
        """Wait for the end; a command that hangs is killed and ends with -9 after ``seconds``."""
        limit = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > limit:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.002)
        assert self._ended is not None
        return self._ended

    def _note(self, status: int) -> None:
        said = [
            path.read_text(errors="replace") if (path := self._folder / name).exists() else ""
            for name in ("out", "err")
        ]
        shutil.rmtree(self._folder)
        self._ended = Ended(os.waitstatus_to_exitcode(status), *said, time.monotonic() - self.started)


def call(arguments: list[str]) -> int:
    """The program in this process; its exit code."""
    from selfinstruct.cli.app import app

    try:
        app(arguments)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0


def run(*arguments: object, before: Before | None = None, seconds: float = 120.0) -> Ended:
    """A command from its start to its end."""
    return Command(arguments, before=before).wait(seconds)


def warm() -> None:
    """Import what commands import, so that forks need not."""
    import aiohttp  # noqa: F401
    import openai  # noqa: F401
    import pandas  # noqa: F401  (pyarrow imports it at the first table)
    import pyarrow.parquet  # noqa: F401

    import selfinstruct.backends.http
    import selfinstruct.cli.app
    import selfinstruct.dataset.audit
    import selfinstruct.dataset.publish
    import selfinstruct.run.inspection
    import selfinstruct.run.session  # noqa: F401

    gc.freeze()  # a collection in a child would copy every page of the parent


class LoggingTeacher(Teacher):
    """The tests' teacher; notes when a prompt came and when its answer had been handed over."""

    def __init__(self, log: Path, delay: float) -> None:
        super().__init__(by_prompt(repeat=0.1), delay=delay)
        self._log = log.open("a", buffering=1)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        prompt = prompt_of(await request.json())
        self._note("asked", prompt)
        response = await super()._handle(request)
        with suppress(ConnectionError):  # whoever asked was killed
            await response.prepare(request)
            await response.write_eof()
            self._note("told", prompt)
        return response

    def _note(self, what: str, prompt: str) -> None:
        self._log.write(json.dumps([what, time.monotonic(), prompt]) + "\n")


class TeacherProcess:
    """A teacher that outlives the commands; ``log`` has one line an event: ["asked" | "told", seconds, prompt]."""

    def __init__(self, folder: Path, *, delay: float = 0.015) -> None:
        self.log, address = folder / "teacher.jsonl", folder / "address"
        self.log.touch()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                with LoggingTeacher(self.log, delay) as teacher:
                    (folder / "address.new").write_text(teacher.url)
                    (folder / "address.new").rename(address)
                    while os.getppid() != 1:
                        time.sleep(0.5)
            finally:
                os._exit(0)
        while not address.exists():
            time.sleep(0.01)
        self.url = address.read_text()

    def events(self, start: int = 0) -> list[tuple[str, float, str]]:
        """What has happened, from the ``start``-th event on."""
        return [tuple(json.loads(line)) for line in self.log.read_text().splitlines()[start:]]

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def generate(out: Path, teacher: TeacherProcess, num: int = 100, concurrency: int = 4) -> list[object]:
    """The arguments of a run against the HTTP teacher."""
    asked = ["--teacher", "mock", "--base-url", teacher.url, "--num", num, "--concurrency", concurrency]
    return ["generate", out, *asked]


def scripted(out: Path, num: int = 160) -> list[object]:
    """The arguments of a run of forty canned answers."""
    return ["generate", out, "--teacher", "scripted", "--num", num, "--concurrency", 4, "--json"]


def parquet(out: Path) -> dict[str, bytes]:
    """The published Parquet files, by their place."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.glob("v*/*.parquet"))}


def shim() -> Any:
    """The loaded shim, None without one (no C compiler)."""
    return ctypes.CDLL(os.environ[SHIM]) if SHIM in os.environ else None


def remove_shim() -> None:
    """Take the shim's file away; what has loaded it keeps it."""
    if SHIM in os.environ:
        shutil.rmtree(Path(os.environ[SHIM]).parent, ignore_errors=True)


def with_shim(program: list[str]) -> None:
    """Start this program again with the shim in it. Returns when that is done already or there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if SHIM in os.environ or compiler is None:
        return
    library = Path(tempfile.mkdtemp(prefix="chaos-shim-")) / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl", "-lpthread"], check=True)
    environment = {**os.environ, SHIM: str(library), "LD_PRELOAD": str(library)}
    os.execve(sys.executable, [sys.executable, *program], environment)
