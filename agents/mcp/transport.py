"""The streams of one connection to an MCP server, over stdio or HTTP, with what comes in repaired and bounded.

Below is the SDK, which validates a whole page of tools as one and starts a task for every notification; above is the
connection (agents/mcp/connection.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Self

import httpx2
from mcp.client.streamable_http import streamable_http_client
from mcp.types import JSONRPCNotification, JSONRPCRequest, JSONRPCResponse

from agent_chat.agents.mcp.bounds import MESSAGE_BYTES, BoundedTransport, TokenBucket
from agent_chat.agents.mcp.config import Server
from agent_chat.agents.mcp.process import stdio_streams
from agent_chat.agents.mcp.tools import repaired

if TYPE_CHECKING:
    from mcp.client._transport import ReadStream, TransportStreams
    from mcp.shared.message import SessionMessage

UNASKED_PER_SECOND = 100
"""Notifications and requests of one server that are passed on; progress is shown at most a few times a second."""
_PACE_SECONDS = 0.01
_PACE_EVERY = 100
_DROPPABLE = ("notifications/progress", "notifications/message")


class Incoming:
    """A transport's incoming stream: repairs lists of tools, thins out floods, and reports its end.

    The SDK reports the end only to whoever waits for a response.

    Args:
        ended: called once the stream has ended. Over HTTP a broken transport raises instead.
    """

    def __init__(self, stream: ReadStream[SessionMessage | Exception], ended: Callable[[], None]) -> None:
        self._stream = stream
        self._ended = ended
        self._unasked = TokenBucket(UNASKED_PER_SECOND)
        self._dropped = 0

    async def receive(self) -> SessionMessage | Exception:
        """Receive the next message."""
        return await self._stream.receive()

    async def aclose(self) -> None:
        """Close the stream."""
        await self._stream.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> SessionMessage | Exception:
        while True:
            try:
                item = await self._stream.__anext__()
            except StopAsyncIteration:
                self._ended()
                raise
            if isinstance(item, Exception) or await self._passes(item):
                return item

    async def _passes(self, item: SessionMessage) -> bool:
        match item.message:
            case JSONRPCResponse() as response:
                response.result = repaired(response.result)
                return True
            case JSONRPCRequest():
                return self._unasked.take() or await self._drop()
            case JSONRPCNotification(method=method):
                if self._unasked.take():
                    return True
                if method in _DROPPABLE:
                    return await self._drop()
                await asyncio.sleep(_PACE_SECONDS)
        return True

    async def _drop(self) -> bool:
        """Drop it, and take no more than so many a second from whoever sends nothing else."""
        self._dropped += 1
        if self._dropped % _PACE_EVERY == 0:
            await asyncio.sleep(_PACE_SECONDS)
        return False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


@asynccontextmanager
async def open_transport(
    name: str, server: Server, ended: Callable[[], None], *, connect_seconds: float
) -> AsyncIterator[TransportStreams]:
    """Open the server's streams. Raises: OSError if its command cannot be started."""
    if server.url is None:
        async with stdio_streams(name, server) as (incoming, outgoing):
            yield Incoming(incoming, ended), outgoing
        return
    timeout = httpx2.Timeout(connect_seconds, read=max(300.0, server.timeout + 10))
    # A call that waits for a free connection in vain would end all the others: the SDK lets the error through.
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=20)
    headers = {"Accept-Encoding": "identity", **server.headers}
    async with (
        httpx2.AsyncClient(headers=headers, timeout=timeout, transport=BoundedTransport(limits=limits)) as http,
        streamable_http_client(server.url, http_client=http, max_sse_event_size=MESSAGE_BYTES) as (incoming, outgoing),
    ):
        yield Incoming(incoming, ended), outgoing
