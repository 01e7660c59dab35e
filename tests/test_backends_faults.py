"""The border to the teacher: every answer a server can give is a completion or an error of ours. One row each."""

from __future__ import annotations

import asyncio
import email.utils
import functools
import gzip
import json
import resource
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx2
import openai
import pytest
from teacher import Reply, Teacher

from selfinstruct.backends import body
from selfinstruct.backends.faults import fault_of_connection, retry_after
from selfinstruct.backends.http import HttpBackend, Sampling
from selfinstruct.errors import (
    AuthenticationFailed,
    ModelNotFound,
    PromptRefused,
    QuotaExhausted,
    RateLimited,
    SelfInstructError,
    TeacherFault,
    TeacherUnreachable,
    TransientFault,
    UnusableAnswer,
)
from selfinstruct.records import Completion, Prompt

KEY = "sk-proj-0123456789abcdefXYZ"
PROMPT = Prompt(7, "alpaca", messages=({"role": "user", "content": "Say something."},))
Start = Callable[..., Teacher]


def ask(server: Teacher, *, api: str = "chat", key: str | None = KEY, timeout: float = 5.0) -> Completion:
    """One attempt at a server."""

    async def once() -> Completion:
        backend = HttpBackend(
            base_url=server.url,
            model="mock",
            api_key=key,
            api=api,  # type: ignore[arg-type]
            sampling=Sampling(),
            timeout=timeout,
            max_in_flight=4,
        )
        try:
            prompt = PROMPT if api == "chat" else Prompt(7, "alpaca", text="Say something.")
            return await backend.complete(prompt)
        finally:
            await backend.aclose()

    return asyncio.run(once())


def error(message: str = "no", **words: Any) -> dict[str, Any]:
    return {"error": {"message": message, **words}}


def said(content: Any, **more: Any) -> dict[str, Any]:
    return {
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content, **more}}]
    }


STRANGE = {"Content-Type": "text/plain; charset=x-none"}
NO_WAITS = ("", "0", "-5", "nan", "inf", "1e400", "soon", "5 days", "\x00", "1_0", "9" * 400)
DEEP = b"[" * 100_000 + b"]" * 100_000
GOOD = json.dumps(said("fine")).encode()

OPENAI_SAYS = "You exceeded your current quota, please check your plan and billing details."

