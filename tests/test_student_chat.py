"""The terminal: commands, history, and a model that cannot steer it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the student room needs torch")
pytest.importorskip("transformers", reason="the student room needs transformers")

import typer
from student_tiny import tiny_model, write_rows
from typer.testing import CliRunner

from selfinstruct.cli import infer, merge, serve
from selfinstruct.errors import UsageError
from selfinstruct.student.infer import chat
from selfinstruct.student.infer.chat import Chat
from selfinstruct.student.models.weights import load

APP = typer.Typer()
for group in (infer, merge, serve):
    group.register(APP)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny", initializer_range=0.2)


def test_chat_remembers_until_reset(folder: Path) -> None:
    talk = Chat(load(str(folder)), max_new_tokens=12)
    first, second = ("".join(talk.say("red")) for _ in range(2))
    assert first != second  # the second turn saw the first
    talk.reset()
    assert "".join(talk.say("red")) == first
    talk.close()


def test_a_reply_that_is_broken_off_is_remembered_as_far_as_it_came(folder: Path) -> None:
    talk = Chat(load(str(folder)), max_new_tokens=200)
    pieces = talk.say("red")
    seen = next(pieces) + next(pieces)
    pieces.close()
    assert talk._turns[-1]["content"] == seen.strip()
    assert "".join(talk.say("blue")) != ""
    talk.close()


def test_old_turns_are_forgotten_when_the_room_ends_and_the_user_is_told(folder: Path) -> None:
    forgotten: list[int] = []
    talk = Chat(load(str(folder)), max_new_tokens=4, on_forget=forgotten.append)
    for _ in range(6):
        list(talk.say("many words " * 12))
    assert forgotten
    told, before = list(forgotten), list(talk._turns)
    with pytest.raises(UsageError, match="too long"):
        list(talk.say("many words " * 300))
    assert forgotten == told
    assert talk._turns == before
    list(talk.say("short"))
    assert [turn["content"] for turn in talk._turns[-4:-1]] == [*(turn["content"] for turn in before[-2:]), "short"]
    talk.close()


def test_ctrl_c_while_a_message_is_read_leaves_the_conversation_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Chat(load(str(folder)), max_new_tokens=4)
    list(talk.say("red"))
    before = list(talk._turns)

    def interrupted(*_: object) -> list[int]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chat, "encode_dialogue", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(talk.say("blue"))
    assert talk._turns == before
    list(talk.say("green"))
    assert [turn["role"] for turn in talk._turns] == ["user", "assistant"] * 2
    talk.close()


def test_bytes_that_are_no_text_do_not_end_the_conversation(folder: Path) -> None:
    ended = CliRunner().invoke(APP, ["chat", str(folder), "--max-new-tokens", "4"], input=b"caf\xe9\nred\n/exit\n")
    assert ended.exit_code == 0, ended.output
    assert "no UTF-8" in ended.stderr


def test_control_characters_of_a_model_do_not_reach_the_terminal(folder: Path) -> None:
    ended = CliRunner().invoke(APP, ["chat", str(folder), "--max-new-tokens", "60"], input="red\n/reset\nred\n/exit\n")
    assert ended.exit_code == 0, ended.output
    assert all(c.isprintable() or c == "\n" for c in ended.stdout)


def test_infer_and_merge_speak_json(folder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 3)
    command = ["infer", str(folder), "--input", str(rows), "-o", str(tmp_path / "out.jsonl"), "--max-new-tokens", "3"]
    ended = CliRunner().invoke(APP, [*command, "--json"])
    assert ended.exit_code == 0, ended.output
    assert json.loads(ended.stdout)["rows"] == 3
    ended = CliRunner().invoke(APP, ["merge", str(folder), "-o", str(tmp_path / "merged"), "--json"])
    assert json.loads(ended.stdout)["out"] == str(tmp_path / "merged")
    plan = CliRunner().invoke(APP, ["infer", str(folder), "--plan"])
    assert "12 GB" in plan.stdout
    assert CliRunner().invoke(APP, ["infer", str(folder)]).exit_code == 2


def test_serve_beyond_loopback_without_a_token_is_refused(folder: Path) -> None:
    ended = CliRunner().invoke(APP, ["serve", str(folder), "--host", "192.0.2.1"])
    assert ended.exit_code == 2
    assert "SELFINSTRUCT_SERVE_TOKEN" in ended.stderr


@pytest.mark.timeout(60)
def test_serve_says_its_address_and_ends_at_sigterm(folder: Path) -> None:
    code = "import typer; from selfinstruct.cli import serve; a = typer.Typer(); serve.register(a); a()"
    command = [sys.executable, "-c", code, "serve", str(folder), "--port", "0", "--context", "64"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        assert line.startswith("serving student at http://127.0.0.1:")
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=30) == 0
