"""uvicorn's HTTP protocol with bounds: on a request's head and trailers, on pipelined requests, and a state to time.

What cannot be served is refused here, before any application: 400, 408, 431, and 503 when the process is full. While an
earlier request of the connection is being answered nothing can be written in between: then the connection is aborted.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import httptools
import msgspec
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from agent_chat.server.http.problems import Problem
from agent_chat.server.http.websocket_protocol import WebSocketProtocol

if TYPE_CHECKING:
    from agent_chat.server.http.connections import Connections, State

HEALTH = ("/healthz", "/readyz", "/metrics")

_TOO_LARGE = Problem(431, "too_large", "The request's head is too large.")
_MALFORMED = Problem(400, "malformed_body", "This is not a valid HTTP request.")
_TOO_SLOW = Problem(408, "too_slow", "The request did not arrive in time.")
_FULL = Problem(
    503, "overloaded", "This server has as many connections as it may have; try again.", headers={"Retry-After": "2"}
)


class _Refused(Exception):
    """Raised in a callback of the parser, which ends its work."""


class HTTPProtocol(HttpToolsProtocol):
    """One connection. `connections` is the process's."""

    def __init__(self, *, connections: Connections, **options: Any) -> None:
        super().__init__(**options)
        self.state_seen: State = ("", 0)
        self.state_since = 0.0
        self._all = connections
        self._limits = connections.limits
        self._admitted = True
        self._running: RequestResponseCycle | None = None
        self._part = ""
        self._requests = 0
        self._head_bytes = 0
        self._overhead = 0  # received since the last part of a body, or the last end of a head or a message
        self._body_bytes = 0

    def state(self) -> State:
        if self.transport.is_closing():
            return "closing", 0
        if self.flow.write_paused:
            return "sending", self.transport.get_write_buffer_size()
        if self._part == "head" and not self.flow.read_paused:
            return "head", self._requests
        responding = self._is_responding()
        if self._part == "body":
            if not responding:
                return "lingering", self._requests
            if not self.flow.read_paused:
                return "body", self._body_bytes // self._limits.body_bytes
        return ("working", 0) if responding else ("idle", self._requests)

    def _is_responding(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def expire(self, name: str) -> None:
        if name in ("head", "body"):
            self._refuse(_TOO_SLOW)
        elif name in ("closing", "sending"):  # `close` would wait for the client to read
            self.abort()
        else:
            self.transport.close()

    def abort(self) -> None:
        self._disconnect()
        self.transport.abort()

    def _disconnect(self) -> None:
        """Tell the running request now. uvicorn tells the latest one, which may be waiting for its turn."""
        self.pipeline.clear()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        self.flow.resume_writing()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._admitted = self._all.admit(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disconnect()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._overhead += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            if self._should_upgrade():
                self.handle_websocket_upgrade()
        except httptools.HttpParserError as error:
            self._refuse(_TOO_LARGE if isinstance(error.__context__, _Refused) else _MALFORMED)
        else:
            if self._overhead > self._limits.head_bytes:
                self._refuse(_TOO_LARGE)

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= self._limits.pipelined:
            raise _Refused
        super().on_message_begin()
        self._part, self._head_bytes, self._body_bytes = "head", 0, 0
        self._requests += 1

    def on_url(self, url: bytes) -> None:
        self._grow(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._grow(len(name) + len(value))
        super().on_header(name, value)

    def _grow(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self._limits.head_bytes:
            raise _Refused

    def on_headers_complete(self) -> None:
        self._part, self._overhead = "body", 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._overhead = 0
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._part, self._overhead = "", 0
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        if not self._admitted:
            cycle.keep_alive = False
            if not cycle.scope["path"].endswith(HEALTH):
                app = _refuse_all
        super()._start_asgi_task(cycle, app)

    def handle_websocket_upgrade(self) -> None:
        if not self._admitted:
            self._refuse(_FULL)
            return
        if self._is_responding():  # the earlier request would never be told that its client has left
            self._refuse(_MALFORMED)
            return
        super().handle_websocket_upgrade()
        protocol = cast(WebSocketProtocol, self.transport.get_protocol())
        protocol.slices = self._all.slices
        if not protocol.handshake_initiated:  # `websockets` has narrower limits: 8 KB a line, 128 headers
            self._refuse(_TOO_LARGE)

    def send_400_response(self, msg: str) -> None:
        self._refuse(_MALFORMED)

    def _refuse(self, problem: Problem) -> None:
        """Write the problem and close; abort where it would be read as the response to an earlier request."""
        self._all.malformed += 1
        if self.pipeline or (self._is_responding() and (self._part != "body" or self.cycle.response_started)):
            self.abort()
            return
        body = msgspec.json.encode(problem.body())
        head = [STATUS_LINE[problem.status]]
        for name, value in problem.response().raw_headers:
            head += [name, b": ", value, b"\r\n"]
        self.transport.write(b"".join([*head, b"connection: close\r\n\r\n", body]))
        self.transport.close()


async def _refuse_all(scope: Scope, receive: Receive, send: Send) -> None:
    await _FULL.response()(scope, receive, send)
