"""What may come in from an MCP server: sizes and rates, for both transports."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import httpx2

MESSAGE_BYTES = 4 * 2**20
"""One JSON-RPC message: enough for any list of tools, and for a result whose beginning is worth keeping."""
TOO_LARGE = -32900
"""The code of the error that takes the place of a response above MESSAGE_BYTES. Ours: no server sends it."""
TOO_LARGE_WORDS = "larger than a message may be"
"""In the message of that error over HTTP, where the SDK chooses the code."""


class Rate:
    """A token bucket: so many a second, and as many at once."""

    def __init__(self, per_second: float) -> None:
        self._per_second = per_second
        self._left = per_second
        self._at = time.monotonic()

    def take(self) -> bool:
        """Take one, if there is one."""
        now = time.monotonic()
        self._left = min(self._per_second, self._left + (now - self._at) * self._per_second)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class TooLarge(httpx2.StreamError):
    """A response body is larger than MESSAGE_BYTES. The SDK turns it into an error of the request."""

    def __init__(self) -> None:
        super().__init__(TOO_LARGE_WORDS)


class BoundedTransport(httpx2.AsyncHTTPTransport):
    """Bounds the bodies that the SDK reads whole. An event stream may go on: there the SDK bounds each event."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request; refuse a compressed response, and bound the body unless it is an event stream."""
        response = await super().handle_async_request(request)
        if "content-encoding" in response.headers:  # none was accepted, and it may unpack to any size
            await response.aclose()
            raise httpx2.RemoteProtocolError("The response is compressed, which was not accepted.", request=request)
        if not response.headers.get("content-type", "").lower().startswith("text/event-stream"):
            assert isinstance(response.stream, httpx2.AsyncByteStream)
            response.stream = _Bounded(response.stream)
        return response


class _Bounded(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        left = MESSAGE_BYTES
        async for piece in self._stream:
            left -= len(piece)
            if left < 0:
                raise TooLarge
            yield piece

    async def aclose(self) -> None:
        await self._stream.aclose()
