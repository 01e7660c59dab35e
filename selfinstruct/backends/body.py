"""Keeps a reply's body within bounds, unpacked: a 200 KB gzip bomb must not become 200 MB of memory."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator

import httpx2

from selfinstruct.errors import TransientFault

MAX_BODY_BYTES = 8 * 1024 * 1024


class LimitedStream(httpx2.AsyncByteStream):
    """Passes a body on, unpacked and counted; TransientFault when it grows beyond MAX_BODY_BYTES or is damaged."""

    def __init__(self, stream: httpx2.AsyncByteStream, *, packed: bool) -> None:
        self._stream = stream
        self._unpack = zlib.decompressobj(wbits=47) if packed else None  # 47: gzip or zlib, told by the header

    async def __aiter__(self) -> AsyncIterator[bytes]:
        total = 0
        async for chunk in self._stream:
            if self._unpack:
                try:
                    chunk = self._unpack.decompress(chunk, MAX_BODY_BYTES + 1 - total)
                except zlib.error as error:
                    raise TransientFault(f"the answer's packing is damaged ({error})") from None
            total += len(chunk)
            if total > MAX_BODY_BYTES:
                raise TransientFault(f"the answer is larger than {MAX_BODY_BYTES // 2**20} MiB")
            yield chunk
        if self._unpack and not self._unpack.eof:
            raise TransientFault("the answer's packing ends too early")

    async def aclose(self) -> None:
        await self._stream.aclose()


async def limit_body(response: httpx2.Response) -> None:
    """Response hook for the HTTP client: put the limit between the connection and the reader."""
    encoding = response.headers.get("content-encoding", "identity").lower()
    if encoding not in ("identity", "gzip", "deflate"):
        raise TransientFault(f"the answer is packed with {encoding[:40]!r}, which was not asked for")
    stream = response.stream
    if isinstance(stream, httpx2.AsyncByteStream):
        response.stream = LimitedStream(stream, packed=encoding != "identity")
        response.headers.pop("content-encoding", None)
