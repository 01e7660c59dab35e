"""Whole runs with a teacher that fails. The long forms are in ``tests/chaos/faults.py``."""

from __future__ import annotations

import json
import sys
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
