"""Server-sent events: a subclass of EventSourceResponse that writes bytes which are encoded already.

sse-starlette's own `__call__` runs four tasks per stream and encodes each event for each viewer; measured, that is most
of the CPU time and memory of a stream. This subclass has the same interface and headers, but runs one task that writes
and one that waits for the disconnect. https://html.spec.whatwg.org/multipage/server-sent-events.html
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
RETRY_LATER_MS = 10_000
_PIECE_BYTES = 256 * 2**10
"""How much is written at once, at most: the transport copies what it cannot send immediately."""
_PING = b":\n"
_RETRY_HINT = b"retry: %d\n\n" % RETRY_MS

# nginx buffers a response unless X-Accel-Buffering is `no`; others compress it, and so buffer it, unless `no-transform`
_HEADERS = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}

# else sse-starlette ends all streams within half a second of SIGTERM
AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]


def retry_later() -> Response:
    """Return a 200 with only a `retry:` hint, for a watcher that cannot be served now.

    After any status but 200 an EventSource does not reconnect. The response contains no data, so it needs no key.
    """
    return Response(b"retry: %d\n\n" % RETRY_LATER_MS, headers=_HEADERS, media_type="text/event-stream")


async def _no_events() -> AsyncIterator[bytes]:
    return
    yield b""


class EventStream(EventSourceResponse):
    """A response that writes a viewer's entries until the viewer ends, the client disconnects or the server stops.

    It also ends when its key is revoked; the client's next request gets the 401.

    Args:
        viewer: None for a stream without further events: a 200 that ends immediately.
        slot: the stream's slot in the organization's limit; the response releases it.
    """

    def __init__(
        self, streams: Streams, viewer: Viewer | None, slot: Slot, headers: Mapping[str, str] | None = None
    ) -> None:
        # some clients split at "\n\n" only: with the default CRLF they receive no event
        super().__init__(_no_events(), sep="\n", headers={**_HEADERS, **(headers or {})})
        del self.headers["Connection"]  # uvicorn decides: it sends `close` where it closes
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
                watcher = asyncio.create_task(_await_disconnect(receive, stream))
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
                await send({"type": "http.response.body", "body": _RETRY_HINT, "more_body": True})
                return
            if entries is None or stream.revoked:
                return
            body = b"".join([entry.encoded(sse_frame) for entry in entries])
            del entries  # a snapshot has megabytes, and its client may have stopped reading
            if stream.ping():
                body += _PING
            if self._streams.closing:
                body += _RETRY_HINT
            for start in range(0, len(body), _PIECE_BYTES):
                if not stream.gone:
                    piece = body[start : start + _PIECE_BYTES]
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            if self._streams.closing:
                return


async def _await_disconnect(receive: Receive, stream: Stream) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    stream.leave()