TABLE: list[tuple[str, Reply, type[SelfInstructError]]] = [
    # stop the run
    ("no quota", Reply(status=429, json=error(code="insufficient_quota")), QuotaExhausted),
    ("no quota, by type", Reply(status=429, json=error(type="insufficient_quota", code=None)), QuotaExhausted),
    ("no quota inside a 200", Reply(json=error(code="insufficient_quota")), QuotaExhausted),
    ("payment required", Reply(status=402), QuotaExhausted),
    ("payment required inside a 200", Reply(json=error(code=402)), QuotaExhausted),
    ("no credit, in words", Reply(status=400, json=error("Your credit balance is too low")), QuotaExhausted),
    ("billing limit", Reply(status=400, json=error(code="billing_hard_limit_reached")), QuotaExhausted),
    ("no quota, as a detail", Reply(status=429, json={"detail": {"code": "insufficient_quota"}}), QuotaExhausted),
    ("no quota, in a list", Reply(status=429, json=[error(code="insufficient_quota")]), QuotaExhausted),
    ("no quota, one word", Reply(status=429, json={"error": "insufficient_quota"}), QuotaExhausted),
    ("no quota, errors", Reply(status=429, json={"errors": [{"code": "insufficient_quota"}]}), QuotaExhausted),
    ("no quota, OpenAI's sentence", Reply(status=429, json=error(OPENAI_SAYS)), QuotaExhausted),
    ("wrong key, Google's way", Reply(status=400, json=[error("API key not valid. Pass one.")]), AuthenticationFailed),
    ("wrong key, by reason", Reply(status=400, json=error(details=[{"reason": "API_KEY_INVALID"}])),
     AuthenticationFailed),
    ("a model that is gone", Reply(status=410, json=error("this model was retired")), ModelNotFound),
    ("gone", Reply(status=410), TeacherFault),
    ("unauthorized", Reply(status=401), AuthenticationFailed),
    ("unauthorized in HTML", Reply(status=401, body=b"<html>login</html>"), AuthenticationFailed),
    ("forbidden", Reply(status=403), AuthenticationFailed),
    ("wrong key with another status", Reply(status=400, json=error(code="invalid_api_key")), AuthenticationFailed),
    ("wrong key inside a 200", Reply(json=error(code="invalid_api_key")), AuthenticationFailed),
    ("unknown model", Reply(status=404, json=error("The model 'x' does not exist")), ModelNotFound),
    ("unknown model, by code", Reply(status=400, json=error(code="model_not_found")), ModelNotFound),
    ("wrong path", Reply(status=404, body=b"404 page not found"), TeacherFault),
    ("wrong method", Reply(status=405), TeacherFault),
    ("proxy wants a password", Reply(status=407), TeacherFault),
    ("moved", Reply(status=301, headers={"Location": "https://elsewhere.example/v1"}), TeacherFault),
    ("redirect that repeats the POST", Reply(status=307, headers={"Location": "http://127.0.0.1:9/"}), TeacherFault),
    # pause all
    ("rate limit", Reply(status=429), RateLimited),
    ("rate limit by tokens", Reply(status=429, json=error(type="tokens", code="rate_limit_exceeded")), RateLimited),
    ("rate limit in HTML", Reply(status=429, body=b"<h1>slow down</h1>"), RateLimited),
    ("rate limit inside a 200", Reply(json=error(code="rate_limit_exceeded")), RateLimited),
    ("rate limit inside a 200, by number", Reply(json=error(code=429)), RateLimited),
    ("a limit a minute", Reply(status=429, json=error(OPENAI_SAYS + " Retry in 34.5s.")), RateLimited),
    ("rate limit as a 403", Reply(status=403, json=error(code="rate_limit_exceeded")), RateLimited),
    ("too large for now, says until when", Reply(status=413, headers={"Retry-After": "3"}), RateLimited),
    ("overloaded, says until when", Reply(status=503, headers={"Retry-After": "3"}), RateLimited),
    # ask again
    *((f"status {n}", Reply(status=n), TransientFault) for n in (408, 409, 423, 499, 500, 502, 503, 504, 524, 529)),
    ("server error in HTML", Reply(status=502, body=b"<html>bad gateway</html>"), TransientFault),
    ("server error with broken JSON", Reply(status=500, body=b'{"error": {'), TransientFault),
    ("server error with deep JSON", Reply(status=500, body=DEEP), TransientFault),
    ("server error without a body", Reply(status=500, body=b""), TransientFault),
    ("server error in a strange charset", Reply(status=500, body=b"\xff\xfe", headers=STRANGE), TransientFault),
    ("error inside a 200", Reply(json=error("overloaded", type="server_error")), TransientFault),
    ("error inside a 200, as text", Reply(json={"error": "out of memory"}), TransientFault),
    ("connection cut", Reply(close=True), TransientFault),
    ("an error beside half a text", Reply(json={**said("half"), "error": {"message": "upstream"}}), TransientFault),
    ("an error in the choice", Reply(json={"choices": [{"error": {"code": 502}, "text": "half"}]}), TransientFault),
    ("broken off, it says", Reply("half", finish="error"), UnusableAnswer),
    ("broken off by the server", Reply("half", finish="abort"), UnusableAnswer),
    # ask again a few times, then skip
    ("empty", Reply(text=""), UnusableAnswer),
    ("only blanks", Reply(text=" \n\t"), UnusableAnswer),
    ("null", Reply(json=said(None)), UnusableAnswer),
    ("content is a list", Reply(json=said([{"type": "text", "text": "x"}])), UnusableAnswer),
    ("content is a number", Reply(json=said(5)), UnusableAnswer),
    ("no choices", Reply(json={"id": "x"}), UnusableAnswer),
    ("choices empty", Reply(json={"choices": []}), UnusableAnswer),
    ("choices null", Reply(json={"choices": None}), UnusableAnswer),
    ("choices an object", Reply(json={"choices": {}}), UnusableAnswer),
    ("a choice is a text", Reply(json={"choices": ["x"]}), UnusableAnswer),
    ("message null", Reply(json={"choices": [{"message": None}]}), UnusableAnswer),
    ("JSON list", Reply(body=b"[]"), UnusableAnswer),
    ("JSON null", Reply(body=b"null"), UnusableAnswer),
    ("JSON text", Reply(body=b'"hello"'), UnusableAnswer),
    ("JSON cut off", Reply(body=GOOD[:40]), UnusableAnswer),
    ("JSON too deep", Reply(body=DEEP), UnusableAnswer),
    ("JSON just not too deep", Reply(body=b'{"x":' * 300 + b"1" + b"}" * 300), UnusableAnswer),
    ("an endless number", Reply(body=b"1" * 10_000), UnusableAnswer),
    ("no body", Reply(body=b""), UnusableAnswer),
    ("NULs", Reply(body=b"\0" * 500), UnusableAnswer),
    ("HTML", Reply(body=b"<html>busy</html>", headers={"Content-Type": "text/html"}), UnusableAnswer),
    ("no UTF-8", Reply(body=b'{"choices": "\xff\xfe"}'), UnusableAnswer),
    ("events", Reply(body=b"data: {}\n\n", headers={"Content-Type": "text/event-stream"}), UnusableAnswer),
    ("gzip that is none", Reply(body=b"hello", headers={"Content-Encoding": "gzip"}), UnusableAnswer),
    ("gzip cut off", Reply(body=gzip.compress(GOOD)[:-9], headers={"Content-Encoding": "gzip"}), UnusableAnswer),
    ("brotli", Reply(body=b"\x0b\x02", headers={"Content-Encoding": "br"}), UnusableAnswer),
    ("9 MB", Reply(text="x" * 9_000_000), UnusableAnswer),
    # skip
    ("bad request", Reply(status=400), PromptRefused),
    ("too large", Reply(status=413), PromptRefused),
    ("unprocessable", Reply(status=422), PromptRefused),
    ("teapot", Reply(status=418), PromptRefused),
    ("too long", Reply(status=400, json=error(code="context_length_exceeded")), PromptRefused),
    ("policy", Reply(status=400, json=error(code="content_policy_violation")), PromptRefused),
    ("policy as forbidden", Reply(status=403, json=error(code="content_filter")), PromptRefused),
    ("policy inside a 200", Reply(json=error(code="content_filter")), PromptRefused),
    ("the model refuses", Reply(json=said(None, refusal="I will not.")), PromptRefused),
    ("the filter cut it", Reply(text="half an ans", finish="content_filter"), PromptRefused),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "expected"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_each_bad_answer_has_its_error(reply: Reply, expected: type[SelfInstructError], teacher: Start) -> None:
    server = teacher(lambda body, n: reply)
    with pytest.raises(SelfInstructError) as caught:
        ask(server)
    assert type(caught.value) is expected
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 500
    assert len(server.requests) == 1  # nothing retries below retry.py, nothing follows a redirect
    assert isinstance(caught.value, TransientFault) == caught.value.retryable


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply(status=400, json=error("maximum context length is 4096")), "context length exceeded"),
        (Reply(status=400, json=error(code="content_policy_violation")), "content policy violation"),
        (Reply(status=422, json=error("\x1b[2Jwhatever the server likes")), "status 422"),
    ],
)
def test_refusals_are_counted_by_a_few_plain_reasons(reply: Reply, reason: str, teacher: Start) -> None:
    with pytest.raises(PromptRefused) as caught:
        ask(teacher(lambda body, n: reply))
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (Reply(text="plain"), "plain"),
        (Reply(body=gzip.compress(GOOD), headers={"Content-Encoding": "gzip"}), "fine"),
        (Reply(body=zlib.compress(GOOD), headers={"Content-Encoding": "deflate"}), "fine"),
        (Reply(body=GOOD, headers={"Content-Type": "text/plain"}), "fine"),
        (Reply(body=b'{"choices":[{"message":{"content":"a\\ud800b\\u0000c"}}]}'), "a\ufffdb\0c"),
        (Reply(json={**said("fine"), "usage": {"prompt_tokens": "many", "completion_tokens": -1}}), "fine"),
        (Reply(json={**said("fine"), "usage": [], "model": 5, "error": None}), "fine"),
        (Reply(text="cut", finish="length"), "cut"),
        (Reply(text="odd", finish="no such reason"), "odd"),
    ],
)
def test_odd_but_usable_answers_are_used(reply: Reply, text: str, teacher: Start) -> None:
    completion = ask(teacher(lambda body, n: reply))
    assert completion.text == text
    assert completion.finish == ("length" if text == "cut" else "stop")
    completion.text.encode()


