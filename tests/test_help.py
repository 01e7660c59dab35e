"""What ``--help`` says: on a terminal of 80 columns, and of a run whose defaults are its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from selfinstruct.cli.app import app


def commands(found: Any, name: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Every command by the words that call it."""
    if not hasattr(found, "commands"):
        return {name: found}
    inner = (commands(command, (*name, word)) for word, command in found.commands.items())
    return {words: command for some in inner for words, command in some.items()}


COMMANDS = commands(get_command(app))
WITH_EXAMPLES = [words for words, command in COMMANDS.items() if command.epilog]


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("words", WITH_EXAMPLES, ids=" ".join)
def test_no_line_of_an_example_is_broken_at_80_columns(words: tuple[str, ...], run: Any) -> None:
    shown = [line.strip() for line in run(*words, "--help").stdout.splitlines()]
    assert [line for line in COMMANDS[words].epilog.splitlines() if line.strip(" \b") not in shown] == []


def test_resume_names_no_default_of_a_new_run(run: Any) -> None:
    shown = " ".join(run("resume", "--help").stdout.split())
    assert "Rows to reach [as recorded]." in shown
    assert not any(default in shown for default in ("[100]", "[300]", "[0.01]", "[32;", "[OPENAI_API_KEY]"))
    assert "Rows to reach [100]." in run("generate", "--help").stdout


def test_json_is_promised_as_json_and_not_as_an_object(run: Any, tmp_path: Path) -> None:
    assert run("generate", tmp_path / "out", "--teacher", "scripted", "--num", 12).returncode == 0
    for name in ("versions", "show"):
        assert isinstance(json.loads(run(name, tmp_path / "out", "--json").stdout), list)
        assert "Print the result as JSON" in run(name, "--help").stdout
