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
    suite = Path(__file__).parent / "chaos"
    ended = subprocess.run(
        [sys.executable, str(suite), "--short"], env={**os.environ, **environment}, capture_output=True, text=True
    )
    print(ended.stdout)
    assert ended.returncode == 0, ended.stdout + ended.stderr