def test_a_token_limit_that_thinking_used_up_is_told(teacher: Start) -> None:
    message = {"role": "assistant", "content": "", "reasoning_content": "Let me think " * 9}
    body = {"choices": [{"message": message, "finish_reason": "length"}]}
    with pytest.raises(UnusableAnswer, match="used up before any text") as caught:
        ask(teacher(lambda _body, n: Reply(json=body)))
    assert "max_new_tokens" in caught.value.hint


def at(url: str) -> SelfInstructError:
    """The error of one attempt at an address."""
    server = Teacher(lambda body, n: "")
    server.url = url
    with pytest.raises(SelfInstructError) as caught:
        ask(server)
    return caught.value


def test_what_keeps_from_connecting_is_told(teacher: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    refused = at(f"http://127.0.0.1:{port}/v1")
    assert isinstance(refused, TransientFault)
    assert "Connect call failed" in refused.message
    plain = at(teacher(lambda body, n: "").url.replace("http:", "https:"))
    assert isinstance(plain, TeacherUnreachable)
    assert "http://" in plain.hint
    assert "no answer within" not in refused.message + plain.message


def test_a_certificate_that_does_not_hold_stops_at_once() -> None:
    late = openai.APITimeoutError(request=httpx2.Request("POST", "https://teacher/v1"))
    late.__cause__ = OSError("Cannot connect")
    late.__cause__.__cause__ = ssl.SSLCertVerificationError(1, "certificate verify failed: self-signed certificate")
    found = fault_of_connection("teacher", late, "no answer within 1 s", str)
    assert isinstance(found, TeacherUnreachable)
    assert "self-signed" in found.message
    late.__cause__ = TimeoutError("reading")
    assert fault_of_connection("teacher", late, "no answer within 1 s", str).message == "teacher: no answer within 1 s"


def test_an_attempt_has_a_total_deadline_even_when_bytes_keep_dripping() -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n")
        try:
            while not writer.is_closing():
                writer.write(b" ")
                await asyncio.sleep(0.05)
        finally:
            writer.close()

    async def attempt() -> float:
        server = await asyncio.start_server(drip, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        backend = HttpBackend(
            base_url=url, model="m", api_key=None, api="chat", sampling=Sampling(), timeout=0.4, max_in_flight=1
        )
        started = time.monotonic()
        with pytest.raises(TransientFault, match=r"no answer within 0\.4"):
            await backend.complete(PROMPT)
        await backend.aclose()
        server.close()
        return time.monotonic() - started

    assert asyncio.run(attempt()) < 2


@functools.cache
def _bomb() -> bytes:
    """200 MB of zeros, packed."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(200)) + packer.flush()


@pytest.mark.parametrize("status", [200, 429, 500])
def test_a_gzip_bomb_takes_no_memory(status: int, teacher: Start) -> None:
    headers = {"Content-Encoding": "gzip", "Retry-After": "2"}
    server = teacher(lambda body, n: Reply(status=status, body=_bomb(), headers=headers))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TransientFault) as caught:
        ask(server)
    assert isinstance(caught.value, UnusableAnswer if status == 200 else RateLimited)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_no_server_is_a_transient_fault(teacher: Start) -> None:
    server = teacher(lambda body, n: "x")
    server.url = "http://127.0.0.1:9/v1"
    with pytest.raises(TransientFault):
        ask(server)


@contextmanager
def raw_server(reply: bytes, *, hang: bool) -> Iterator[str]:
    """A server that sends these bytes and then closes, or hangs; its base URL."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listening.accept()
                connection.recv(65_536)
                connection.sendall(reply)
                if hang:
                    kept.append(connection)
                else:
                    connection.close()

    kept: list[socket.socket] = []
    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    listening.close()
    for connection in kept:
        connection.close()


@pytest.mark.parametrize("hang", [False, True], ids=["cut", "hangs"])
@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"HTTP/1.1 401 Unauthorized\r\n", AuthenticationFailed),
        (b"HTTP/1.1 402 Payment Required\r\n", QuotaExhausted),
        (b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 7\r\n", RateLimited),
        (b"HTTP/1.1 200 OK\r\n", TransientFault),
    ],
    ids=["401", "402", "429", "200"],
)
def test_an_error_counts_also_when_its_body_never_comes_whole(
    head: bytes, expected: type[SelfInstructError], hang: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body, "ERROR_SECONDS", 0.5)  # a wait that a test need not have
    server = Teacher(lambda body, n: "x")
    reply = head + b'Content-Length: 900\r\n\r\n{"error": {"mess'
    with raw_server(reply, hang=hang) as server.url, pytest.raises(expected) as caught:
        ask(server, timeout=2.0)
    if expected is RateLimited:
        assert caught.value.retry_after == 7  # type: ignore[attr-defined]


