"""A student behind an OpenAI-compatible endpoint on loopback: /v1/models, /v1/chat/completions, /v1/completions.

Requests run together as they come (see ``engine``). A web page must not reach the server through the user's browser:
requests with a foreign Host (a name rebound to 127.0.0.1) or Origin get 403. Beyond loopback nothing is served without
a token.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from selfinstruct.backends.base import is_loopback_host
from selfinstruct.errors import SelfInstructError, ServerError, UsageError
from selfinstruct.student.infer.live import LiveEngine
from selfinstruct.student.infer.reply import Reply
from selfinstruct.student.infer.requests import Request, TokenLogprobs
from selfinstruct.student.infer.sampling import Sampling
from selfinstruct.student.infer.token_names import TokenNames
from selfinstruct.student.prompt import Template
from selfinstruct.student.serve.serve_answers import Piece, Shape, Whole, error_body
from selfinstruct.student.serve.serve_requests import Asked, Reader, TooLong

_SEEN = 8  # tokens of a prompt that tell how a completion's first one is written
_BODY_BYTES = 8 * 1024 * 1024
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Service:
    """What is served. ``name`` is the model's name in requests, ``context`` the longest prompt and reply in tokens.

    ``token``: every request must carry it; "" for none.
    """

    live: LiveEngine
    tokenizer: Any
    template: Template
    name: str
    context: int
    token: str = ""


class UnknownModel(UsageError):
    """A request for another model than the one that is served."""


def application(service: Service, *, any_host: bool = False) -> web.Application:
    """The web application. ``any_host``: a server beyond loopback, where the token guards instead of the Host."""
    app = web.Application(client_max_size=_BODY_BYTES, middlewares=[_guard(service.token, any_host=any_host), _errors])
    routes = _Routes(service)
    app.router.add_get("/health", routes.health)
    app.router.add_get("/v1/models", routes.models)
    app.router.add_get("/v1/models/{name}", routes.model)
    app.router.add_post("/v1/chat/completions", routes.chat)
    app.router.add_post("/v1/completions", routes.completions)
    app.on_cleanup.append(routes.close)
    return app


def _guard(token: str, *, any_host: bool) -> Any:
    @web.middleware
    async def guard(request: web.Request, handler: _Handler) -> web.StreamResponse:
        if not any_host and not is_loopback_host(_host(f"//{request.headers.get('Host', '')}")):
            return _refusal(403, "this server answers requests to localhost only", "forbidden")
        origin = request.headers.get("Origin")
        if origin is not None and not is_loopback_host(_host(origin)):
            return _refusal(403, "this server does not answer web pages", "forbidden")
        given = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if token and not hmac.compare_digest(given.encode("utf-8", "replace"), token.encode()):
            return _refusal(401, "the token is missing or wrong", "authentication_error", "invalid_api_key")
        return await handler(request)

    return guard


def _host(url: str) -> str:
    """The host in a URL, "" in what is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


@web.middleware
async def _errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except TooLong as error:
        return _refusal(400, error.message, "invalid_request_error", "context_length_exceeded")
    except UnknownModel as error:
        return _refusal(404, error.message, "invalid_request_error", "model_not_found")
    except UsageError as error:
        said = f"{error.message}; {error.hint}" if error.hint else error.message
        return _refusal(400, said, "invalid_request_error")
    except SelfInstructError as error:
        return _refusal(503, error.message, "server_error")
    except web.HTTPException as error:
        return _refusal(error.status, error.reason, "invalid_request_error")


def _refusal(status: int, message: str, kind: str, code: str | None = None) -> web.Response:
    return web.json_response(error_body(message, kind, code), status=status)


