"""A real HTTP teacher on loopback for tests: an OpenAI-compatible server whose answers a function decides.

    with Teacher(lambda body, n: numbered(tasks)) as teacher:
        run("generate", out, "--teacher", "mock", "--base-url", teacher.url)

The function gets the request's JSON and its number of arrival, and returns a text (the completion), a Reply (anything
else), or raises. Every request is recorded in ``requests``.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class Reply:
    """What the teacher does with one request: ``text`` as a completion, or ``body`` as it is."""

    text: str = ""
    finish: str | None = "stop"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    json: Any = None
    delay: float = 0.0
    close: bool = False


Answer = Callable[[dict[str, Any], int], "str | Reply"]


class Teacher:
    """The server, in a thread of its own, for as long as the context lasts."""

    def __init__(self, answer: Answer, *, delay: float = 0.0) -> None:
        self._answer, self._delay = answer, delay
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self.url = ""

    def __enter__(self) -> Teacher:
        started = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def _serve(self, started: threading.Event) -> None:
        async def main() -> None:
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            app = web.Application(client_max_size=1 << 26)
            app.router.add_post("/v1/chat/completions", self._handle)
            app.router.add_post("/v1/completions", self._handle)
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
            await runner.setup()
            transports: list[asyncio.Transport] = []
            server = await self._loop.create_server(lambda: _Remembered(runner.server, transports), "127.0.0.1", 0)
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            started.set()
            await self._stop.wait()
            for listening in server.sockets:
                self._loop.remove_reader(listening)
            await asyncio.sleep(0.005)  # asyncio loses a connection that it took right before its server closes
            server.close()
            await runner.cleanup()
            await _hang_up(transports)

        asyncio.run(main())

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        number = len(self.requests)
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            reply = self._answer(body, number)
            if isinstance(reply, str):
                reply = Reply(reply)
            if self._delay or reply.delay:
                await asyncio.sleep(reply.delay or self._delay)
            return self._response(request, body, reply)
        finally:
            self.in_flight -= 1

    def _response(self, request: web.Request, body: dict[str, Any], reply: Reply) -> web.Response:
        if reply.close and request.transport:
            request.transport.close()
        if reply.body is not None:
            return web.Response(body=reply.body, status=reply.status, headers=reply.headers)
        if reply.json is not None or reply.status != 200:
            said = reply.json if reply.json is not None else {"error": {"message": reply.text or "no"}}
            return web.json_response(said, status=reply.status, headers=reply.headers)
        choice: dict[str, Any] = {"index": 0, "finish_reason": reply.finish}
        if "messages" in body:
            choice["message"] = {"role": "assistant", "content": reply.text}
        else:
            choice["text"] = reply.text
        usage = {"prompt_tokens": 100, "completion_tokens": len(reply.text) // 4, "total_tokens": 0}
        return web.json_response({"model": body.get("model"), "choices": [choice], "usage": usage})


class _Remembered:
    """A handler of aiohttp's whose transport is kept in a list."""

    def __init__(self, server: Any, transports: list[asyncio.Transport]) -> None:
        self._handler, self._transports = server(), transports

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handler, name)

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transports.append(transport)
        self._handler.connection_made(transport)


async def _hang_up(transports: Sequence[asyncio.Transport]) -> None:
    """Close what aiohttp leaves open: connections taken at the last moment, and clients that do not read.

    Otherwise the garbage collector closes them later, and pytest blames the test that runs then.
    """
    while True:
        last = asyncio.all_tasks() == {asyncio.current_task()}  # nobody is left who could connect or begin to close
        for transport in transports:
            transport.abort()
        await asyncio.sleep(0.005)
        if last:
            return


def prompt_of(body: dict[str, Any]) -> str:
    """What a request says."""
    return str(body["prompt"]) if "prompt" in body else "\n".join(m["content"] for m in body["messages"])


def numbered(tasks: Sequence[Mapping[str, str]], first: int = 4) -> str:
    """Tasks in Stanford's numbered format, as it continues an open ``4. Instruction:``."""
    parts = [
        f"{n}. Instruction: {task['instruction']}\n"
        f"{n}. Input:\n{task['input'] or '<noinput>'}\n"
        f"{n}. Output:\n{task['output']}\n"
        for n, task in enumerate(tasks, start=first)
    ]
    return "###\n".join(parts).removeprefix(f"{first}. Instruction:")
