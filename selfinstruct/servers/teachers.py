"""From a teacher's name to a backend that answers: checks first (nothing is sent), servers up, servers down."""

from __future__ import annotations

import asyncio
import secrets
import socket
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from selfinstruct.backends import scripted
from selfinstruct.backends.base import Backend, is_loopback
from selfinstruct.config import OPENAI_URL, RunConfig, host_of, url_hosts
from selfinstruct.errors import MissingKey, TeacherUnreachable, UsageError
from selfinstruct.servers import models

_CONNECT_SECONDS = 5.0
_PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")


@dataclass(frozen=True, slots=True)
class Teacher:
    """What a run needs to know to reach its teacher; found by ``check`` before anything is written or sent.

    ``api_key`` is never shown: ``repr`` leaves it out. ``model_file`` is set for a local model.
    """

    base_urls: tuple[str, ...]
    api_key: str | None
    model_file: Path | None
    about: str

    def __repr__(self) -> str:
        return f"Teacher({self.about})"


def check(config: RunConfig, environment: Mapping[str, str]) -> Teacher:
    """See that the teacher can be asked: key there, model file there, port open. No request is sent.

    Raises UsageError, MissingKey, ModelFileError or TeacherUnreachable, each with its remedy.
    """
    kind = config.teacher_kind
    if kind == "scripted":
        _script(config)
        return Teacher((), None, None, f"{config.teacher} (canned replies, no model)")
    if kind == "local":
        name = config.teacher.partition(":")[2]
        path = models.find(name)
        return Teacher((), None, path, f"{config.teacher} (on this machine, nothing is paid)")
    urls = config.base_url or (OPENAI_URL,)
    key = _key(config, environment, urls)
    if all(is_loopback(url) for url in urls) or not _proxied():
        _check_reachable(urls)
    sends = f"key from {config.api_key_env}" if key else "no key"
    return Teacher(urls, key, None, f"{config.teacher} at {', '.join(url_hosts(urls))} ({sends})")


@asynccontextmanager
async def open_teacher(
    config: RunConfig, teacher: Teacher, *, on_trouble: Callable[[str], None], on_closed: Callable[[str], None]
) -> AsyncIterator[Backend]:
    """The backend for a checked teacher; a local server is up for as long as the context lasts.

    ``on_trouble`` is told what is being waited for, ``on_closed`` when one of several endpoints will not serve us.
    """
    kind = config.teacher_kind
    if kind == "scripted":
        yield _script(config)
        return
    if kind == "local" and teacher.model_file is not None:
        from selfinstruct.servers.llama_cpp import LlamaCppServer

        slots = config.concurrency or 8
        context = (config.max_new_tokens or 256) + 1024 * (1 + config.shots // 4)
        key = secrets.token_urlsafe(16)  # other users of this machine, and web pages, have no business there
        server = LlamaCppServer(teacher.model_file, slots=slots, context_per_slot=context, api_key=key)
        try:
            url = await asyncio.to_thread(server.start)
            async with aclosing(_http(config, (url,), key, "json_schema", on_trouble, on_closed)) as backend:
                yield backend
        finally:
            await asyncio.to_thread(server.stop)
        return
    remote = _http(config, teacher.base_urls, teacher.api_key, "response_format", on_trouble, on_closed)
    async with aclosing(remote) as backend:
        yield backend


def _script(config: RunConfig) -> scripted.ScriptedBackend:
    path = config.teacher.partition(":")[2]
    return scripted.from_file(Path(path)) if path else scripted.invented()


def _http(
    config: RunConfig,
    urls: tuple[str, ...],
    key: str | None,
    schema_style: Literal["response_format", "json_schema"],
    on_trouble: Callable[[str], None],
    on_closed: Callable[[str], None],
) -> Backend:
    from selfinstruct.backends.endpoints import Endpoints
    from selfinstruct.backends.http import HttpBackend, Sampling
    from selfinstruct.backends.retry import RetryingBackend

    sampling = Sampling(config.temperature, config.top_p, config.min_p)
    backends = [
        HttpBackend(
            base_url=url,
            model=config.teacher,
            api_key=key,
            api=config.api or "chat",
            sampling=sampling,
            timeout=config.timeout,
            max_in_flight=config.concurrency or 32,
            # OpenAI's newer models refuse the old name, and many compatible servers do not know the new one.
            token_limit_name="max_completion_tokens" if _is_openai(url) and config.api == "chat" else "max_tokens",
            schema_style=schema_style if config.api == "completions" else "response_format",
        )
        for url in urls
    ]
    return RetryingBackend(Endpoints(backends, on_closed=on_closed), patience=config.patience, on_trouble=on_trouble)


def _is_openai(url: str) -> bool:
    return urlsplit(url).hostname == urlsplit(OPENAI_URL).hostname


def _key(config: RunConfig, environment: Mapping[str, str], urls: tuple[str, ...]) -> str | None:
    """The key's value; None for a server that was given without one."""
    key = environment.get(config.api_key_env, "").strip()
    named = config.api_key_env != RunConfig.model_fields["api_key_env"].default
    if not key:
        if named or any(_is_openai(url) for url in urls):
            raise MissingKey(
                f"the variable {config.api_key_env} is not set, and {config.teacher!r} needs a key",
                hint=f"export {config.api_key_env}=... (or name another variable with --api-key-env)",
            )
        return None
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(f"the key in {config.api_key_env} holds characters that no HTTP header can carry")
    for url in urls:
        parts = urlsplit(url)
        if parts.scheme == "http" and not is_loopback(url) and not config.allow_plain_http:
            raise UsageError(
                f"the key in {config.api_key_env} would go to {parts.netloc} unencrypted",
                hint="use https, unset the variable, or accept it with --allow-plain-http",
            )
    return key


def _proxied() -> bool:
    """Whether the environment names a proxy. UsageError for one that the client cannot use; its password is not shown.

    A proxy for another scheme than the teacher's counts: the client refuses to begin with it.
    """
    found = urllib.request.getproxies()
    for kind in ("http", "https", "all"):
        proxy = found.get(kind, "")
        url = proxy if "://" in proxy else f"http://{proxy}"
        if proxy and (not host_of(url) or urlsplit(url).scheme not in _PROXY_SCHEMES):
            raise UsageError(
                f"the proxy in {kind.upper()}_PROXY is none that can be used",
                hint="write http://host:port (or https, socks5, socks5h), or unset the variable",
            )
    return bool(found)


def _check_reachable(urls: tuple[str, ...]) -> None:
    """Connect to each endpoint's port and hang up. One that listens is enough: the others may come later."""
    problems = []
    for url in urls:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            socket.create_connection((parts.hostname or "", port), timeout=_CONNECT_SECONDS).close()
            return
        except OSError as error:
            problems.append(f"{parts.hostname}:{port}: {error.strerror or error}")
    raise TeacherUnreachable(
        "cannot reach the teacher: " + "; ".join(problems), hint="is the server running? check --base-url"
    )
