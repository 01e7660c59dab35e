"""Whole runs with a teacher that fails. The long forms are in ``tests/chaos/faults.py``."""

from __future__ import annotations

import json
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tasks import by_prompt
from teacher import Reply, Teacher

sys.path.insert(0, str(Path(__file__).parent / "chaos"))
import faults

Start = Callable[..., Teacher]


def test_a_daily_limit_stops_the_run_until_it_is_over(run: Any, teacher: Start, tmp_path: Path) -> None:
    good, out = by_prompt(), tmp_path / "out"
    server = teacher(lambda body, n: good(body, n) if n < 8 else Reply(status=429, headers={"Retry-After": "7200"}))
    ended = run("generate", out, "--teacher", "mock", "--base-url", server.url, "--num", 500, "--concurrency", 4)
    assert ended.returncode == 4
    assert "7200 s" in ended.stderr
    assert "hint: resume after" in ended.stderr
    assert ended.stderr.strip().splitlines()[-1] == f"resume with: selfinstruct resume {out}"
    assert len(server.requests) <= 8 + 4
    assert json.loads(run("status", out, "--json").stdout)["requests"] == 8


def test_a_server_that_refuses_every_prompt_stops_the_run(run: Any, teacher: Start, tmp_path: Path) -> None:
    server = teacher(lambda body, n: Reply(status=422, text="no such parameter"))
    ended = run(
        "generate", tmp_path / "out", "--teacher", "mock", "--base-url", server.url, "--num", 500, "--concurrency", 4
    )
    assert ended.returncode == 4
    assert "no such parameter" in ended.stderr
    assert len(server.requests) <= 8 + 4


@pytest.mark.slow
@pytest.mark.parametrize("fault", [Reply(status=500), Reply(text=""), Reply(close=True)], ids=["500", "empty", "cut"])
def test_a_prompt_that_is_never_answered_is_given_up_told_and_asked_again(
    fault: Reply, run: Any, teacher: Start, tmp_path: Path
) -> None:
    good, poison, ill = by_prompt(), [], [True]

    def answer(body: dict[str, Any], n: int) -> Reply:
        said = json.dumps(body)
        poison.extend([said] if n == 9 else [])
        return fault if ill[0] and said in poison else good(body, n)

    server, out = teacher(answer, delay=0.05), tmp_path / "out"
    asked = ["--teacher", "mock", "--base-url", server.url, "--num", 400, "--concurrency", 4]
    ended = run("generate", out, *asked)
    assert ended.returncode == 4, ended.stderr
    assert "is given up for now, after 8 attempts" in ended.stderr
    assert "400 rows reached; 1 request was given up for now (400 of 400 rows)" in ended.stderr
    assert ended.stderr.strip().splitlines()[-1] == f"resume with: selfinstruct resume {out}"
    assert json.loads(run("versions", out, "--json").stdout)[-1]["rows"] == 400
    told = json.loads(run("status", out, "--json").stdout)
    assert (told["state"], told["given_up"]) == ("stopped", 1)
    assert sum(count for reason, count in told["lost"].items() if reason.startswith("given up: ")) == 1
    rows = {path.name: path.read_bytes() for path in out.glob("v*/*.parquet")}
    started, paid = time.monotonic(), len(server.requests)
    ended = run("resume", out)  # still ill: told again, and the run is as it was
    assert ended.returncode == 4, ended.stderr
    assert time.monotonic() - started < 15
    assert len(server.requests) == paid + 3
    assert json.loads(run("status", out, "--json").stdout)["rows"] == 400
    assert {path.name: path.read_bytes() for path in out.glob("v*/*.parquet")} == rows

    ill[0], paid = False, len(server.requests)
    ended = run("resume", out)
    assert ended.returncode == 0, ended.stderr
    assert "1 request that was given up: asked again" in ended.stderr
    assert len(server.requests) == paid + 1
    assert json.loads(run("status", out, "--json").stdout)["given_up"] == 0
    run("generate", tmp_path / "calm", *asked)
    newest = sorted(out.glob("v2/*.parquet"))
    assert [path.read_bytes() for path in newest] == [
        p.read_bytes() for p in sorted(tmp_path.glob("calm/v1/*.parquet"))
    ]
    assert run("verify", out).returncode == 0


def test_one_of_two_endpoints_that_refuses_the_key_stops_nothing(run: Any, teacher: Start, tmp_path: Path) -> None:
    refuses, serves = teacher(lambda body, n: Reply(status=401, text="wrong key")), teacher(by_prompt())
    urls = f"{refuses.url},{serves.url}"
    ended = run("generate", tmp_path / "out", "--teacher", "mock", "--base-url", urls, "--num", 60, "--concurrency", 4)
    assert ended.returncode == 0, ended.stderr
    assert "wrong key; the other endpoints go on" in ended.stderr
    assert len(refuses.requests) <= 4


@pytest.mark.slow
@pytest.mark.parametrize("concurrency", [8, 64])
def test_refusals_that_come_before_the_first_answers_stop_nothing(
    concurrency: int, run: Any, teacher: Start, tmp_path: Path
) -> None:
    good = by_prompt()

    def answer(body: dict[str, Any], n: int) -> Reply:
        if zlib.crc32(json.dumps(body).encode()) % 5 == 0:
            return Reply(status=400, json={"error": {"message": "not this one"}})
        reply = good(body, n)
        reply.delay = 0.4
        return reply

    server = teacher(answer)
    asked = ["--teacher", "mock", "--base-url", server.url, "--num", 400, "--concurrency", concurrency]
    ended = run("generate", tmp_path / "out", *asked)
    assert ended.returncode == 0, ended.stderr


def test_an_endpoint_that_refuses_every_prompt_is_closed_where_another_answers(
    run: Any, teacher: Start, tmp_path: Path
) -> None:
    refuses, serves = teacher(lambda body, n: Reply(status=400, text="unknown parameter")), teacher(by_prompt())
    asked = ["--teacher", "mock", "--base-url", f"{refuses.url},{serves.url}", "--num", 300, "--concurrency", 8]
    ended = run("generate", tmp_path / "out", *asked)
    assert ended.returncode == 0, ended.stderr
    assert "unknown parameter; the other endpoints go on" in ended.stderr
    assert len(refuses.requests) <= 16 + 8


def test_resume_takes_any_setting(run: Any, teacher: Start, tmp_path: Path) -> None:
    server, out = teacher(lambda body, n: Reply(status=503)), tmp_path / "out"
    asked = ["--teacher", "mock", "--base-url", server.url, "--num", 8, "--set", "patience=0.1"]
    assert run("generate", out, *asked).returncode == 4
    ended = run("resume", out, "--set", "patience=0.2", "--set", "max_minutes=5")
    assert ended.returncode == 4
    assert "patience: 0.2" in (out / "run" / "config.yaml").read_text()
    assert run("resume", out, "--set", "temperature=0.3").returncode == 2


@pytest.mark.slow
def test_refused_prompts_are_counted_by_reason_and_asked_once() -> None:
    promise, tried, violations = faults.refused_prompts()
    assert (tried, violations) == (len(faults.REFUSED), []), promise


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("check", faults.SHORT)
def test_the_promises_about_teachers_hold(check: Callable[[], faults.Checked]) -> None:
    promise, tried, violations = check()
    assert tried
    assert not violations, promise
