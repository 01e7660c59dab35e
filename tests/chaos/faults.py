"""What a teacher can do to a run: named faults, and checks that each promise about them holds.

A check returns (promise, how often it was tried, violations). ``python tests/chaos/faults.py [name ...]`` runs them.
"""

from __future__ import annotations

import contextlib
import email.utils
import gzip
import io
import json
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tasks import by_prompt
from teacher import Reply, Teacher

Checked = tuple[str, int, list[str]]
Answer = Callable[[dict[str, Any], int], "str | Reply"]


def _error(message: str = "no", **words: Any) -> dict[str, Any]:
    return {"error": {"message": message, **words}}


def _message(content: Any) -> dict[str, Any]:
    return {"choices": [{"finish_reason": "stop", "message": {"content": content}}]}


def _wait(value: str, status: int = 429, name: str = "Retry-After") -> Reply:
    return Reply(status=status, headers={name: value})


DEEP, PAST = b"[" * 100_000, "Mon, 01 Jan 2001 00:00:00 GMT"
GOOD = json.dumps(_message("1. Instruction: Say something.")).encode()
GZIP = {"Content-Encoding": "gzip"}

TRANSIENT: dict[str, Callable[[], Reply]] = {
    **{f"status {n}": (lambda n=n: Reply(status=n)) for n in (408, 409, 425, 429, 500, 502, 503, 504, 520, 524, 529)},
    "500 HTML": lambda: Reply(status=500, body=b"<html>oops</html>"),
    "500 broken JSON": lambda: Reply(status=500, body=b'{"error"'),
    "500 deep JSON": lambda: Reply(status=500, body=DEEP),
    "500 empty": lambda: Reply(status=500, body=b""),
    "429 seconds": lambda: _wait("1"),
    "429 float": lambda: _wait("0.3"),
    "429 milliseconds": lambda: _wait("300", name="Retry-After-Ms"),
    "429 date": lambda: _wait(email.utils.formatdate(time.time() + 1, usegmt=True)),
    "429 garbage": lambda: _wait("soon"),
    "429 negative": lambda: _wait("-3"),
    "429 zero": lambda: _wait("0"),
    "503 waits": lambda: _wait("0.3", status=503),
    "200 error": lambda: Reply(json=_error("overloaded", type="server_error")),
    "200 error text": lambda: Reply(json={"error": "busy"}),
    "200 rate limit": lambda: Reply(json=_error("slow", code="rate_limit_exceeded")),
    "200 HTML": lambda: Reply(body=b"<html>busy</html>"),
    "200 empty": lambda: Reply(body=b""),
    "200 cut": lambda: Reply(body=GOOD[:30]),
    "200 deep": lambda: Reply(body=DEEP),
    "200 NULs": lambda: Reply(body=b"\0" * 100),
    "200 list": lambda: Reply(body=b"[]"),
    "200 no choices": lambda: Reply(json={"choices": []}),
    "200 null content": lambda: Reply(json=_message(None)),
    "200 list content": lambda: Reply(json=_message([{"text": "x"}])),
    "200 number content": lambda: Reply(json=_message(3)),
    "200 blank": lambda: Reply(text=" "),
    "bad gzip": lambda: Reply(body=b"no", headers=GZIP),
    "cut gzip": lambda: Reply(body=gzip.compress(GOOD)[:-5], headers=GZIP),
    "gzip bomb": lambda: Reply(body=_bomb(), headers=GZIP),
    "connection cut": lambda: Reply(close=True),
    "hang": lambda: Reply(delay=30.0),
}  # fmt: skip

FATAL: dict[str, Reply] = {
    "401": Reply(status=401),
    "402": Reply(status=402),
    "403": Reply(status=403),
    "404 model": Reply(status=404, json=_error("no such model")),
    "insufficient_quota": Reply(status=429, json=_error(code="insufficient_quota")),
}

REFUSED: dict[str, Reply] = {
    "400": Reply(status=400),
    "422": Reply(status=422),
    "context": Reply(status=400, json=_error(code="context_length_exceeded")),
    "policy": Reply(status=400, json=_error(code="content_policy_violation")),
}


def _bomb() -> bytes:
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(64)) + packer.flush()


@dataclass
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str
    seconds: float


def command(*arguments: object) -> Ended:
    """Run the program in this process."""
    from selfinstruct.cli.app import app

    out, err, start = io.StringIO(), io.StringIO(), time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            app([str(argument) for argument in arguments])
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
    return Ended(code, out.getvalue(), err.getvalue(), time.monotonic() - start)


