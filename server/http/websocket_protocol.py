"""uvicorn's WebSocket protocol with limits on what a client makes this process parse, queue and hold in memory.

uvicorn parses everything that a socket has received (256 KB at a time) before other tasks run, queues it frame by
frame, and writes a pong for each ping even if the client does not read. Here input is parsed in small pieces with other
tasks in between, and a piece of many small frames is followed by a pause. At most `QUEUED` messages are queued; until
the application receives them, the rest stays unparsed and nothing more is read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import CloseCode, Frame

if TYPE_CHECKING:
    from agent_chat.server.http.connections import State

PIECE = 1024
QUEUED = 64
_MAX_FRAMES = 16
"""A piece with more frames than this is followed by a pause."""
_PAUSE_SECONDS = 0.05
_SLICE_SECONDS = 0.002
_INTERVAL_SECONDS = 0.01
_MAX_FRAGMENTS = 4096
"""The limit for one message: its size is limited already, but fragments may be empty."""
_AFTER_CLOSE_BYTES = 64 * 2**10


class Slices:
    """Schedules sockets that have more to parse than fits into two milliseconds: one of all sockets every 10 ms.

    So parsing the input of all WebSockets takes at most a fifth of the event loop.
    """

    def __init__(self) -> None:
        self._next = 0.0

    def delay(self, now: float) -> float:
        """Reserve a slice. Returns the seconds until it begins."""
        self._next = max(self._next, now) + _INTERVAL_SECONDS
        return self._next - now


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """One connection, from the upgrade on.

    Attributes:
        slices: the schedule that all sockets of the process share; the HTTP protocol sets it after the upgrade.
        state_seen, state_since: see `connections.Connection`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.state_seen: State = ("", 0)
        self.state_since = 0.0
        self.slices = Slices()
        self._unparsed = bytearray()
        self._scheduled: asyncio.Handle | None = None
        self._frames = 0
        self._after_close = 0

    def state(self) -> State:
        if self.transport.is_closing():
            return "closing", 0
        if not self.handshake_complete:
            return "head", 0
        if not self.writable.is_set():
            return "sending", self.transport.get_write_buffer_size()
        return "working", 0

    def expire(self, name: str) -> None:
        self.abort()

    def abort(self) -> None:
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unparsed.clear()
        if self._scheduled is not None:
            self._scheduled.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self.handshake_initiated:  # the upgrade request: the HTTP protocol has checked its size
            super().data_received(data)
            return
        if self.close_sent:
            self._after_close += len(data)
            if self._after_close > _AFTER_CLOSE_BYTES:
                self.abort()
                return
        self._unparsed += data
        if self._scheduled is None:
            self._parse()

    def _parse(self) -> None:
        """Parse for at most two milliseconds, then wait for the next slice."""
        self._scheduled = None
        until = self.loop.time() + _SLICE_SECONDS
        while self._unparsed and self._has_room() and not self.transport.is_closing():
            piece = bytes(self._unparsed[:PIECE])
            del self._unparsed[:PIECE]
            self._frames = 0
            super().data_received(piece)
            now = self.loop.time()
            if self._frames > _MAX_FRAMES or now > until:
                delay = self.slices.delay(now)
                self._schedule(
                    self.loop.call_later, max(delay, _PAUSE_SECONDS) if self._frames > _MAX_FRAMES else delay
                )
                break
        if self.transport.is_closing():
            self._unparsed.clear()
        elif self._unparsed:
            self.read_paused = True
            self.transport.pause_reading()
        else:
            self._resume_reading()

    def _has_room(self) -> bool:
        return self.queue.qsize() < QUEUED or self.close_sent  # then messages are dropped

    def _resume_reading(self) -> None:
        if self.read_paused and (self.queue.empty() or self.close_sent):
            self.read_paused = False
            self.transport.resume_reading()

    def _schedule(self, call: Callable[..., asyncio.Handle], *delay: float) -> None:
        self._scheduled = call(*delay, self._parse)

    def handle_events(self) -> None:
        self._frames += len(self.conn.events)
        super().handle_events()

    def handle_ping(self) -> None:
        if self.writable.is_set():
            super().handle_ping()
        else:  # RFC 6455, 5.5.3: a pong may be omitted; this client does not read them
            self.conn.data_to_send()

    def handle_cont(self, event: Frame) -> None:
        if len(self.frames) >= _MAX_FRAGMENTS:
            self._fail(CloseCode.MESSAGE_TOO_BIG, "too many fragments")
            return
        super().handle_cont(event)

    def send_receive_event_to_app(self) -> None:
        if self.curr_msg_data_type == "text":
            try:
                b"".join(self.frames).decode()
            except UnicodeDecodeError:
                self._fail(CloseCode.INVALID_DATA, "invalid UTF-8")
                return
        super().send_receive_event_to_app()

    def _fail(self, code: CloseCode, reason: str) -> None:
        self.frames = []
        if not self.close_sent:
            self.conn.fail(code, reason)
            self.handle_parser_exception()

    async def send(self, message: Any) -> None:
        await super().send(message)
        if self.close_sent and self._scheduled is None and not self.transport.is_closing():
            self._parse()  # the client's close follows what the application did not receive

    async def receive(self) -> Any:
        """Return the next message. Reading continues when the queue is empty and all input is parsed."""
        message = await self.queue.get()
        if not self._unparsed:
            self._resume_reading()
        elif self.queue.empty() and self._scheduled is None:
            self._schedule(self.loop.call_soon)
        return message
