"""uvicorn's HTTP protocol with limits on a request's head and trailers and on pipelined requests, and with a state.

Requests that cannot be served are refused here, before the application is called: 400, 408, 431, and 503 when there are
too many connections. While an earlier request of the connection is in progress, no other response can be written: then
the connection is aborted.
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
_TOO_MANY_CONNECTIONS = Problem(
    503, "overloaded", "This server has reached its limit of connections; try again.", headers={"Retry-After": "2"}
)


class _LimitExceeded(Exception):
    """A request exceeds a limit. Raised in a callback of the parser, which then stops."""


class HTTPProtocol(HttpToolsProtocol):
    """One HTTP connection.

    Args:
        connections: all connections of this server.

    Attributes:
        state_seen, state_since: see `connections.Connection`.
    """

    def __init__(self, *, connections: Connections, **options: Any) -> None:
        super().__init__(**options)
        self.state_seen: State = ("", 0)
        self.state_since = 0.0
        self._connections = connections
        self._limits = connections.limits
        self._admitted = True
        self._running_cycle: RequestResponseCycle | None = None
        self._receiving = ""
        self._requests = 0
        self._head_bytes = 0
        self._overhead = 0  # bytes received since the last piece of a body or the last end of a head or a message
        self._body_bytes = 0

    def state(self) -> State:
        if self.transport.is_closing():
            return "closing", 0
        if self.flow.write_paused:
            return "sending", self.transport.get_write_buffer_size()
        if self._receiving == "head" and not self.flow.read_paused:
            return "head", self._requests
        responding = self._is_responding()
        if self._receiving == "body":
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
        elif name in ("closing", "sending"):  # `close` would wait until the client reads
            self.abort()
        else:
            self.transport.close()

    def abort(self) -> None:
        self._disconnect()
        self.transport.abort()

    def _disconnect(self) -> None:
        """Signal the disconnect to the running request. uvicorn signals the latest one, which may not have started."""
        self.pipeline.clear()
        if self._running_cycle is not None and not self._running_cycle.response_complete:
            self._running_cycle.disconnected = True
            self._running_cycle.message_event.set()
        self.flow.resume_writing()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._admitted = self._connections.admit(self)

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
            self._refuse(_TOO_LARGE if isinstance(error.__context__, _LimitExceeded) else _MALFORMED)
        else:
            if self._overhead > self._limits.head_bytes:
                self._refuse(_TOO_LARGE)

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= self._limits.pipelined:
            raise _LimitExceeded
        super().on_message_begin()
        self._receiving, self._head_bytes, self._body_bytes = "head", 0, 0
        self._requests += 1

    def on_url(self, url: bytes) -> None:
        self._count_head_bytes(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head_bytes(len(name) + len(value))
        super().on_header(name, value)

    def _count_head_bytes(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self._limits.head_bytes:
            raise _LimitExceeded

    def on_headers_complete(self) -> None:
        self._receiving, self._overhead = "body", 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._overhead = 0
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._receiving, self._overhead = "", 0
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running_cycle = cycle
        if not self._admitted:
            cycle.keep_alive = False
            if not cycle.scope["path"].endswith(HEALTH):
                app = _refuse_all
        super()._start_asgi_task(cycle, app)

    def handle_websocket_upgrade(self) -> None:
        if not self._admitted:
            self._refuse(_TOO_MANY_CONNECTIONS)
            return
        if self._is_responding():  # the earlier request would never see its client's disconnect
            self._refuse(_MALFORMED)
            return
        super().handle_websocket_upgrade()
        protocol = cast(WebSocketProtocol, self.transport.get_protocol())
        protocol.slices = self._connections.slices
        if not protocol.handshake_initiated:  # `websockets` has narrower limits: 8 KB a line, 128 headers
            self._refuse(_TOO_LARGE)

    def send_400_response(self, msg: str) -> None:
        self._refuse(_MALFORMED)

    def _refuse(self, problem: Problem) -> None:
        """Write the problem and close; abort if the client would take it for the response to an earlier request."""
        self._connections.malformed += 1
        if self.pipeline or (self._is_responding() and (self._receiving != "body" or self.cycle.response_started)):
            self.abort()
            return
        body = msgspec.json.encode(problem.body())
        head = [STATUS_LINE[problem.status]]
        for name, value in problem.response().raw_headers:
            head += [name, b": ", value, b"\r\n"]
        self.transport.write(b"".join([*head, b"connection: close\r\n\r\n", body]))
        self.transport.close()


async def _refuse_all(scope: Scope, receive: Receive, send: Send) -> None:
    await _TOO_MANY_CONNECTIONS.response()(scope, receive, send)