def generate(server: Teacher, out: Path, *arguments: object, rows: int = 120) -> Ended:
    """Generate against a server, 16 requests in flight unless said otherwise."""
    given = ["--num", rows, "--concurrency", 16, *arguments]
    return command("generate", out, "--teacher", "mock", "--base-url", server.url, *given)


def parquet_bytes(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.parquet"))}


def _key(body: dict[str, Any]) -> str:
    return json.dumps(body, sort_keys=True)


def stumbling(fault: Callable[[], Reply], share: float, good: Answer) -> Answer:
    """A teacher that meets a share of the first attempts with a fault."""
    rng, tried, lock = random.Random(5), set(), threading.Lock()

    def answer(body: dict[str, Any], number: int) -> str | Reply:
        with lock:
            first = _key(body) not in tried
            tried.add(_key(body))
            strikes = first and rng.random() < share
        return fault() if strikes else good(body, number)

    return answer


def transient_faults(names: list[str] | None = None) -> Checked:
    """F1, F5: each fault at 15 % of the first attempts; the same bytes as without."""
    bad = []
    with tempfile.TemporaryDirectory() as folder, Teacher(by_prompt(2)) as calm:
        root = Path(folder)
        generate(calm, root / "calm")
        wanted = parquet_bytes(root / "calm")
        names = names or list(TRANSIENT)
        for n, name in enumerate(names):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            with Teacher(stumbling(TRANSIENT[name], 0.15, by_prompt(2))) as server:
                ended = generate(server, root / f"{n}", "--timeout", 2)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            if ended.code or "Traceback" in ended.stderr or parquet_bytes(root / f"{n}") != wanted:
                bad.append(f"{name}: exit {ended.code}, {ended.stderr[-200:]!r}")
            if grown > 100_000 or ended.seconds > 60:
                bad.append(f"{name}: {grown / 1000:.0f} MB, {ended.seconds:.0f} s")
    return f"each transient fault at 15 %: fault-free data ({len(names)} faults)", len(names), bad


def pauses(share: float = 0.03) -> Checked:
    """F2: no request starts before a wait asked for is over; without a usable wait, at least 0.1 s pass."""
    forms: dict[str, tuple[Callable[[], Reply], float]] = {
        "seconds": (lambda: _wait("1"), 1.0),
        "float": (lambda: _wait("0.4"), 0.4),
        "milliseconds": (lambda: _wait("400", name="Retry-After-Ms"), 0.4),
        "date": (lambda: _wait(email.utils.formatdate(time.time() + 2, usegmt=True)), 1.0),
        **{text: ((lambda text=text: _wait(text)), 0.0) for text in ("soon", "-1", "0", PAST)},
    }  # fmt: skip
    bad, tried = [], 0
    for name, (fault, pause) in forms.items():
        log: list[tuple[float, str]] = []
        refused: list[tuple[float, str]] = []
        good, rng, lock = by_prompt(2), random.Random(2), threading.Lock()

        def answer(
            body: dict[str, Any], number: int, *, log: Any = log, refused: Any = refused, good: Answer = good,
            rng: random.Random = rng, lock: Any = lock, fault: Callable[[], Reply] = fault,
        ) -> str | Reply:  # fmt: skip
            with lock:
                now = time.monotonic()
                log.append((now, _key(body)))
                if number > 20 and len(refused) < 6 and rng.random() < share * 3:
                    refused.append((now, _key(body)))
                    return fault()
            return good(body, number)

        with tempfile.TemporaryDirectory() as folder, Teacher(answer) as server:
            ended = generate(server, Path(folder) / "out", rows=200)
        tried += len(refused)
        if ended.code or not refused:
            bad.append(f"{name}: exit {ended.code}, {len(refused)} refused, {ended.stderr[-200:]!r}")
        for at, key in refused:
            # What was on its way when the refusal arrived is no violation: 50 ms for that, on shared cores.
            early = sum(1 for then, _ in log if at + 0.05 < then < at + pause - 0.001)
            again = [then - at for then, other in log if other == key and then > at]
            if early or (again and min(again) < 0.1):
                bad.append(f"{name}: {early} requests during the pause, again after {min(again, default=0):.3f} s")
    return "Retry-After in every form holds all workers", tried, bad


def fatal_answers() -> Checked:
    """F3: seen by at most in-flight + 1 requests, quick end, paid work kept, resume finishes."""
    bad = []
    for name, reply in FATAL.items():
        good, seen, broken = by_prompt(2), [0], [True]

        def answer(
            body: dict[str, Any], number: int, *, good: Answer = good, seen: list[int] = seen,
            broken: list[bool] = broken, reply: Reply = reply,
        ) -> str | Reply:  # fmt: skip
            if broken[0] and number >= 40:
                seen[0] += 1
                return reply
            return good(body, number)

        with tempfile.TemporaryDirectory() as folder, Teacher(answer, delay=0.02) as server:
            out = Path(folder) / "out"
            ended = generate(server, out, rows=150)
            counts = json.loads(command("status", out, "--json").stdout)
            broken[0] = False
            again = command("resume", out)
            paid = [_key(body) for body in server.requests]
        repeated = len(paid) - len(set(paid)) - seen[0]
        if ended.code != 3 or seen[0] > 17 or counts["requests"] < 40 or ended.seconds > 5:
            bad.append(f"{name}: exit {ended.code}, {seen[0]} saw it, {counts['requests']} kept, {ended.seconds:.1f} s")
        if again.code or repeated > 0:
            bad.append(f"{name}: resume exit {again.code}, {repeated} paid twice")
    return "fatal answers: at most in-flight + 1 requests see one, resume finishes", len(FATAL), bad


def refused_prompts() -> Checked:
    """F4: refused for good is never asked again, counted by reason, and the run goes on."""
    bad = []
    for name, reply in REFUSED.items():
        good, refused = by_prompt(2), []

        def answer(
            body: dict[str, Any],
            number: int,
            *,
            good: Answer = good,
            refused: list[str] = refused,
            reply: Reply = reply,
        ) -> str | Reply:
            if zlib.crc32(_key(body).encode()) % 5 == 0:
                refused.append(_key(body))
                return reply
            return good(body, number)

        with tempfile.TemporaryDirectory() as folder, Teacher(answer) as server:
            ended = generate(server, Path(folder) / "out")
            counts = json.loads(command("status", Path(folder) / "out", "--json").stdout)
        counted = sum(count for reason, count in counts["lost"].items() if reason.startswith("refused: "))
        if ended.code or len(set(refused)) != len(refused) or not 0 < counted <= len(refused):
            bad.append(f"{name}: exit {ended.code}, {len(refused)} refused, {counts['lost']}")
    return "prompts refused for good: asked once, counted, skipped", len(REFUSED), bad


def outage(seconds: float = 8.0, kinds: tuple[str, ...] = ("503", "cut", "html")) -> Checked:
    """F6: an outage of the whole teacher in the middle of a run."""
    faults = {"503": Reply(status=503), "cut": Reply(close=True), "html": Reply(body=b"<html>down for work</html>")}
    bad = []
    with tempfile.TemporaryDirectory() as folder, Teacher(by_prompt(2)) as calm:
        generate(calm, Path(folder) / "calm", rows=200)
        for kind in kinds:
            good, began, into = by_prompt(2), [0.0], [0]

            def answer(
                body: dict[str, Any], number: int, *, good: Answer = good, began: list[float] = began,
                into: list[int] = into, kind: str = kind,
            ) -> str | Reply:  # fmt: skip
                if number == 60:
                    began[0] = time.monotonic()
                if began[0] and time.monotonic() < began[0] + seconds:
                    into[0] += 1
                    return faults[kind]
                return good(body, number)

            out = Path(folder) / kind
            with Teacher(answer) as server:
                ended = generate(server, out, rows=200)
            late = time.monotonic() - began[0] - seconds
            print(
                f"  outage {kind} {seconds:g} s: {into[0]} requests into it, done {late:.1f} s after", file=sys.stderr
            )
            if ended.code or into[0] > 160 or late > 15 or parquet_bytes(out) != parquet_bytes(Path(folder) / "calm"):
                bad.append(f"{kind}: exit {ended.code}, {into[0]} into the outage, {late:.1f} s late")
    return f"an outage of {seconds:g} s is survived: same data, <= 10 x concurrency requests into it", len(kinds), bad


def rate_limit(seconds: float = 25.0, waits: tuple[str | None, ...] = (None, "0.5", "1")) -> Checked:
    """F7: a teacher limited to half of what 16 workers could do."""
    rate, latency, bad = 80.0, 0.1, []
    for wait in waits:
        good, tokens, log, lock = by_prompt(1), [rate, time.monotonic()], [], threading.Lock()
        start = time.monotonic()

        def answer(
            body: dict[str, Any], number: int, *, good: Answer = good, tokens: list[float] = tokens,
            log: list[tuple[float, bool]] = log, lock: Any = lock, wait: str | None = wait, start: float = start,
        ) -> str | Reply:  # fmt: skip
            with lock:
                now = time.monotonic()
                tokens[0], tokens[1] = min(rate, tokens[0] + (now - tokens[1]) * rate), now
                accepted = tokens[0] >= 1
                tokens[0] -= accepted
                log.append((now - start, accepted))
            if not accepted:
                return Reply(status=429, headers={"Retry-After": wait} if wait else {})
            reply = good(body, number)
            assert isinstance(reply, Reply)
            reply.delay = latency
            return reply

        with tempfile.TemporaryDirectory() as folder, Teacher(answer) as server:
            out = Path(folder) / "out"
            ended = generate(
                server,
                out,
                "--max-minutes",
                seconds / 60,
                "--tasks",
                1,
                "--shots",
                1,
                "--min-acceptance",
                0,
                rows=10**6,
            )
        settled = [accepted for at, accepted in log if 5 + log[0][0] < at < seconds]
        goodput = sum(settled) / (seconds - 5 - log[0][0])
        refused = 1 - sum(settled) / max(len(settled), 1)
        print(
            f"  limit {rate:.0f}/s, Retry-After {wait}: goodput {goodput / rate:.0%}, refused {refused:.1%}",
            file=sys.stderr,
        )
        if ended.code != 4 or goodput < 0.8 * rate or refused > 0.2:
            bad.append(f"Retry-After {wait}: exit {ended.code}, goodput {goodput / rate:.0%}, refused {refused:.0%}")
    return "limited to half the rate: refused <= 20 %, goodput >= 80 %", len(waits), bad


def hangs() -> Checked:
    """F8: 2 % of all attempts never answer."""
    rng, good, lock = random.Random(9), by_prompt(1), threading.Lock()

    def answer(body: dict[str, Any], number: int) -> str | Reply:
        with lock:
            return Reply(delay=600.0) if rng.random() < 0.02 else good(body, number)

    with tempfile.TemporaryDirectory() as folder, Teacher(by_prompt(1)) as calm, Teacher(answer) as server:
        reference = generate(calm, Path(folder) / "calm", rows=150)
        ended = generate(server, Path(folder) / "out", "--timeout", 3, rows=150)
    over = ended.seconds - reference.seconds
    bad = [] if ended.code == 0 and over <= 9 else [f"exit {ended.code}, {over:.1f} s over the reference"]
    return "2 % of the requests hang: over in reference + 3 deadlines", 1, bad


def signals_while_waiting(names: tuple[str, ...] = ()) -> Checked:
    """R4, F8: a signal during a pause, a backoff or an outage ends the run soon, and nothing is sent after it."""
    situations: dict[str, Reply] = {
        "paused": _wait("60"),
        "backing off": Reply(status=429),
        "outage": Reply(status=503),
        "working": Reply(),
    }
    bad = []
    situations = {name: reply for name, reply in situations.items() if not names or name in names}
    for name, reply in situations.items():
        for number in (signal.SIGINT, signal.SIGTERM):
            good, times = by_prompt(1), []

            def answer(
                body: dict[str, Any], n: int, *, good: Answer = good, times: list[float] = times, reply: Reply = reply
            ) -> str | Reply:
                times.append(time.monotonic())
                return good(body, n) if n < 20 or reply.status == 200 else reply

            with tempfile.TemporaryDirectory() as folder, Teacher(answer, delay=0.04) as server:
                program = "from selfinstruct.cli.main import run; run()"
                arguments = [
                    "generate",
                    f"{folder}/out",
                    "--teacher",
                    "mock",
                    "--base-url",
                    server.url,
                    "--num",
                    "99999",
                ]
                child = subprocess.Popen(
                    [sys.executable, "-c", program, *arguments], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
                )
                while len(times) < 40 and child.poll() is None:
                    time.sleep(0.02)
                time.sleep(0.7)
                struck = time.monotonic()
                child.send_signal(number)
                said = child.communicate(timeout=30)[1].decode()
                gone = time.monotonic() - struck
            late = sum(then > struck + 0.5 for then in times)
            if child.returncode != 128 + number or gone > 4 or late or "Traceback" in said:
                bad.append(f"{name}, {number.name}: exit {child.returncode} after {gone:.1f} s, {late} sent late")
            if not re.search(r"resume with: .*\n\Z", said):
                bad.append(f"{name}, {number.name}: the last line is {said[-100:]!r}")
    return "signals while working, paused, backing off or in an outage", 2 * len(situations), bad


def several_endpoints() -> Checked:
    """One of two endpoints dies, hangs, limits, refuses or talks nonsense in the middle; nothing is lost."""
    ills = {
        "cut": Reply(close=True),
        "hangs": Reply(delay=600.0),
        "limits": _wait("2"),
        "401": Reply(status=401),
        "500": Reply(status=500),
        "HTML": Reply(body=b"<html>down</html>"),
        "refuses every prompt": Reply(status=400),
    }
    bad = []
    with tempfile.TemporaryDirectory() as folder, Teacher(by_prompt(2)) as calm:
        generate(calm, Path(folder) / "calm", rows=200)
        wanted = parquet_bytes(Path(folder) / "calm")
        for name, reply in ills.items():
            good = by_prompt(2)

            def answer(body: dict[str, Any], number: int, *, good: Answer = good, reply: Reply = reply) -> str | Reply:
                return reply if number >= 20 else good(body, number)

            out = Path(folder) / name.replace(" ", "-")
            with Teacher(answer) as ill, Teacher(by_prompt(2)) as well:
                urls = f"{ill.url},{well.url}"
                asked = ["generate", out, "--teacher", "mock", "--base-url", urls, "--num", 200, "--concurrency", 16]
                ended = command(*asked, "--timeout", 3)
            same = parquet_bytes(out) == wanted
            if ended.code or (not same and name != "refuses every prompt"):
                bad.append(f"{name}: exit {ended.code}, same data: {same}, {ended.stderr[-200:]!r}")
    return "one of two endpoints fails in any way: the run goes on", len(ills), bad


def prompts_never_answered() -> Checked:
    """Nothing is given up in silence: told, counted, exit 4, asked again on resume, and then the fault-free data."""
    ills = {"500": Reply(status=500), "empty": Reply(text=""), "cut": Reply(close=True), "429": Reply(status=429)}
    bad = []
    with tempfile.TemporaryDirectory() as folder, Teacher(by_prompt(2)) as calm:
        generate(calm, Path(folder) / "calm", rows=300)
        wanted = parquet_bytes(Path(folder) / "calm")
        for name, reply in ills.items():
            good, poison, ill = by_prompt(2), set(), [True]

            def answer(
                body: dict[str, Any], number: int, *, good: Answer = good, poison: set[str] = poison,
                ill: list[bool] = ill, reply: Reply = reply,
            ) -> str | Reply:  # fmt: skip
                if number in (7, 30):
                    poison.add(_key(body))
                return reply if ill[0] and _key(body) in poison else good(body, number)

            out = Path(folder) / name
            with Teacher(answer, delay=0.03) as server:
                ended = generate(server, out, rows=300)
                told = json.loads(command("status", out, "--json").stdout)
                ill[0] = False
                again = command("resume", out)
            newest = {
                path.partition("/")[2]: content for path, content in parquet_bytes(out).items() if path[:2] == "v2"
            }
            if (
                ended.code != 4
                or told["given_up"] != 2
                or told["rows"] != 300
                or "given up for now" not in ended.stderr
            ):
                bad.append(f"{name}: exit {ended.code}, {told['given_up']} given up, {ended.stderr[-200:]!r}")
            if again.code or newest != {path.partition("/")[2]: content for path, content in wanted.items()}:
                bad.append(f"{name}: resume exit {again.code}, other data")
    return "a prompt never answered is given up aloud, and asked again on resume", len(ills), bad


SHORT: list[Callable[[], Checked]] = [
    lambda: transient_faults(["429 milliseconds", "200 deep", "connection cut", "gzip bomb"]),
    fatal_answers,
    refused_prompts,
    lambda: outage(3.0, ("503",)),
    lambda: signals_while_waiting(("paused", "working")),
]
FULL: list[Callable[[], Checked]] = [
    transient_faults,
    pauses,
    fatal_answers,
    refused_prompts,
    outage,
    lambda: outage(60.0, ("503", "cut")),
    rate_limit,
    hangs,
    several_endpoints,
    prompts_never_answered,
    signals_while_waiting,
]

if __name__ == "__main__":
    chosen = [check for check in FULL if getattr(check, "__name__", "") in sys.argv[1:]] or FULL
    for check in chosen:
        promise, tried, violations = check()
        print(f"{promise}: {tried} tried, {len(violations)} violations", *violations, sep="\n    ", flush=True)
