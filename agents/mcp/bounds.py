"""Limits on what an MCP server may send: message sizes and rates, for both transports."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import httpx2

MESSAGE_BYTES = 4 * 2**20
"""The largest JSON-RPC message. It holds any list of tools, and results far beyond what is stored of them."""
TOO_LARGE_CODE = -32900
"""The error code of the response that replaces one above MESSAGE_BYTES over stdio. No server sends this code."""
TOO_LARGE_MESSAGE = "larger than a message may be"
"""Part of the error message over HTTP, where the SDK chooses the code."""


class TokenBucket:
    """A rate limit of `per_second` tokens, which is also the burst."""

    def __init__(self, per_second: float) -> None:
        self._per_second = per_second
        self._tokens = per_second
        self._refilled_at = time.monotonic()

    def take(self) -> bool:
        """Take one token. Return False if there is none."""
        now = time.monotonic()
        self._tokens = min(self._per_second, self._tokens + (now - self._refilled_at) * self._per_second)
        self._refilled_at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class BodyTooLarge(httpx2.StreamError):
    """A response body exceeds MESSAGE_BYTES. The SDK turns this into an error of the request."""

    def __init__(self) -> None:
        super().__init__(TOO_LARGE_MESSAGE)


class BoundedTransport(httpx2.AsyncHTTPTransport):
    """Limits the response bodies that the SDK reads whole. In an event stream the SDK limits each event instead."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request; reject a compressed response, and limit the body unless it is an event stream."""
        response = await super().handle_async_request(request)
        if "content-encoding" in response.headers:  # a small compressed body can decompress to any size
            await response.aclose()
            raise httpx2.RemoteProtocolError("The response is compressed, which was not accepted.", request=request)
        if not response.headers.get("content-type", "").lower().startswith("text/event-stream"):
            assert isinstance(response.stream, httpx2.AsyncByteStream)
            response.stream = _BoundedBody(response.stream)
        return response


class _BoundedBody(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        remaining = MESSAGE_BYTES
        async for chunk in self._stream:
            remaining -= len(chunk)
            if remaining < 0:
                raise BodyTooLarge
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()