def test_what_the_environment_says_to_openai_goes_to_no_other_server(
    teacher: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer other\nX-Secret: s3cret")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-1")
    server = teacher(lambda body, n: "fine")
    ask(server)
    (headers,) = server.headers
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert not {name.lower() for name in headers} & {"x-secret", "openai-organization", "openai-project"}


NOW = 1_800_000_000.0
DATE = email.utils.formatdate(NOW, usegmt=True)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "3"}, 3),
        ({"retry-after": " 0.25 "}, 0.25),
        ({"retry-after": '"2"'}, 2),
        ({"retry-after": "2s"}, 2),
        ({"retry-after": "2, 2"}, 2),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m0s"}, 360),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "20ms"}, 0.02),
        ({"x-ratelimit-remaining-tokens": "9", "x-ratelimit-reset-tokens": "1h"}, None),
        ({"retry-after-ms": "1500"}, 1.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9),
        ({"retry-after": email.utils.formatdate(NOW + 20, usegmt=True), "date": DATE}, 20),
        ({"retry-after": email.utils.formatdate(NOW - 20, usegmt=True), "date": DATE}, None),
        ({"retry-after": "Fri, 15 Jan 2027 08:00:20", "date": DATE}, 20),
        ({"retry-after": "Fri, 31 Dec 9999 23:59:59 GMT", "date": DATE}, None),
        *(({"retry-after": text}, None) for text in NO_WAITS),
        ({}, None),
    ],
)  # fmt: skip
def test_the_wait_asked_for_is_read_in_every_form(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds


def test_a_date_without_the_server_s_clock_is_compared_with_ours() -> None:
    wait = retry_after({"retry-after": email.utils.formatdate(time.time() + 30, usegmt=True)})
    assert wait is not None
    assert 28 < wait <= 30
