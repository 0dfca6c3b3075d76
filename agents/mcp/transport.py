"""The streams of one connection to an MCP server, over stdio or HTTP, with repaired and limited incoming messages.

The SDK reads these streams for the connection (agents/mcp/connection.py). It rejects a whole page of tools for one
invalid tool, and starts a task for every notification, so both are handled before it sees the messages.
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
from agent_chat.agents.mcp.tools import repair_tool_list

if TYPE_CHECKING:
    from mcp.client._transport import ReadStream, TransportStreams
    from mcp.shared.message import SessionMessage

UNSOLICITED_PER_SECOND = 100
"""The limit on a server's notifications and requests; progress is published at most a few times a second."""
_PAUSE_SECONDS = 0.01
_DROPS_PER_PAUSE = 100
_DROPPABLE = ("notifications/progress", "notifications/message")


class IncomingMessages:
    """A transport's incoming stream. It repairs lists of tools, drops messages above the limit, and reports its end.

    The SDK itself reports the end of the stream only to requests in progress.

    Args:
        stream: the transport's stream.
        on_end: called when the stream has ended. Over HTTP a failed transport raises instead.
    """

    def __init__(self, stream: ReadStream[SessionMessage | Exception], on_end: Callable[[], None]) -> None:
        self._stream = stream
        self._on_end = on_end
        self._unsolicited = TokenBucket(UNSOLICITED_PER_SECOND)
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
                self._on_end()
                raise
            if isinstance(item, Exception) or await self._accept(item):
                return item

    async def _accept(self, item: SessionMessage) -> bool:
        match item.message:
            case JSONRPCResponse() as response:
                response.result = repair_tool_list(response.result)
                return True
            case JSONRPCRequest():
                return self._unsolicited.take() or await self._drop()
            case JSONRPCNotification(method=method):
                if self._unsolicited.take():
                    return True
                if method in _DROPPABLE:
                    return await self._drop()
                await asyncio.sleep(_PAUSE_SECONDS)
        return True

    async def _drop(self) -> bool:
        """Count a dropped message. Pauses now and then, so that a flood does not occupy the event loop."""
        self._dropped += 1
        if self._dropped % _DROPS_PER_PAUSE == 0:
            await asyncio.sleep(_PAUSE_SECONDS)
        return False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


@asynccontextmanager
async def open_transport(
    name: str, server: Server, on_end: Callable[[], None], *, connect_seconds: float
) -> AsyncIterator[TransportStreams]:
    """Open the server's streams. Raises: OSError if its command cannot be started."""
    if server.url is None:
        async with stdio_streams(name, server) as (incoming, outgoing):
            yield IncomingMessages(incoming, on_end), outgoing
        return
    timeout = httpx2.Timeout(connect_seconds, read=max(300.0, server.timeout + 10))
    # No limit on connections: a PoolTimeout of one call would pass through the SDK and end all the others.
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=20)
    headers = {"Accept-Encoding": "identity", **server.headers}
    async with (
        httpx2.AsyncClient(headers=headers, timeout=timeout, transport=BoundedTransport(limits=limits)) as http,
        streamable_http_client(server.url, http_client=http, max_sse_event_size=MESSAGE_BYTES) as (incoming, outgoing),
    ):
        yield IncomingMessages(incoming, on_end), outgoing
