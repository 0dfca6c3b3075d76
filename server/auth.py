"""Who is asking: the key of a request becomes a Principal before any route sees it."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import Unauthenticated, problem_of
from stores.contracts import Directory
from stores.errors import StoreUnavailable
from stores.models import Principal

_KEYED = ("/api/", "/metrics")


class Authentication:
    """Pure ASGI middleware: a path under /api/, or /metrics, needs a valid key and gets `scope["principal"]`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(_KEYED):
            directory: Directory = scope["state"]["service"].store
            try:
                scope["principal"] = await authenticated(directory, Headers(scope=scope))
            except (Unauthenticated, StoreUnavailable) as error:
                await problem_of(error).response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def authenticated(directory: Directory, headers: Headers) -> Principal:
    """The Principal of `Authorization: Bearer <key>`. Raises: Unauthenticated."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    principal = await directory.principal(key.strip()) if scheme.lower() == "bearer" else None
    if principal is None:
        raise Unauthenticated
    return principal


def principal_of(connection: HTTPConnection) -> Principal:
    """The Principal that the middleware found."""
    principal: Principal = connection.scope["principal"]
    return principal