class _Routes:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._names = TokenNames(service.tokenizer)
        self._reader = Reader(service.template, service.tokenizer, service.context)
        # One thread, one body at a time: a tokenizer is set up anew for each kind of text.
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="reader")

    async def close(self, _app: web.Application) -> None:
        """Read no more."""
        self._reading.shutdown(wait=False, cancel_futures=True)

    async def health(self, _request: web.Request) -> web.Response:
        running, waiting = self._service.live.load
        good = self._service.live.failure is None
        body = {"status": "ok" if good else "failed", "running": running, "waiting": waiting}
        return web.json_response(body, status=200 if good else 503)

    async def models(self, _request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._about()]})

    async def model(self, request: web.Request) -> web.Response:
        self._check_name(request.match_info["name"])
        return web.json_response(self._about())

    def _about(self) -> dict[str, Any]:
        about = {"id": self._service.name, "object": "model", "created": 0, "owned_by": "selfinstruct"}
        return {**about, "max_model_len": self._service.context}

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._run(request, await self._read(request, self._reader.chat))

    async def completions(self, request: web.Request) -> web.StreamResponse:
        return await self._run(request, await self._read(request, self._reader.completion))

    async def _read(self, request: web.Request, read: Callable[[Any], Asked]) -> Asked:
        """Read the body beside the event loop, where a long one would hold up everybody."""
        try:
            body = await request.read()
        except web.RequestPayloadError:
            raise UsageError("the body is no JSON") from None
        return await asyncio.get_running_loop().run_in_executor(self._reading, self._read_body, body, read)

    def _read_body(self, content: bytes, read: Callable[[Any], Asked]) -> Asked:
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):
            raise UsageError("the body is no JSON") from None
        name = body.get("model") if isinstance(body, dict) else None
        if name is not None:
            self._check_name(name)
        asked = read(body)
        for prompt in asked.prompts:
            self._service.live.check(prompt)
        return asked

    def _check_name(self, name: Any) -> None:
        if name != self._service.name:
            raise UnknownModel(f"there is no model {str(name)[:100]!r} here, only {self._service.name!r}")

    async def _run(self, request: web.Request, asked: Asked) -> web.StreamResponse:
        jobs = [
            (prompt, place * asked.n + choice, asked.seed(choice))
            for place, prompt in enumerate(asked.prompts)
            for choice in range(asked.n)
        ]
        shape = Shape(self._service.name, self._names, asked.is_chat, asked.top_logprobs)
        counted = sum(len(prompt) for prompt in asked.prompts)
        if asked.stream:
            return await self._stream(request, asked, jobs, shape, counted)
        # A client that leaves cancels this handler, and with it the requests.
        tasks = [asyncio.create_task(self._whole(asked, *job)) for job in jobs]
        try:
            wholes = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return web.json_response(shape.answer(wholes, counted))

    async def _whole(self, asked: Asked, prompt: tuple[int, ...], index: int, seed: int) -> Whole:
        made = Whole("", "length")
        async with aclosing(self._pieces(asked, prompt, index, seed)) as pieces:
            async for piece in pieces:
                made.text += piece.text
                made.tokens += piece.tokens
                made.starts += piece.starts
                made.logprobs += piece.logprobs
                made.new_tokens += piece.new_tokens
                made.finish = piece.finish or made.finish
        return made

    async def _pieces(
        self, asked: Asked, prompt: tuple[int, ...], index: int, seed: int
    ) -> AsyncGenerator[Piece, None]:
        """One choice as it comes; a stop text ends it, and what would follow is not computed."""
        how = asked.sampling
        room = self._service.context - len(prompt)
        request = Request(
            0,
            prompt,
            min(room, asked.max_new_tokens or room),
            Sampling(how.temperature, how.top_p, how.min_p, seed),
            asked.top_logprobs is not None,
        )
        # A completion goes on with the prompt's text: its first word keeps the space that stands before it.
        reply = Reply(self._service.tokenizer, asked.stop, () if asked.is_chat else prompt[-_SEEN:])
        told, tokens, logprobs = 0, list[int](), list[TokenLogprobs]()
        async with aclosing(self._service.live.stream(request)) as stream:
            async for news in stream:
                text = reply.feed(news.tokens)
                if news.ended:
                    text += reply.end()
                tokens += news.tokens
                logprobs += news.logprobs
                # Tokens come with their text: what is held back may turn out to be a stop.
                fresh = slice(told, reply.tokens_shown)
                told = reply.tokens_shown
                finish = "stop" if reply.stopped else news.ended
                yield Piece(
                    index, text, tuple(tokens[fresh]), tuple(reply.starts[fresh]), tuple(logprobs[fresh]),
                    finish, len(news.tokens),
                )  # fmt: skip
                if finish:
                    return

    async def _stream(
        self, request: web.Request, asked: Asked, jobs: Sequence[Any], shape: Shape, counted: int
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(request)
        events: asyncio.Queue[Piece | SelfInstructError] = asyncio.Queue()
        tasks = [asyncio.create_task(self._forward(asked, job, events)) for job in jobs]
        try:
            open_choices, begun, new = len(jobs), set[int](), 0
            while open_choices:
                piece = await events.get()
                if isinstance(piece, SelfInstructError):
                    await _event(response, error_body(piece.message, "server_error"))
                    break
                if piece.text or piece.finish or piece.tokens:
                    await _event(response, shape.piece(piece, first=piece.index not in begun))
                    begun.add(piece.index)
                new += piece.new_tokens
                open_choices -= piece.finish is not None
            if asked.usage_in_stream:
                await _event(response, shape.usage_event(counted, new))
            await response.write(b"data: [DONE]\n\n")
        except ConnectionError:
            pass  # the client left; its requests are cancelled below
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return response

    async def _forward(self, asked: Asked, job: Any, events: asyncio.Queue[Piece | SelfInstructError]) -> None:
        try:
            async with aclosing(self._pieces(asked, *job)) as pieces:
                async for piece in pieces:
                    events.put_nowait(piece)
        except SelfInstructError as error:
            events.put_nowait(error)
        except Exception as error:  # noqa: BLE001 (the task's border: no one else hears of it, and the client would wait)
            events.put_nowait(ServerError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))


async def _event(response: web.StreamResponse, body: dict[str, Any]) -> None:
    await response.write(f"data: {json.dumps(body)}\n\n".encode())
