"""llama.cpp (the xllamacpp wheels) as an OpenAI-compatible endpoint on loopback.

It runs in a child process. Inside ours it was measured (xllamacpp 2026.10.11549) to hold the interpreter lock while a
model loads and while it stops, to stop only after the batch being computed (11 to 20 s with long prompts) or, with a
client in the same process, never, and to end the process by a segmentation fault when that exits during a request.

What a client must send (measured on SmolLM2-135M, same version):

- ``/v1/completions``: the JSON schema goes into the field ``json_schema``. ``response_format`` and
  ``structured_outputs`` are ignored there without an error. ``grammar`` works.
- ``/v1/chat/completions``: ``response_format={"type": "json_schema", "json_schema": {"schema": ...}}`` or
  ``json_schema``, with the same result.
- ``min_p``, ``seed`` and ``n`` work on both; with ``n`` the ``usage`` counts the tokens of one choice only. ``stop``
  works, ``echo`` and ``model`` are ignored on completions; ``max_completion_tokens`` works on chat.
- A schema that llama.cpp cannot read is ignored silently on ``/v1/completions``: the reply is then free
  text. On chat it is HTTP 400.
- A prompt longer than a slot is HTTP 400, type ``exceed_context_size_error``.
- The same seed gave the same text alone, again, with the prompt cached, and with 8 of 8 slots busy (8 of 8 seeds, one
  machine, one thread). llama.cpp does not promise it: sums may be taken in another order in another batch.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Self
from urllib.parse import urlsplit

from selfinstruct.errors import MissingPackage, ServerError, UsageError
from selfinstruct.servers.llama_cpp_child import Settings

_CHILD = Path(__file__).with_name("llama_cpp_child.py")
_POLL_S = 0.2


class LlamaCppServer:
    """One GGUF model behind ``http://127.0.0.1:PORT/v1``; use it as a context manager, or ``start`` and ``stop``.

    ``slots`` requests (>= 1) are computed at a time, each with ``context_per_slot`` tokens (>= 1) for prompt and reply.
    ``threads`` (>= 1) defaults to ``default_threads()``. ``alias`` is the model's name in answers, the file's stem by
    default. With an ``api_key`` every request must carry it, which also keeps other users of the machine and web pages
    that rebind their host name out. ``on_wait`` gets the seconds waited so far while the model loads; loading longer
    than ``load_timeout_s`` is a ``ServerError``.
    """

    def __init__(
        self,
        model: Path,
        *,
        slots: int = 8,
        context_per_slot: int = 2048,
        threads: int | None = None,
        alias: str = "",
        api_key: str = "",
        load_timeout_s: float = 600.0,
        on_wait: Callable[[float], None] | None = None,
    ) -> None:
        self.threads = default_threads() if threads is None else threads
        for name, number in (("slots", slots), ("context_per_slot", context_per_slot), ("threads", self.threads)):
            if number < 1:
                raise UsageError(f"{name} is {number}", hint=f"give {name} a whole number from 1")
        self.model = model
        self.slots = slots
        self._settings = Settings(
            model=str(model.absolute()),
            alias=alias or model.stem,
            slots=slots,
            context=slots * context_per_slot,
            threads=self.threads,
            api_key=api_key,
        )
        self._load_timeout_s = load_timeout_s
        self._on_wait = on_wait
        self._child: subprocess.Popen[str] | None = None
        self._url = ""

    def start(self) -> str:
        """Load the model, wait until it answers and return the base URL; the same URL when it is up already.

        Raises MissingPackage without xllamacpp, ServerError with llama.cpp's own words when it cannot serve the model.
        """
        if self._child is not None and self._child.poll() is None:
            return self._url
        self.stop()
        if importlib.util.find_spec("xllamacpp") is None:
            raise MissingPackage(
                "the package xllamacpp, which runs local models, is not installed",
                hint="pip install 'selfinstruct[local]'",
            )
        # An unnamed file and not a pipe: nobody reads while the server runs, and a full pipe would stop it.
        with tempfile.TemporaryFile() as complaints:
            try:
                self._launch(complaints)
                root = self._await_ready(complaints)
            except BaseException:  # Ctrl-C included: no child may stay behind
                self.stop()
                raise
        self._url = f"{root}/v1"
        return self._url

    def stop(self) -> None:
        """End the child at once (it keeps no state); requests in flight lose their connection. May be called again."""
        child, self._child, self._url = self._child, None, ""
        if child is None:
            return
        child.kill()
        child.wait()
        if child.stdin is not None:
            child.stdin.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The base URL, "" when the server is not up."""
        return self._url

    def _launch(self, complaints: IO[bytes]) -> None:
        # -P: the child's own folder stays off its import path. A new session: Ctrl-C in a terminal and kill of our
        # process group reach only us. Its standard input ends when we do, however we end, and the child ends with it.
        self._child = subprocess.Popen(
            [sys.executable, "-P", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        if self._child.stdin is not None:
            try:
                self._child.stdin.write(json.dumps(self._settings) + "\n")
                self._child.stdin.flush()
            except BrokenPipeError:
                pass  # it died at once; _await_ready says why

    def _await_ready(self, complaints: IO[bytes]) -> str:
        child = self._child
        if child is None or child.stdout is None:
            raise ServerError("llama.cpp was stopped while it was starting")
        announcement = _Announcement(child.stdout)
        begin = time.monotonic()
        while not announcement.seen.wait(_POLL_S):
            waited = time.monotonic() - begin
            if waited > self._load_timeout_s:
                raise ServerError(
                    f"llama.cpp has not loaded {self.model} within {waited:.0f} s",
                    hint="take a smaller model or fewer slots",
                )
            if self._on_wait is not None:
                self._on_wait(waited)
        if announcement.url and _answers(announcement.url):
            return announcement.url
        child.kill()
        code = child.wait()
        complaints.seek(0)
        reason = _reason(complaints.read().decode("utf-8", "replace")) or f"its process ended with status {code}"
        raise ServerError(
            f"llama.cpp cannot serve {self.model}: {reason}",
            hint="check the file with: selfinstruct model verify; when memory is short, use fewer slots",
        )


class _Announcement:
    """Reads the child's output to its end, so that the pipe never fills; ``seen`` is set at the URL or at the end."""

    def __init__(self, output: IO[str]) -> None:
        self.seen = threading.Event()
        self.url = ""
        threading.Thread(target=self._read, args=(output,), name="llama-cpp-output", daemon=True).start()

    def _read(self, output: IO[str]) -> None:
        with output:
            for line in output:
                if line.startswith('{"url": '):
                    self.url = json.loads(line)["url"]
                    self.seen.set()
        self.seen.set()


def _answers(root: str) -> bool:
    """Whether /health says 200. http.client, because urllib would go through a proxy named in the environment."""
    address = urlsplit(root)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=10)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _reason(log: str) -> str:
    """The first complaints, which name the cause, or the last line; escaped, since a model file can say anything."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line.partition(" E ")[2] for line in lines if " E " in line][:2]
    return "; ".join(errors or lines[-1:]).encode("unicode_escape").decode("ascii")


def default_threads(system: Path = Path("/")) -> int:
    """Physical cores this process may use, less one, at least 1.

    llama.cpp's threads spin at barriers: one thread more than there are free cores made a busy 2-core machine ten times
    slower. Counts CPU affinity, hyper-thread siblings as one, and the CPU quota of the control group. ``system`` is the
    root under which /sys is read; where it tells nothing, logical CPUs are counted.
    """
    usable = os.sched_getaffinity(0) if sys.platform == "linux" else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in usable:
        siblings = system / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return max(1, min(len(cores), _quota(system)) - 1)


def _quota(system: Path) -> int:
    """Whole CPUs that the control group grants, a very large number without a limit (v2, then v1)."""
    group = system / "sys/fs/cgroup"
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu/cpu.cfs_period_us").read_text().strip()
    except (OSError, ValueError):
        return sys.maxsize
    return sys.maxsize if quota in ("max", "-1") else max(1, int(quota) // int(period))
