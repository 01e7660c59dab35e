"""Keeps a reply's body within bounds, unpacked: a 200 KB gzip bomb must not become 200 MB of memory."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import AsyncGenerator, AsyncIterator

import httpx2

from selfinstruct.errors import UnusableAnswer

MAX_BODY_BYTES = 8 * 1024 * 1024
MAX_ERROR_BYTES = 64 * 1024  # of an error's body, which is only quoted
ERROR_SECONDS = 5.0  # for the whole of it
_PACKED = ("gzip", "deflate")


class LimitedStream(httpx2.AsyncByteStream):
    """Passes a body on, unpacked and counted, up to ``limit`` bytes.

    Beyond that, and when the packing is damaged, an answer is an UnusableAnswer. An error's body just ends there, also
    when it is cut or does not come: its status and headers count more.
    """

    def __init__(self, stream: httpx2.AsyncByteStream, *, encoding: str, is_error: bool) -> None:
        self._stream = stream
        self._encoding = encoding
        self._is_error = is_error
        self._limit = MAX_ERROR_BYTES if is_error else MAX_BODY_BYTES

    async def __aiter__(self) -> AsyncIterator[bytes]:
        chunks = self._bounded()
        if not self._is_error:
            async for chunk in chunks:
                yield chunk
            return
        deadline = time.monotonic() + ERROR_SECONDS
        while True:
            try:
                chunk = await asyncio.wait_for(anext(chunks), deadline - time.monotonic())
            except (StopAsyncIteration, TimeoutError, UnusableAnswer, httpx2.HTTPError, httpx2.StreamError):
                return
            yield chunk

    async def _bounded(self) -> AsyncGenerator[bytes, None]:
        if self._encoding not in ("identity", *_PACKED):
            raise UnusableAnswer(f"the answer is packed with {self._encoding[:40]!r}, which was not asked for")
        unpack = zlib.decompressobj(wbits=47) if self._encoding in _PACKED else None  # 47: gzip or zlib, by its header
        total = 0
        async for chunk in self._stream:
            if unpack:
                try:
                    chunk = unpack.decompress(chunk, self._limit + 1 - total)
                except zlib.error as error:
                    raise UnusableAnswer(f"the answer's packing is damaged ({error})") from None
            total += len(chunk)
            if total > self._limit:
                raise UnusableAnswer(f"the answer is larger than {self._limit // 2**20} MiB")
            yield chunk
        if unpack and not unpack.eof:
            raise UnusableAnswer("the answer's packing ends too early")

    async def aclose(self) -> None:
        await self._stream.aclose()


async def limit_body(response: httpx2.Response) -> None:
    """Response hook for the HTTP client: put the limit between the connection and the reader."""
    stream = response.stream
    if isinstance(stream, httpx2.AsyncByteStream):
        encoding = response.headers.pop("content-encoding", "identity").strip().lower()
        response.stream = LimitedStream(stream, encoding=encoding, is_error=response.status_code >= 300)
