"""Server-sent events: a lean EventSourceResponse that is fed with encoded bytes.

sse-starlette's own `__call__` runs four tasks per stream and encodes each event for each viewer; measured, that is
most of the CPU and memory of an idle or a busy stream. This subclass keeps its interface and headers, and runs one
pump and one watcher of `receive()`. https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

from sse_starlette import EventSourceResponse
from sse_starlette.sse import AppStatus
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from agent_chat.server.limits import Slot
from agent_chat.server.loop_share import begin_streaming
from agent_chat.server.reading.dialects.native import sse_frame
from agent_chat.server.reading.streams import Stream, Streams
from agent_chat.server.reading.viewer import Viewer
from agent_chat.stores.errors import StoreUnavailable

RETRY_MS = 1000
LATER_MS = 10_000
_PIECE = 256 * 2**10
"""At most so much is written at once: what the connection can't take it copies and keeps."""
_PING = b":\n"
_GOODBYE = b"retry: %d\n\n" % RETRY_MS

_HEADERS = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}

AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]


def later() -> Response:
    """What a watcher gets for whom there is no room now, or no database: come back. It tells nothing, so anybody may.

    Any status but 200 would close an EventSource for good.
    """
    return Response(b"retry: %d\n\n" % LATER_MS, headers=_HEADERS, media_type="text/event-stream")


async def _nothing() -> AsyncIterator[bytes]:
    return
    yield b""


class EventStream(EventSourceResponse):
    """A response that writes a viewer's entries until its reading ends, the client leaves, or the server stops.

    A key that was revoked ends it too: what its client asks next gets the 401. A null viewer is a stream with nothing
    left to say: 200 and a clean end.
    """

    def __init__(
        self, streams: Streams, viewer: Viewer | None, slot: Slot, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(_nothing(), sep="\n", headers={**_HEADERS, **(headers or {})})
        del self.headers["Connection"]  # the server's own: uvicorn sends `close` where it is
        self._streams = streams
        self._viewer = viewer
        self._slot = slot

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; release its slot when it ends."""
        try:
            await self._respond(scope, receive, send)
        finally:
            self._slot.release()

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if self._viewer is not None and scope["method"] == "HEAD":
            self._viewer.close()
        elif self._viewer is not None:
            with self._streams.open(self._viewer, scope["credential"], self._slot) as stream:
                watcher = asyncio.create_task(_watch(receive, stream))
                try:
                    await self._pump(stream, send)
                finally:
                    watcher.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pump(self, stream: Stream, send: Send) -> None:
        begin_streaming()
        while not stream.gone:
            try:
                entries = await stream.viewer.next()
            except StoreUnavailable:
                await send({"type": "http.response.body", "body": _GOODBYE, "more_body": True})
                return
            if entries is None or stream.revoked:
                return
            body = b"".join([entry.encoded(sse_frame) for entry in entries])
            del entries  # a snapshot is megabytes, and its reader may have stopped
            if stream.ping():
                body += _PING
            if self._streams.closing:
                body += _GOODBYE
            for start in range(0, len(body), _PIECE):
                if not stream.gone:
                    piece = body[start : start + _PIECE]
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            if self._streams.closing:
                return


async def _watch(receive: Receive, stream: Stream) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    stream.leave()
