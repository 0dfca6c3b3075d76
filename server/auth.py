"""Who is asking: the key of a request becomes a Principal before any route sees it."""

from __future__ import annotations

from starlette._utils import get_route_path  # the router's own, so that what is checked is what is routed
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import RateLimited, Unauthenticated, problem_of
from server.limits import RequestRate
from server.sse import later
from stores.contracts import Directory
from stores.errors import StoreUnavailable
from stores.models import Principal

COOKIE = "chat_key"
KEYED = ("/api/", "/metrics")
"""What paths begin with that need a key; all others are open."""


class Authentication:
    """Pure ASGI middleware: a path under /api/, or /metrics, needs a valid key.

    It gets `scope["principal"]`, and `scope["key"]` for what stays open longer than the key may be valid.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and get_route_path(scope).startswith(KEYED):
            directory: Directory = scope["state"]["service"].store
            try:
                scope["key"] = key_of(HTTPConnection(scope))
                scope["principal"] = who = await authenticated(directory, scope["key"])
                rate: RequestRate = scope["state"]["rate"]
                rate.count(who.organization_id)
            except (Unauthenticated, RateLimited, StoreUnavailable) as error:
                await _refusal(scope, error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _refusal(scope: Scope, error: Exception) -> Response:
    """The problem; but a watcher that may come back is told so: `server.sse.later`."""
    watching = scope["method"] == "GET" and scope["path"].endswith("/events")
    return later() if watching and not isinstance(error, Unauthenticated) else problem_of(error).response()


async def authenticated(directory: Directory, key: str) -> Principal:
    """The Principal of the key. Raises: Unauthenticated, StoreUnavailable."""
    principal = await directory.principal(key) if key else None
    if principal is None:
        raise Unauthenticated
    return principal


def key_of(connection: HTTPConnection) -> str:
    """The key of `Authorization: Bearer <key>`, else of the login cookie; empty if there is none.

    The cookie is SameSite=Strict, but another port of the same host counts as the same site: a browser's request
    that says it comes from another origin is refused.
    """
    header = connection.headers.get("authorization")
    if header is None:
        return connection.cookies.get(COOKIE, "") if same_origin(connection) else ""
    scheme, _, key = header.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def same_origin(connection: HTTPConnection) -> bool:
    """True unless a browser says that a page of another origin sends this."""
    origin = connection.headers.get("origin")
    if origin is None:
        return connection.headers.get("sec-fetch-site", "same-origin") in ("same-origin", "none")
    return origin.partition("://")[2] == connection.headers.get("host")


def principal_of(connection: HTTPConnection) -> Principal:
    """The Principal that the middleware found."""
    principal: Principal = connection.scope["principal"]
    return principal
