"""Who is asking: the key of a request becomes a Principal before any route sees it."""

from __future__ import annotations

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import RateLimited, Unauthenticated, problem_of
from server.limits import RequestRate
from stores.contracts import Directory
from stores.errors import StoreUnavailable
from stores.models import Principal

COOKIE = "chat_key"
_KEYED = ("/api/", "/metrics")


class Authentication:
    """Pure ASGI middleware: a path under /api/, or /metrics, needs a valid key and gets `scope["principal"]`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(_KEYED):
            directory: Directory = scope["state"]["service"].store
            try:
                scope["principal"] = who = await authenticated(directory, HTTPConnection(scope))
                rate: RequestRate = scope["state"]["rate"]
                rate.count(who.organization_id)
            except (Unauthenticated, RateLimited, StoreUnavailable) as error:
                await problem_of(error).response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def authenticated(directory: Directory, connection: HTTPConnection, key: str | None = None) -> Principal:
    """The Principal of `key` if one is given, else of `Authorization: Bearer <key>`, else of the login cookie.

    The cookie is SameSite=Strict, but another port of the same host counts as the same site: a browser's request
    that says it comes from another origin is refused.

    Raises: Unauthenticated.
    """
    header = connection.headers.get("authorization")
    if key is not None:
        pass
    elif header is not None:
        scheme, _, key = header.partition(" ")
        key = key.strip() if scheme.lower() == "bearer" else ""
    else:
        key = connection.cookies.get(COOKIE, "") if same_origin(connection) else ""
    principal = await directory.principal(key) if key else None
    if principal is None:
        raise Unauthenticated
    return principal


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
