"""Middleware that gives each request an id, a log line (CHAT_ACCESS_LOG) and its part of /metrics.

Pure ASGI, inside `Front`. It adds nothing per token: the function around `send` inspects only the first message of a
response. A WebSocket is one request of status 101; middleware that refuses its handshake sets `scope[REFUSED_STATUS]`.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Awaitable
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agent_chat.server.log_lines import REQUEST_ID, THREAD_ID
from agent_chat.stores.models import new_id

if TYPE_CHECKING:
    from agent_chat.server.metrics import Metrics

logger = logging.getLogger("chat.access")

REFUSED_STATUS = "chat.refused_status"
"""The scope's key of the status of a refused WebSocket, whose `send` is not wrapped."""

_WELL_FORMED = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}", re.ASCII)
_THREAD = re.compile(r"/threads/([0-9a-f-]{36})(?:/|$)", re.ASCII)
_PATH_CHARACTERS = 500


class RequestLog:
    """Gives every request an id and returns it as X-Request-Id.

    Args:
        lines: whether to log each request.
    """

    def __init__(self, app: ASGIApp, *, lines: bool = False) -> None:
        self._app = app
        self._lines = lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; count it, and log it when it ends."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        request = _Request(scope)
        try:
            await self._app(scope, receive, request.wrap(send) if scope["type"] == "http" else send)
        except Exception:
            request.status = request.status or 500
            raise
        finally:
            request.status = scope.get(REFUSED_STATUS, request.status)
            request.count(scope["state"]["metrics"])
            if self._lines:
                request.log()


class _Request:
    def __init__(self, scope: Scope) -> None:
        given = Headers(scope=scope).get("x-request-id", "")
        self.id = given if _WELL_FORMED.fullmatch(given) else new_id()
        self.status = 0 if scope["type"] == "http" else 101
        self._scope = scope
        self._started_at = time.perf_counter()
        self._response_started_at = self._started_at
        REQUEST_ID.set(self.id)
        thread = _THREAD.search(scope["path"])
        THREAD_ID.set(thread[1] if thread else None)

    def wrap(self, send: Send) -> Send:
        """Return a `send` that records when the response starts, and its status."""

        def send_recorded(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                self.status = message["status"]
                self._response_started_at = time.perf_counter()
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.id.encode())]
            return send(message)

        return send_recorded

    def count(self, metrics: Metrics) -> None:
        route = getattr(self._scope.get("route"), "path", "none")
        method = self._scope.get("method", "WEBSOCKET")
        metrics.count_request(method, route, self.status, self._response_started_at - self._started_at)

    def log(self) -> None:
        scope = self._scope
        method = scope.get("method", "WEBSOCKET")
        path = (scope.get("raw_path") or scope["path"].encode("utf-8", "replace")).decode("latin-1")[:_PATH_CHARACTERS]
        seconds = time.perf_counter() - self._started_at
        principal = scope.get("principal")
        facts = {
            "method": method,
            "path": path,
            "status": self.status,
            "duration_ms": round(seconds * 1000, 1),
            "organization_id": principal.organization_id if principal else None,
        }
        logger.info("request", extra=facts)
