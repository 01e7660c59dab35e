"""The short form of the chaos suite (``make chaos`` runs the long one)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_promise_holds_in_a_short_chaos(environment: dict[str, str]) -> None:
    """Some promises are a matter of milliseconds, and other tests run beside this one: a violation that is not there
    when it is looked for again (1 in 12 runs on two shared cores) is printed and does not count."""
    suite = Path(__file__).parent / "chaos"
    for _ in range(2):
        ended = subprocess.run(
            [sys.executable, str(suite), "--short"], env={**os.environ, **environment}, capture_output=True, text=True
        )
        print(ended.stdout)
        if ended.returncode == 0:
            return
    pytest.fail(ended.stdout + ended.stderr)
