"""Authentication: the credential of a request is exchanged for a Principal before any route is called."""

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
from agent_chat.server.http.sse import retry_later
from agent_chat.server.limits import RequestRate
from agent_chat.server.loop_share import LoopShares
from agent_chat.server.principals import Credential, Principals
from agent_chat.stores.errors import StoreUnavailable
from agent_chat.stores.models import Principal

KEYED_PREFIX = "/api/"
"""Paths with this prefix need a credential; all others are public."""


class Authenticator:
    """Resolves credentials and counts the invalid ones.

    Args:
        delay_seconds: how long the refusal of an invalid key is delayed after its address has sent too many. It limits
            a client that does not stop to one lookup per connection in that time.

    Attributes:
        principals: the cache of credentials, in front of the store.
        failures: the failed authentications of each address.
    """

    def __init__(self, principals: Principals, failures: AuthFailures, delay_seconds: float) -> None:
        self.principals = principals
        self.failures = failures
        self._delay_seconds = delay_seconds

    async def authenticate(self, connection: HTTPConnection, credential: Credential) -> Principal:
        """Return the credential's Principal.

        Only invalid keys are rate limited, because only keys can be guessed: a browser with an expired session gets a
        401 in any case, so that the page can show that its session has ended.

        Raises:
            Unauthenticated: the credential is missing or invalid.
            AuthRateLimited: the key is invalid and its address has sent too many of them.
            StoreUnavailable: the credential could not be checked.
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
    """Pure ASGI middleware that requires a valid credential for paths under /api/.

    It sets `scope["principal"]`, and `scope["credential"]` for streams, which can outlive the credential's validity.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Authenticate requests for paths that need a key, and pass them on."""
        if scope["type"] == "http" and get_route_path(scope).startswith(KEYED_PREFIX):
            connection = HTTPConnection(scope)
            try:
                scope["credential"] = credential = credential_of(connection)
                scope["principal"] = principal = await authenticator_of(connection).authenticate(connection, credential)
                rate: RequestRate = scope["state"]["rate"]
                rate.count(principal.organization_id)
                shares: LoopShares = scope["state"]["shares"]
                share = shares.of(principal.organization_id)
                await share.turn()
            except (Unauthenticated, AuthRateLimited, RateLimited, StoreUnavailable) as error:
                await _refusal(scope, error)(scope, receive, send)
            else:
                await share.serve(self._app(scope, receive, send))
            return
        await self._app(scope, receive, send)


def _refusal(scope: Scope, error: Exception) -> Response:
    """Return the problem; a watcher that may reconnect gets a retry hint instead, because an error status is final."""
    watching = scope["method"] == "GET" and scope["path"].endswith("/events")
    final = isinstance(error, Unauthenticated | AuthRateLimited)
    return retry_later() if watching and not final else problem_of(error).response()


def authenticator_of(connection: HTTPConnection) -> Authenticator:
    """Return the application's Authenticator."""
    return cast(Authenticator, connection.state.authenticator)


def credential_of(connection: HTTPConnection) -> Credential:
    """Return the key of `Authorization: Bearer <key>`, else the cookie's session. Without either the secret is empty.

    The cookie is SameSite=Strict, but browsers count another port of the same host as the same site: the cookie of a
    request from another origin is ignored.
    """
    header = connection.headers.get("authorization")
    if header is None:
        return Credential("session", session_token(connection) if same_origin(connection) else "")
    scheme, _, key = header.partition(" ")
    return Credential("key", key.strip() if scheme.lower() == "bearer" else "")


def same_origin(connection: HTTPConnection) -> bool:
    """Return False if the browser reports another origin (scheme, host and port) as the source of the request."""
    origin = connection.headers.get("origin")
    if origin is None:
        return connection.headers.get("sec-fetch-site", "same-origin") in ("same-origin", "none")
    scheme = "https" if is_secure(connection) else "http"
    return origin.lower() == f"{scheme}://{connection.headers.get('host', '')}".lower()


def client_address(connection: HTTPConnection) -> str:
    """Return the client's address: the proxy's, unless the proxy is trusted (CHAT_FORWARDED_ALLOW_IPS)."""
    return connection.client.host if connection.client else ""


def principal_of(connection: HTTPConnection) -> Principal:
    """Return the Principal that the middleware has set."""
    principal: Principal = connection.scope["principal"]
    return principal
