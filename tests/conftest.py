"""Fixtures for all tests. No socket beyond loopback, here and in every command that a test starts."""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"

# There is a worker a core: threads of torch would wait for each other, five times as long in all.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent / "guard"))
import sitecustomize  # noqa: E402, F401  (installs the guard in this process; commands get it by PYTHONPATH)

Run = Callable[..., "Ended"]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No setting, key or cache of the person who runs the tests has a part in them."""
    for name in list(os.environ):
        if name.startswith(("SELFINSTRUCT_", "OPENAI_")) and name != "SELFINSTRUCT_MODELS":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("hf")))


@pytest.fixture
def command() -> list[str]:
    """How to start the program."""
    return [sys.executable, "-c", "from selfinstruct.cli.main import run; run()"]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of started commands, with the guard against foreign sockets."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "guard"))
    return dict(os.environ)


@dataclass
class Ended:
    """How a command ended and what it said."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the program to its end, in this process: ``run("status", out)``; variables as keywords."""

    def start(*arguments: object, **env: str) -> Ended:
        from selfinstruct.cli.app import app

        out, err = io.StringIO(), io.StringIO()
        with monkeypatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            for name, value in env.items():
                patch.setenv(name, value)
            try:
                app([str(argument) for argument in arguments])
                code = 0
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        return Ended(code, out.getvalue(), err.getvalue())

    return start


@pytest.fixture(scope="session")
def alpaca_rows() -> list[dict[str, str]]:
    """The 52,002 released rows, for tests that need real text."""
    path = SHARED / "alpaca_52k.jsonl.gz"
    if not path.exists():
        pytest.skip("the released 52K rows are not on this machine")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture
def teacher() -> Iterator[Any]:
    """Start HTTP teachers: ``teacher(answer)``; all are stopped after the test."""
    from teacher import Teacher

    started = []

    def start(answer: Any, **options: Any) -> Teacher:
        server = Teacher(answer, **options)
        server.__enter__()
        started.append(server)
        return server

    yield start
    for server in started:
        server.__exit__(None, None, None)
