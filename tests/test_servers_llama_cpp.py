"""llama.cpp as an endpoint: up within bounds, down at once, closed to the outside, and never our own crash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from selfinstruct.errors import MissingPackage, ModelFileError, ServerError, UsageError
from selfinstruct.servers import models
from selfinstruct.servers.llama_cpp import LlamaCppServer, default_threads

ROOT = Path(__file__).parent.parent
SCHEMA = {"type": "object", "properties": {"answer": {"type": "string", "maxLength": 30}}, "required": ["answer"]}


def ask(base: str, path: str, body: dict[str, Any] | None = None, **headers: str) -> tuple[dict[str, str], Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(base + path, data, {"Content-Type": "application/json", **headers})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as reply:
        return dict(reply.headers), json.loads(reply.read())


def complete(base: str, **fields: Any) -> str:
    body = {"prompt": '{"answer": "red"}\n{"answer": "blue"}\n', "max_tokens": 40, "seed": 1, **fields}
    return str(ask(base, "/completions", body)[1]["choices"][0]["text"])


def make_machine(root: Path, siblings: dict[int, str], cpu_max: str = "") -> Path:
    for cpu, text in siblings.items():
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(text)
    if cpu_max:
        (root / "sys/fs/cgroup").mkdir(parents=True)
        (root / "sys/fs/cgroup/cpu.max").write_text(cpu_max)
    return root


@pytest.mark.skipif(sys.platform != "linux", reason="CPU affinity and /sys are Linux's")
def test_default_threads_leaves_one_physical_core_free(tmp_path: Path) -> None:
    usable = sorted(os.sched_getaffinity(0))
    apart = {cpu: f"{cpu}\n" for cpu in usable}
    assert default_threads(make_machine(tmp_path / "apart", apart)) == max(1, len(usable) - 1)
    assert default_threads(make_machine(tmp_path / "one core", dict.fromkeys(usable, "0-99\n"))) == 1
    assert default_threads(make_machine(tmp_path / "quota", apart, "150000 100000\n")) == 1
    assert default_threads(make_machine(tmp_path / "free", apart, "max 100000\n")) == max(1, len(usable) - 1)
    assert default_threads(tmp_path / "nothing told") == max(1, len(usable) - 1)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(MissingPackage) as caught:
        LlamaCppServer(Path("any.gguf")).start()
    assert caught.value.hint == "pip install 'selfinstruct[local]'"


@pytest.mark.parametrize("wrong", [{"slots": 0}, {"context_per_slot": 0}, {"threads": 0}])
def test_numbers_below_one_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="is 0"):
        LlamaCppServer(Path("any.gguf"), **wrong)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"<html>\x1b[2J", b"GGUF\x03\0\0\0" + b"\xff" * 64, None])
def test_a_broken_or_missing_model_is_a_server_error_with_the_reason(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    pytest.importorskip("xllamacpp")
    path = tmp_path / "broken.gguf"
    if content is not None:
        path.write_bytes(content)
    server = LlamaCppServer(path)
    with pytest.raises(ServerError, match=r"cannot serve .*gguf") as caught:
        server.start()
    assert "\x1b" not in str(caught.value)
    assert caught.value.hint
    assert server.url == ""
    server.stop()
    assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def weights() -> Path:
    pytest.importorskip("xllamacpp", reason="needs: pip install 'selfinstruct[local]'")
    try:
        return models.find("smollm2")
    except ModelFileError as fault:
        pytest.skip(f"{fault}; {fault.hint}")


@pytest.fixture(scope="module")
def base(weights: Path) -> Iterator[str]:
    with LlamaCppServer(weights, alias="smollm2") as server:
        yield server.url


@pytest.mark.slow
def test_start_returns_a_loopback_url_and_keeps_it(weights: Path, capfd: pytest.CaptureFixture[str]) -> None:
    waits: list[float] = []
    server = LlamaCppServer(weights, slots=1, on_wait=waits.append)
    url = server.start()
    assert url.startswith("http://127.0.0.1:")
    assert url.endswith("/v1")
    assert server.start() == server.url == url
    assert ask(url, "/models")[1]["data"][0]["id"] == weights.stem
    assert waits == sorted(waits)
    server.stop()
    server.stop()
    with pytest.raises(urllib.error.URLError):
        ask(url, "/models")
    assert server.start().startswith("http://127.0.0.1:")
    server.stop()
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_the_schema_binds_in_the_field_that_the_docstring_names(base: str) -> None:
    assert set(json.loads(complete(base, json_schema=SCHEMA))) == {"answer"}
    wrapped = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    chat = {"messages": [{"role": "user", "content": "Name a colour."}], "max_tokens": 60, "seed": 1}
    _, reply = ask(base, "/chat/completions", {**chat, "response_format": wrapped})
    assert set(json.loads(reply["choices"][0]["message"]["content"])) == {"answer"}


@pytest.mark.slow
def test_a_seed_gives_the_same_text_alone_and_beside_others(base: str) -> None:
    def draw(seed: int) -> str:
        return complete(base, seed=seed, json_schema=SCHEMA, temperature=1.0, min_p=0.05)

    alone = [draw(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(draw, range(8))) == alone
    assert len(set(alone)) > 1


@pytest.mark.slow
def test_no_web_page_may_read_answers(base: str) -> None:
    headers, _ = ask(base, "/models", Origin="http://elsewhere.example")
    assert headers.get("Access-Control-Allow-Origin", "") == ""
    with pytest.raises(urllib.error.HTTPError, match="404"):
        ask(base.removesuffix("/v1"), "/")


@pytest.mark.slow
def test_an_api_key_is_demanded_when_given(weights: Path) -> None:
    with LlamaCppServer(weights, slots=1, api_key="open-sesame") as server:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            complete(server.url)
        body = {"prompt": "Hi", "max_tokens": 2}
        assert ask(server.url, "/completions", body, Authorization="Bearer open-sesame")[1]["choices"]


@pytest.mark.slow
def test_stop_is_quick_under_load_and_frees_the_clients(weights: Path) -> None:
    server = LlamaCppServer(weights)
    url = server.start()
    ended = []

    def long_request() -> None:
        with pytest.raises(OSError):
            complete(url, prompt="Once upon a time " * 300, max_tokens=900, ignore_eos=True)
        ended.append(True)

    clients = [threading.Thread(target=long_request) for _ in range(12)]
    for client in clients:
        client.start()
    time.sleep(1)
    begin = time.monotonic()
    server.stop()
    assert time.monotonic() - begin < 2
    for client in clients:
        client.join(10)
    assert len(ended) == 12


@pytest.mark.slow
def test_too_slow_a_load_is_a_server_error_and_leaves_no_child(weights: Path) -> None:
    server = LlamaCppServer(weights, load_timeout_s=0.0)
    with pytest.raises(ServerError, match="has not loaded"):
        server.start()
    assert server.url == ""


HOLD = """
import signal, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from selfinstruct.servers.llama_cpp import LlamaCppServer
signal.signal(signal.SIGINT, signal.default_int_handler)
url = LlamaCppServer(Path(sys.argv[2]), slots=1).start()
try:
    print(url, flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_server_ends_with_its_parent_however_that_ends(weights: Path, sign: signal.Signals) -> None:
    command = [sys.executable, "-c", HOLD, str(ROOT), str(weights)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        url = parent.stdout.readline().strip()
        assert ask(url, "/models")[1]["data"]
        parent.send_signal(sign)
        rest = parent.stdout.read()
        code = parent.wait(5)
    assert (code, rest) == ((0, "interrupted\n") if sign == signal.SIGINT else (-sign, ""))
    deadline = time.monotonic() + 5
    with pytest.raises(OSError):  # refused, or reset when the request came in between
        while time.monotonic() < deadline:
            ask(url, "/models")
            time.sleep(0.05)
