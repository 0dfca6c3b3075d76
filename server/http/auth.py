"""Who is asking: the credential of a request becomes a Principal before any route is called."""

from __future__ import annotations

import asyncio
import math
from typing import cast

from starlette._utils import get_route_path  # the router's own, so that what is checked is what is routed
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from agent_chat.server.errors import AuthRateLimited, RateLimited, Unauthenticated
from agent_chat.server.http.auth_failures import AuthFailures
from agent_chat.server.http.cookies import is_secure, session_token
from agent_chat.server.http.problems import problem_of
from agent_chat.server.http.sse import later
from agent_chat.server.limits import RequestRate
from agent_chat.server.loop_share import LoopShares
from agent_chat.server.principals import Credential, Principals
from agent_chat.stores.errors import StoreUnavailable
from agent_chat.stores.models import Principal

KEYED = "/api/"
"""How paths begin that need a credential; all others are open."""


class Authenticator:
    """Looks credentials up, and counts those that are wrong.

    Args:
        delay_seconds: how late a wrong key is refused, once its address has sent too many. A client that goes on all
            the same costs one lookup per connection in that time, where it cost as many as the process could do.
    """

    def __init__(self, principals: Principals, failures: AuthFailures, delay_seconds: float) -> None:
        self.principals = principals
        self.failures = failures
        self._delay_seconds = delay_seconds

    async def authenticate(self, connection: HTTPConnection, credential: Credential) -> Principal:
        """The credential's Principal. Raises: Unauthenticated, AuthRateLimited, StoreUnavailable.

        Only keys can be guessed, so only wrong keys are refused by rate: the page must learn that its session ended.
        """
        principal = await self.principals.find(credential)
        if principal is not None:
            return principal
        if credential.secret:
            wait = self.failures.record(client_address(connection), credential.kind)
            if wait and credential.kind == "key":
                await asyncio.sleep(self._delay_seconds)
                raise AuthRateLimited(math.ceil(wait))
        raise Unauthenticated


class Authentication:
    """Pure ASGI middleware: a path under /api/ needs a valid credential.

    It sets `scope["principal"]`, and `scope["credential"]` for streams, which may outlive its validity.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Authenticate requests for paths that need a key, and pass them on."""
        if scope["type"] == "http" and get_route_path(scope).startswith(KEYED):
            connection = HTTPConnection(scope)
            try:
                scope["credential"] = credential = credential_of(connection)
                scope["principal"] = who = await authenticator_of(connection).authenticate(connection, credential)
                rate: RequestRate = scope["state"]["rate"]
                rate.count(who.organization_id)
                shares: LoopShares = scope["state"]["shares"]
                share = shares.of(who.organization_id)
                await share.turn()
            except (Unauthenticated, AuthRateLimited, RateLimited, StoreUnavailable) as error:
                await _refusal(scope, error)(scope, receive, send)
            else:
                await share.serve(self._app(scope, receive, send))
            return
        await self._app(scope, receive, send)


def _refusal(scope: Scope, error: Exception) -> Response:
    """The problem; but a watcher that may come back is told so: `server.http.sse.later`."""
    watching = scope["method"] == "GET" and scope["path"].endswith("/events")
    final = isinstance(error, Unauthenticated | AuthRateLimited)
    return later() if watching and not final else problem_of(error).response()


def authenticator_of(connection: HTTPConnection) -> Authenticator:
    """Return the application's Authenticator."""
    return cast(Authenticator, connection.state.authenticator)


def credential_of(connection: HTTPConnection) -> Credential:
    """The key of `Authorization: Bearer <key>`, else the session of the cookie; an empty secret without either.

    The cookie is SameSite=Strict, but another port of the same host counts as the same site: a browser's request
    that comes from another origin is refused.
    """
    header = connection.headers.get("authorization")
    if header is None:
        return Credential("session", session_token(connection) if same_origin(connection) else "")
    scheme, _, key = header.partition(" ")
    return Credential("key", key.strip() if scheme.lower() == "bearer" else "")


def same_origin(connection: HTTPConnection) -> bool:
    """False if a browser reports that a page of another origin sends this; scheme, host and port count."""
    origin = connection.headers.get("origin")
    if origin is None:
        return connection.headers.get("sec-fetch-site", "same-origin") in ("same-origin", "none")
    scheme = "https" if is_secure(connection) else "http"
    return origin.lower() == f"{scheme}://{connection.headers.get('host', '')}".lower()


def client_address(connection: HTTPConnection) -> str:
    """The client's address; behind a proxy only if the proxy is trusted (CHAT_FORWARDED_ALLOW_IPS)."""
    return connection.client.host if connection.client else ""


def principal_of(connection: HTTPConnection) -> Principal:
    """The Principal that the middleware found."""
    principal: Principal = connection.scope["principal"]
    return principal
