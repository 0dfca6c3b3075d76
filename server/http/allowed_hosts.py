"""Middleware that refuses requests for other host names (CHAT_HOSTS); `hosts.py` explains why and matches the names.

Pure ASGI, inside `RequestLog`, so that refusals are logged and counted. It does not wrap `send`.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette._utils import get_route_path
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from agent_chat.server.http.hosts import is_allowed
from agent_chat.server.http.problems import Problem
from agent_chat.server.http.request_log import REFUSED_STATUS

_PROBES = ("/healthz", "/readyz")


class AllowedHosts:
    """Refuses requests whose Host header is not in `hosts`; an empty `hosts` allows all.

    Health checks are exempt, because they use the address instead of a name.
    """

    def __init__(self, app: ASGIApp, *, hosts: Sequence[str]) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what is addressed to an allowed host; refuse the rest."""
        if scope["type"] == "lifespan" or not self._hosts or self._is_allowed(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            scope[REFUSED_STATUS] = 403  # what uvicorn sends for a close before the handshake
            await WebSocketClose(1008)(scope, receive, send)
        else:
            detail = "The Host header names another server. The setting CHAT_HOSTS lists the names of this one."
            await Problem(400, "unknown_host", detail).response()(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        if get_route_path(scope) in _PROBES:
            return True
        host = next((value for name, value in scope["headers"] if name == b"host"), b"")
        return is_allowed(host.decode("latin-1"), self._hosts)
