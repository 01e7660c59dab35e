"""What must never happen; SECURITY.md lists it by these numbers. (S6, S17, S18: there is no page or viewer yet.)"""

from __future__ import annotations

import base64
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow.parquet as pq
import pytest
from tasks import by_prompt
from teacher import Reply, Teacher

from selfinstruct import config
from selfinstruct.backends.base import is_loopback
from selfinstruct.backends.redact import Redactor
from selfinstruct.errors import UsageError
from selfinstruct.records import row_id
from selfinstruct.servers import teachers

KEY = "sk-proj-Zx81_secret/0123456789+abcdef"
Start = Callable[..., Teacher]


def settings(**values: Any) -> config.RunConfig:
    return config.load(None, {}, {"teacher": "mock", **values}).resolve()


def traces(text: str) -> list[str]:
    """Which forms of the key a text holds: whole, a half, or in base64 at any offset."""
    forms = [KEY, KEY[: len(KEY) // 2], KEY[len(KEY) // 2 :]]
    forms += [base64.b64encode(b"x" * skip + KEY.encode()).decode()[6:-6] for skip in range(3)]
    return [form for form in forms if form in text]


ECHOES: dict[str, Reply] = {
    "in an error": Reply(status=401, text=f"Incorrect API key provided: {KEY}."),
    "in pieces": Reply(status=401, text=f"key {KEY[:20]}... and ...{KEY[-18:]} are wrong"),
    "in base64": Reply(status=401, text=base64.b64encode(f"Bearer {KEY}".encode()).decode()),
    "in HTML": Reply(status=500, body=f"<pre>Authorization: Bearer {KEY}</pre>".encode()),
    "in a body that is no answer": Reply(json={"echo": {"authorization": f"Bearer {KEY}"}}),
    "in a redirect": Reply(status=302, headers={"Location": f"http://127.0.0.1:9/?key={KEY}"}),
    "in a refusal": Reply(status=400, json={"error": {"message": KEY, "code": KEY, "type": KEY}}),
}


@pytest.mark.parametrize("echo", ECHOES.values(), ids=list(ECHOES))
def test_s1_the_key_is_nowhere_even_when_the_server_repeats_it(
    echo: Reply, run: Any, teacher: Start, tmp_path: Path
) -> None:
    server = teacher(lambda body, n: echo)
    ended = run(
        "generate", tmp_path / "out", "--teacher", "mock", "--base-url", server.url, "--num", 5, "--concurrency", 2,
        "--set", "patience=0.1", OPENAI_API_KEY=KEY,
    )  # fmt: skip
    assert ended.returncode in (3, 4), ended.stderr
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    seen = [ended.stdout, ended.stderr]
    seen += [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
    assert [traces(text) for text in seen if traces(text)] == []


def test_s1_the_key_in_an_answer_is_blotted_out_of_the_rows(run: Any, teacher: Start, tmp_path: Path) -> None:
    good = by_prompt()

    def answer(body: dict[str, Any], n: int) -> Reply:
        reply = good(body, n)
        assert isinstance(reply, Reply)
        reply.text = reply.text.replace("Output:\n", f"Output:\nthe key {KEY} and ", 1)
        return reply

    server, out = teacher(answer), tmp_path / "out"
    ended = run(
        "generate", out, "--teacher", "mock", "--base-url", server.url, "--num", 20, "--concurrency", 2,
        OPENAI_API_KEY=KEY,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    for path in out.rglob("*"):
        if path.is_file():
            assert not traces(path.read_bytes().decode("latin-1")), path


def test_s1_the_key_is_in_no_log_and_no_argument_of_the_process(
    command: list[str], environment: dict[str, str], teacher: Start, tmp_path: Path
) -> None:
    server = teacher(lambda body, n: Reply(delay=0.5, text="nothing"))
    arguments = ["generate", str(tmp_path / "out"), "--teacher", "mock", "--base-url", server.url, "--num", "5"]
    variables = {**environment, "OPENAI_API_KEY": KEY, "OPENAI_LOG": "debug"}
    child = subprocess.Popen([*command, *arguments], env=variables, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while not server.requests and child.poll() is None:
        time.sleep(0.05)
    listed = subprocess.run(["ps", "-o", "args=", "-p", str(child.pid)], capture_output=True, text=True).stdout
    child.terminate()
    said = b"".join(child.communicate(timeout=30)).decode()
    assert server.requests
    assert not traces(listed)
    assert not traces(said), said[:2000]


SLIPS = {
    "as the variable's name": (("--api-key-env", KEY), ("NAME", "OPENAI_API_KEY")),
    "as the variable's name, of letters": (("--api-key-env", "hf_" + "aB3dE6gH9j" * 4), ("NAME", "OPENAI_API_KEY")),
    "as a setting's name": (("--set", f"{KEY}=1"), ("unknown",)),
    "as a setting": (("--set", KEY), ("--set", "=")),
    "as the teacher": (("--teacher", KEY), ("teacher holds a key",)),
    "as the teacher of a server": (("--teacher", KEY, "--base-url", "http://127.0.0.1:9/v1"), ("teacher holds a key",)),
    "as the address": (("--base-url", KEY), ("base_url",)),
    "in a query": (("--base-url", f"http://h/v1?api_key={KEY}"), ("query",)),
    "in a fragment": (("--base-url", f"http://h/v1#{KEY}"), ("query",)),
    "as a password": (("--base-url", f"http://user:{KEY}@h/v1"), ("credentials",)),
    "as a password without a scheme": (("--base-url", f"user:{KEY}@h"), ("credentials",)),
    "in the path": (("--base-url", f"http://127.0.0.1:9/{KEY}/v1"), ("base_url holds a key",)),
    "in the path, encoded": (("--base-url", f"http://127.0.0.1:9/{quote(KEY, safe='')}/v1"), ("base_url holds a key",)),
    "behind a semicolon": (("--base-url", f"http://127.0.0.1:9/v1;key={KEY}"), ("base_url holds a key",)),
    "in the path of no server": (("--base-url", f"ftp://h/{KEY}"), ("base_url",)),
    "as the name of seeds": (("--seeds", KEY, "--teacher", "scripted"), ("seeds holds a key",)),
}


@pytest.mark.parametrize("known", [True, False], ids=["in the environment", "by its form alone"])
@pytest.mark.parametrize("slip", SLIPS)
def test_s1_a_key_in_the_wrong_place_is_refused_and_not_repeated(
    slip: str, known: bool, run: Any, tmp_path: Path
) -> None:
    arguments, words = SLIPS[slip]
    key = KEY if known else "sk-proj-Zq8Wm3Nv7Rt2Yx5Lc9Kd1Hf6"
    arguments = tuple(part.replace(quote(KEY, safe=""), quote(key, safe="")).replace(KEY, key) for part in arguments)
    named = () if "--teacher" in arguments else ("--teacher", "mock")
    variables = {"OPENAI_API_KEY": KEY} if known else {}
    ended = run("generate", tmp_path / "out", *named, *arguments, "--num", 5, **variables)
    assert ended.returncode == 2, ended.stderr
    said = ended.stdout + ended.stderr
    assert [part for part in (key[:14], key[-14:], "aB3dE6gH9j") if part in said] == []
    for word in words:
        assert word in said, said
    assert not list(tmp_path.iterdir())


def test_s1_a_key_in_a_settings_file_or_variable_is_not_repeated(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    for text in (f"api_key: {KEY}\n", f"{KEY}: x\n", f"num: {KEY}\n", f"teacher: [{KEY}]\n", f"a: {'x ' * 37}{KEY}\n"):
        file.write_text(f"teacher: mock\n{text}")
        ended = run("generate", tmp_path / "out", "--config", file, MY_TOKEN=KEY)
        assert (ended.returncode, traces(ended.stderr)) == (2, []), ended.stderr
        assert "my.yaml:2" in ended.stderr
    ended = run("generate", tmp_path / "out", "--teacher", "mock", SELFINSTRUCT_API_KEY_ENV=KEY)
    assert (ended.returncode, traces(ended.stderr)) == (2, []), ended.stderr
    assert "takes the NAME of the variable" in ended.stderr


def test_s1_a_run_is_not_resumed_with_a_key_in_its_settings(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("generate", out, "--teacher", "scripted", "--num", "5").returncode == 0
    for flags in (("--base-url", f"http://127.0.0.1:9/{KEY}/v1"), ("--set", f"seed={KEY}"), ("--api-key-env", KEY)):
        ended = run("resume", out, "--num", "9", *flags, OPENAI_API_KEY=KEY)
        assert (ended.returncode, traces(ended.stderr)) == (2, []), ended.stderr
    assert not [path for path in out.rglob("*") if path.is_file() and traces(path.read_bytes().decode("latin-1"))]


def test_s2_no_flag_takes_a_key_and_settings_hold_none(run: Any) -> None:
    assert "--api-key " not in run("generate", "--help").stdout
    resolved = settings(base_url="https://teacher.example/v1", api_key_env="MY_KEY")
    assert "key" not in {name for name in config.RunConfig.model_fields if name.endswith("key")}
    assert "MY_KEY" in resolved.to_yaml()
    assert not traces(repr(teachers.Teacher(("https://x",), KEY, None, "about")))


@pytest.mark.parametrize("line", ["{}", "generate out {}", "generate out --{}", "generate out --{}=3", "seeds {}"])
def test_s2_a_command_line_that_is_not_understood_repeats_no_key(line: str, run: Any) -> None:
    ended = run(*line.format(KEY).split(), OPENAI_API_KEY=KEY)
    assert (ended.returncode, traces(ended.stdout + ended.stderr)) == (2, [])
    assert "***" in ended.stderr


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_s3_redirects_are_not_followed(status: int, run: Any, teacher: Start, tmp_path: Path) -> None:
    thief = teacher(lambda body, n: "stolen")
    server = teacher(lambda body, n: Reply(status=status, headers={"Location": f"{thief.url}/chat/completions"}))
    ended = run(
        "generate", tmp_path / "out", "--teacher", "mock", "--base-url", server.url, "--num", 5, "--concurrency", 1,
        OPENAI_API_KEY=KEY,
    )  # fmt: skip
    assert ended.returncode == 3
    assert "redirect" in ended.stderr
    assert (len(server.requests), len(thief.requests)) == (1, 0)


LOOPBACK = ["http://127.0.0.1:8000/v1", "http://127.9.9.9/v1", "http://localhost/v1", "http://[::1]:8/v1"]
FOREIGN = [
    "http://127.0.0.1.evil.example/v1",
    "http://localhost.evil.example/v1",
    "http://127.evil.example/v1",
    "http://::1.evil.example/v1",
    "http://localhostess/v1",
    "http://0.0.0.0:8000/v1",
    "http://10.0.0.1/v1",
    "http://[::ffff:8.8.8.8]/v1",
    "http://2130706433/v1",
]


@pytest.mark.parametrize("url", FOREIGN)
def test_s4_a_key_goes_to_no_other_host_in_plain(url: str) -> None:
    assert not is_loopback(url)
    with pytest.raises(UsageError, match="unencrypted") as caught:
        teachers._key(settings(base_url="http://x/v1"), {"OPENAI_API_KEY": KEY}, (url,))
    assert "--allow-plain-http" in caught.value.hint
    allowed = settings(base_url="http://x/v1", allow_plain_http=True)
    assert teachers._key(allowed, {"OPENAI_API_KEY": KEY}, (url,)) == KEY


@pytest.mark.parametrize("url", LOOPBACK)
def test_s4_this_machine_needs_no_encryption(url: str) -> None:
    assert teachers._key(settings(base_url=url), {"OPENAI_API_KEY": KEY}, (url,)) == KEY


def test_s4_a_proxy_of_the_environment_does_not_see_what_stays_on_this_machine(
    run: Any, teacher: Start, tmp_path: Path
) -> None:
    server, proxy = teacher(by_prompt()), teacher(lambda body, n: "proxied")
    elsewhere = proxy.url.removesuffix("/v1")
    ended = run(
        "generate", tmp_path / "out", "--teacher", "mock", "--base-url", server.url, "--num", 8, OPENAI_API_KEY=KEY,
        HTTP_PROXY=elsewhere, http_proxy=elsewhere, ALL_PROXY=elsewhere,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert server.requests
    assert not proxy.requests


@pytest.mark.parametrize("url", ["http://user:pw@127.0.0.1/v1", "https://x.example/v1?api-key=abc", "https://x/#abc"])
def test_s5_a_url_with_a_secret_is_refused_and_not_repeated(url: str, run: Any, tmp_path: Path) -> None:
    ended = run("generate", tmp_path / "out", "--teacher", "mock", "--base-url", url)
    assert ended.returncode == 2
    assert "user:pw" not in ended.stderr
    assert not (tmp_path / "out").exists()


def test_s15_yaml_is_data_and_bounded(run: Any, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    bad = {
        "code": f"teacher: !!python/object/apply:os.system ['touch {victim}']",
        "bomb": "a: &a [x, x]\n" + "\n".join(f"{c}: &{c} [*{b}, *{b}]" for b, c in itertools.pairwise("abcdefghi")),
        "deep": "teacher: " + "[" * 50_000,
        "large": "# " + "x" * (2 << 20),
        "base 60": "seed: " + "1:" * 500_000 + "1",
        "lists": "a:\n " + "- " * 30_000 + "x",
        "names": "".join(f"k{n}: v\n" for n in range(6000)),
        "environment": "teacher: ${OPENAI_API_KEY}",
    }  # fmt: skip
    for name, text in bad.items():
        file = tmp_path / f"{name}.yaml"
        file.write_text(text)
        started = time.monotonic()
        ended = run("config", "show", "--config", file, OPENAI_API_KEY=KEY)
        assert time.monotonic() - started < 2, name
        assert "Traceback" not in ended.stderr
        assert not traces(ended.stdout + ended.stderr)
        assert ended.returncode == 2 or name == "environment", name
    assert not victim.exists()


def test_s19_addresses_in_answers_are_never_asked(run: Any, teacher: Start, tmp_path: Path) -> None:
    other = teacher(lambda body, n: "seen")
    good = by_prompt()

    def answer(body: dict[str, Any], n: int) -> Reply:
        reply = good(body, n)
        assert isinstance(reply, Reply)
        reply.text = reply.text.replace("Explain", f"Explain {other.url}/chat/completions and", 1)
        return reply

    server = teacher(answer)
    ended = run("generate", tmp_path / "out", "--teacher", "mock", "--base-url", server.url, "--num", 12)
    assert ended.returncode == 0
    assert not other.requests


def test_s22_importing_and_asking_for_help_opens_no_socket() -> None:
    watch = (
        "import sys\n"
        "seen = []\n"
        "network = ('socket.connect', 'socket.getaddrinfo')\n"
        "sys.addaudithook(lambda event, args: event in network and seen.append(args))\n"
        "import selfinstruct, openai\n"
        "from selfinstruct.cli.app import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "print('sockets', len(seen))\n"
    )
    variables = {**os.environ, "PYTHONWARNINGS": "ignore"}
    ended = subprocess.run([sys.executable, "-c", watch], capture_output=True, text=True, env=variables, timeout=60)
    assert ended.stdout.strip().endswith("sockets 0"), ended.stderr


LEAKS = {"email": "ana.silva@mail.gov.pt", "phone": "(732) 830-9763", "api_key": "hf_" + "aB3dE6gH9j" * 4}
LEAKED = f"Ask {LEAKS['email']} or {LEAKS['phone']}, with {LEAKS['api_key']}."


@pytest.mark.parametrize("way", ["flag", "mask", "drop"])
def test_s23_no_secret_of_a_teacher_goes_out_unseen(way: str, run: Any, teacher: Start, tmp_path: Path) -> None:
    good = by_prompt()

    def answer(body: dict[str, Any], n: int) -> Reply:
        reply = good(body, n)
        assert isinstance(reply, Reply)
        reply.text = reply.text.replace("Explain", f"Explain to {LEAKS['email']}", 1).replace("- ", f"- {LEAKED} ", 1)
        return reply

    server, out = teacher(answer), tmp_path / "out"
    ended = run(
        "generate", out, "--teacher", "mock", "--base-url", server.url, "--num", 40, "--secrets", way, "--json"
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    rows = [row for path in (out / "v1").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    leaking = [row for row in rows if any(text in str(row) for text in LEAKS.values())]
    kinds = sorted(LEAKS)
    assert all(
        row["flags"] == (kinds if LEAKED in row["output"] else ["email"] if row in leaking else []) for row in rows
    )
    assert bool(leaking) == (way == "flag")
    assert any("[EMAIL] or [PHONE], with [API_KEY]." in row["output"] for row in rows) == (way == "mask")
    assert all(row["id"] == row_id(row["instruction"], row["input"]) for row in rows)

    counted = {"rows": len(leaking), "kinds": {k: n for k in kinds if (n := sum(k in row["flags"] for row in rows))}}
    manifest = json.loads((out / "v1" / "_manifest.json").read_text())["about"]
    assert json.loads(ended.stdout)["flagged"] == manifest["flagged"] == counted
    told = f"v1: {len(leaking)} rows look as if they hold secrets or personal text: api_key "
    for command in ("publish", "status", "resume"):
        assert (told in run(command, out).stdout) == (way == "flag")
        assert json.loads(run(command, out, "--json").stdout)["flagged"] == counted
    assert ("rows look as if" in (out / "README.md").read_text()) == (way == "flag")
    assert ("secret" in manifest["rejected"]) == (way == "drop")
    assert ("masked-email" in manifest["repaired"]) == (way == "mask")


def test_placeholder_keys_damage_no_text() -> None:
    assert Redactor("EMPTY").answer("An EMPTY glass.") == "An EMPTY glass."
    assert Redactor(None).quote("nothing\x1b[2J here") == "nothing [2J here"
    assert Redactor("x").quote("xylophone") == "xylophone"


def test_json_of_a_status_report_holds_no_key(run: Any, teacher: Start, tmp_path: Path) -> None:
    server = teacher(by_prompt())
    run("generate", tmp_path / "out", "--teacher", "mock", "--base-url", server.url, "--num", 8, OPENAI_API_KEY=KEY)
    told = run("status", tmp_path / "out", "--json", OPENAI_API_KEY=KEY).stdout
    assert json.loads(told)["state"] == "done"
    assert not traces(told)
