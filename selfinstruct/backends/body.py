"""Keeps a reply's body within bounds, unpacked: a 200 KB gzip bomb must not become 200 MB of memory."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator

import httpx2

from selfinstruct.errors import UnusableAnswer

MAX_BODY_BYTES = 8 * 1024 * 1024
MAX_ERROR_BYTES = 64 * 1024  # of an error's body, which is only quoted
_PACKED = ("gzip", "deflate")


class LimitedStream(httpx2.AsyncByteStream):
    """Passes a body on, unpacked and counted, up to ``limit`` bytes.

    Beyond that, and when the packing is damaged, an answer is an UnusableAnswer; an error's body just ends there, for
    its status and headers count more.
    """

    def __init__(self, stream: httpx2.AsyncByteStream, *, encoding: str, is_error: bool) -> None:
        self._stream = stream
        self._encoding = encoding
        self._is_error = is_error
        self._limit = MAX_ERROR_BYTES if is_error else MAX_BODY_BYTES

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._bounded():
                yield chunk
        except UnusableAnswer:
            if not self._is_error:
                raise

    async def _bounded(self) -> AsyncIterator[bytes]:
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
