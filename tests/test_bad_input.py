"""Every wrong input gets one clear message with a remedy and the right exit code; nothing is sent or overwritten."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tasks import by_prompt
from teacher import Reply, Teacher

Start = Callable[..., Teacher]


def refused(ended: Any, code: int, *words: str) -> None:
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    for word in words:
        assert word in ended.stderr, ended.stderr


@pytest.fixture
def unreachable() -> str:
    """An address where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/v1"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--shotz", "3"), ("shotz",)),
        (("--num", "none"), ("num",)),
        (("--num", "0"), ("num", "command line")),
        (("--temperature", "9"), ("temperature",)),
        (("--language", "xx"), ("language", "en")),
        (("--method", "evol"), ("method", "alpaca")),
        (("--set", "shotz=3"), ("shotz", "did you mean 'shots'")),
        (("--set", "shots"), ("--set", "=")),
        (("--teacher", "my-model"), ("my-model", "--base-url")),
        (("--base-url", "http://127.0.0.1:1/v1"), ("--teacher",)),
        (("--teacher", "local:smollm2", "--base-url", "http://127.0.0.1:1/v1"), ("--base-url", "local")),
        (("--teacher", "x", "--base-url", "127.0.0.1:1"), ("base_url", "http")),
        (("--config", "missing.yaml"), ("missing.yaml",)),
        (("--seeds", "missing.jsonl"), ("missing.jsonl",)),
        (("--teacher", "scripted:missing.jsonl"), ("missing.jsonl",)),
        (("--teacher", "scripted", "--shots", "49", "--seeds", "three.jsonl"), ("49", "--shots")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_wrong_flags_and_settings(
    arguments: tuple[str, ...], words: tuple[str, ...], run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seed = {"instruction": "Name the river that runs through Lisbon.", "instances": [{"input": "", "output": "Tagus"}]}
    Path("three.jsonl").write_text("\n".join(json.dumps(seed) for _ in range(3)))
    refused(run("generate", "out", *arguments), 2, *words)
    assert not Path("out/v1").exists()
    assert not Path("out/run/journal.sqlite").exists()


LONG = "x" * 300


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", LONG, "--teacher", "scripted"),
        ("generate", "out", "--teacher", "scripted", "--seeds", LONG),
        ("generate", "out", "--teacher", "scripted", "--decontaminate", f"{LONG}.jsonl"),
        ("generate", "out", "--teacher", "scripted", "--config", LONG),
        ("generate", "out", "--teacher", f"local:{'x' * 280}.gguf"),
        ("generate", "out", "--teacher", "local:~nobody-of-this-name/x.gguf"),
        ("generate", "out", "--teacher", "scripted", "--set", f"seeds={LONG}"),
        *((name, LONG) for name in ("resume", "status", "publish", "versions", "show", "verify")),
        ("seeds", "check", LONG),
        ("scrub", f"{LONG}.jsonl"),
        ("scrub", "rows.jsonl", "-o", f"{LONG}.jsonl"),
        ("dedup", f"{LONG}.jsonl", "-o", "new.jsonl"),
        ("model", "verify", f"{LONG}.gguf"),
    ],
    ids=lambda arguments: " ".join(arguments).replace(LONG, "LONG")[:60],
)
def test_a_path_that_cannot_be_is_wrong_usage(
    arguments: tuple[str, ...], run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"instruction": "a", "input": "", "output": "b"}\n')
    refused(run(*arguments), 2, "error: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


@pytest.mark.parametrize(
    "arguments",
    [
        (b"out\xff", b"--teacher", b"scripted"),
        (b"out", b"--teacher", b"\xff\xfe"),
        (b"out", b"--teacher", b"x", b"--base-url", b"http://\xff/v1"),
        (b"out", b"--teacher", b"scripted", b"--seeds", b"s\xff.jsonl"),
        (b"out", b"--teacher", b"scripted", b"--set", b"seeds=\xff"),
    ],
)
def test_an_argument_that_is_not_utf8_is_refused_before_anything_is_sent(
    arguments: tuple[bytes, ...], command: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    ended = subprocess.run(
        [*command, "generate", *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    refused(ended, 2, "is not UTF-8")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "proxy",
    ["garbage://user:hidden@host", "socks4://host:1", "http://host:99999", "http://a..b:1", "http://[::1", "host:abc"],
)
def test_a_proxy_that_cannot_be_used_is_named_without_its_password(proxy: str, run: Any, tmp_path: Path) -> None:
    flags = ("--teacher", "x", "--base-url", "https://teacher.example/v1")
    for name in ("https_proxy", "http_proxy", "all_proxy"):
        ended = run("generate", tmp_path / "out", *flags, **{name: proxy})
        refused(ended, 2, f"the proxy in {name.upper()}")
        assert "hidden" not in ended.stderr
    assert not list(tmp_path.iterdir())


def test_a_slip_in_the_name_of_a_variable_is_told(run: Any) -> None:
    said = run(
        "config", "show", SELFINSTRUCT_TEMPRATURE="0.5", SELFINSTRUCT_SHOTS="4", SELFINSTRUCT_SERVE_TOKEN="x",
        SELFINSTRUCT_MODELS="/tmp", SELFINSTRUCT_ZZZ="1",
    )  # fmt: skip
    assert said.returncode == 0
    assert said.stderr.splitlines() == [
        "warning: the variable SELFINSTRUCT_TEMPRATURE is ignored; did you mean SELFINSTRUCT_TEMPERATURE?",
        "warning: the variable SELFINSTRUCT_ZZZ is ignored",
    ]
    assert "shots: 4" in said.stdout


@pytest.mark.parametrize("seconds", [0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_at_any_time_is_told_in_words(
    times: int, seconds: float, command: list[str], environment: dict[str, str], teacher: Start, tmp_path: Path
) -> None:
    server = teacher(lambda body, n: Reply(delay=0.2, text="nothing"))
    # Before ``run`` a signal is Python's.
    start = [*command[:-1], command[-1].replace("; run()", "; print('here', flush=True); run()")]
    arguments = ["generate", str(tmp_path / "out"), "--teacher", "x", "--base-url", server.url]
    child = subprocess.Popen(
        [*start, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    child.stdout.readline()
    for pause in (seconds, 0.02)[:times]:
        time.sleep(pause)
        child.send_signal(signal.SIGINT)
    said = child.communicate(timeout=30)[1]
    assert child.returncode == 130, said
    assert "Traceback" not in said
    assert said.splitlines()[-1] == "interrupted" or said.splitlines()[-1].startswith("resume with: "), said


def test_an_unknown_key_in_the_config_file(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("teacher: scripted\nnumm: 3\n")
    refused(run("generate", tmp_path / "out", "--config", path), 2, "numm", "did you mean 'num'", "my.yaml")
    assert not (tmp_path / "out").exists()


def test_a_missing_key_is_an_environment_to_mend(run: Any, teacher: Start, tmp_path: Path) -> None:
    refused(run("generate", tmp_path / "a", "--teacher", "gpt-5-mini"), 3, "OPENAI_API_KEY", "export")
    server = teacher(by_prompt())
    named = ("--teacher", "x", "--base-url", server.url, "--api-key-env", "NO_SUCH_KEY")
    refused(run("generate", tmp_path / "b", *named), 3, "NO_SUCH_KEY")
    assert not server.requests
    assert not list(tmp_path.iterdir())


def test_a_key_is_not_sent_in_the_clear_to_another_host(run: Any, tmp_path: Path) -> None:
    flags = ("--teacher", "x", "--base-url", "http://192.0.2.1/v1")
    refused(run("generate", tmp_path / "out", *flags, OPENAI_API_KEY="sk-x"), 2, "--allow-plain-http", "192.0.2.1")
    assert not (tmp_path / "out").exists()


def test_an_unreachable_endpoint(run: Any, unreachable: str, tmp_path: Path) -> None:
    ended = run("generate", tmp_path / "out", "--teacher", "x", "--base-url", unreachable)
    refused(ended, 3, "cannot reach", "--base-url")
    assert not (tmp_path / "out").exists()


def test_a_model_that_the_server_does_not_have(run: Any, teacher: Start, tmp_path: Path) -> None:
    said = {"error": {"message": "The model `x` does not exist", "code": "model_not_found"}}
    server = teacher(lambda body, n: Reply(status=404, json=said))
    ended = run("generate", tmp_path / "out", "--teacher", "x", "--base-url", server.url, "--concurrency", "4")
    refused(ended, 3, "does not exist", "--teacher")
    assert len(server.requests) <= 5


def test_a_local_model_that_is_not_there(run: Any, tmp_path: Path) -> None:
    empty = {"SELFINSTRUCT_MODELS": str(tmp_path / "models")}
    refused(run("generate", tmp_path / "out", **empty), 3, "selfinstruct model pull smollm2")
    missing = tmp_path / "missing.gguf"
    refused(run("generate", tmp_path / "out", "--teacher", f"local:{missing}", **empty), 3, "missing.gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["a file", "a folder of others", "a dataset of others", "a link to nothing"])
def test_a_foreign_out_is_left_alone(kind: str, run: Any, teacher: Start, tmp_path: Path) -> None:
    server, out = teacher(by_prompt()), tmp_path / "out"
    if kind == "a file":
        out.write_text("mine")
    elif kind == "a folder of others":
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    elif kind == "a dataset of others":
        (out / "v1").mkdir(parents=True)
        (out / "README.md").write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    before = sorted((str(path), path.is_file() and path.read_text()) for path in tmp_path.rglob("*"))
    refused(run("generate", out, "--teacher", "x", "--base-url", server.url), 2, str(out))
    assert not server.requests
    assert sorted((str(path), path.is_file() and path.read_text()) for path in tmp_path.rglob("*")) == before


def test_an_out_that_cannot_be_written(run: Any, teacher: Start, tmp_path: Path) -> None:
    server, blocked = teacher(by_prompt()), tmp_path / "file"
    blocked.write_text("mine")
    refused(run("generate", blocked / "out", "--teacher", "x", "--base-url", server.url), 3, "out")
    unwritable = Path("/proc/selfinstruct-out")
    refused(run("generate", unwritable, "--teacher", "x", "--base-url", server.url), 3, "/proc")
    assert not server.requests


@pytest.mark.parametrize("name", ["resume", "status", "publish"])
def test_commands_that_need_a_run_say_so(name: str, run: Any, tmp_path: Path) -> None:
    refused(run(name, tmp_path / "none"), 2, "no run", "selfinstruct generate")


@pytest.mark.parametrize("name", ["versions", "show"])
def test_commands_that_need_a_dataset_say_so(name: str, run: Any, tmp_path: Path) -> None:
    refused(run(name, tmp_path / "none"), 2, "none")


def test_a_broken_seed_file_is_reported_whole(run: Any, teacher: Start, tmp_path: Path) -> None:
    server, path = teacher(by_prompt()), tmp_path / "seeds.jsonl"
    path.write_text('{"instruction": "x"}\nnot json\n{"instruction": 3, "output": "y"}\n')
    for ended in (
        run("seeds", "check", path),
        run("generate", tmp_path / "out", "--seeds", path, "--teacher", "x", "--base-url", server.url),
    ):
        refused(ended, 2, f"{path}:1", f"{path}:2", f"{path}:3")
    assert not server.requests
    assert not (tmp_path / "out").exists()


def test_a_journal_that_is_none_or_damaged_is_named(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("generate", out, "--teacher", "scripted", "--num", "20").returncode == 0
    journal = out / "run" / "journal.sqlite"
    journal.write_bytes(b"no database at all" * 500)
    for name in ("status", "resume", "publish"):
        refused(run(name, out), 3, "journal.sqlite")
    assert journal.read_bytes().startswith(b"no database")


def test_a_changed_parquet_file_is_found_when_it_is_loaded(run: Any, tmp_path: Path) -> None:
    import selfinstruct
    from selfinstruct.errors import DamagedFile

    out = tmp_path / "out"
    assert run("generate", out, "--teacher", "scripted", "--num", "20").returncode == 0
    shard = next((out / "v1").glob("train-*.parquet"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DamagedFile, match=shard.name):
        selfinstruct.load(out)
    refused(run("show", out), 3, shard.name)


def test_errors_are_json_for_programs(run: Any, tmp_path: Path) -> None:
    ended = run("resume", tmp_path / "none", "--json")
    found = json.loads(ended.stdout)
    assert found["exit_code"] == ended.returncode == 2
    assert found["error"]
    assert found["hint"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_standard_output_is_one_line(
    run: Any, tmp_path: Path, command: list[str], environment: dict[str, str]
) -> None:
    out = tmp_path / "out"
    assert run("generate", out, "--teacher", "scripted", "--num", "20").returncode == 0
    more = ("resume", out, "--num", "40")
    with Path("/dev/full").open("wb") as full:
        for asked in (("--help",), ("--version",), ("verify", out), ("show", out), ("status", out, "--json"), more):
            arguments = [*command, *map(str, asked)]
            ended = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, env=environment, timeout=60)
            lines = ended.stderr.decode().splitlines()
            assert (ended.returncode, lines[-1:]) == (
                3, ["error: standard output cannot be written (No space left on device)"]
            )  # fmt: skip
            assert len(lines) == 1 or asked == more
    assert json.loads(run("status", out, "--json").stdout)["rows"] == 40


def test_a_closed_pipe_is_no_crash(run: Any, tmp_path: Path, environment: dict[str, str]) -> None:
    out = tmp_path / "out"
    assert run("generate", out, "--teacher", "scripted", "--num", "200").returncode == 0
    program = f"{sys.executable} -c 'from selfinstruct.cli.main import run; run()'"
    for line in (f"{program} show {out} --rows 200 | head -1", f"{program} --version | true"):
        ended = subprocess.run(["/bin/sh", "-c", line], env=environment, capture_output=True, text=True, timeout=60)
        assert ended.stderr == ""
    assert os.path.exists(out)


def test_a_closed_standard_error_hides_the_words_and_changes_nothing_else(
    command: list[str], environment: dict[str, str], teacher: Start, tmp_path: Path
) -> None:
    server = teacher(by_prompt())

    def closed(*arguments: str) -> subprocess.CompletedProcess[str]:
        shell = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command, *arguments]
        return subprocess.run(shell, env=environment, stdout=subprocess.PIPE, text=True, timeout=60, check=False)

    out = str(tmp_path / "out")
    assert closed("generate", out, "--teacher", "x", "--base-url", server.url, "--num", "5").returncode == 0
    assert json.loads(closed("status", out, "--json").stdout)["rows"] == 5
    wrong = closed("status", str(tmp_path / "nowhere"), "--json")
    assert wrong.returncode == json.loads(wrong.stdout)["exit_code"] == 2


def test_a_run_whose_folder_is_removed_stops_paying(
    command: list[str], environment: dict[str, str], teacher: Start, tmp_path: Path
) -> None:
    server = teacher(by_prompt(), delay=0.05)
    arguments = ["generate", str(tmp_path / "out"), "--teacher", "x", "--base-url", server.url, "--num", "2000"]
    child = subprocess.Popen(
        [*command, *arguments, "--concurrency", "4"], env=environment, stderr=subprocess.PIPE, text=True
    )
    while len(server.requests) < 20 and child.poll() is None:
        time.sleep(0.01)
    shutil.rmtree(tmp_path / "out")
    before = len(server.requests)
    said = child.communicate(timeout=60)[1]
    assert child.returncode == 3, said
    assert "removed" in said
    assert len(server.requests) <= before + 3 * 4


def test_a_key_with_a_space_in_it_is_refused_and_not_shown(run: Any, teacher: Start, tmp_path: Path) -> None:
    ended = run("generate", tmp_path / "out", "--teacher", "x", "--base-url", teacher(by_prompt()).url,
                OPENAI_API_KEY="abcd efgh ijkl mnop")  # fmt: skip
    assert ended.returncode == 2
    assert "the key in OPENAI_API_KEY" in ended.stderr
    assert "abcd" not in ended.stderr
