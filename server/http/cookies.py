"""The session cookie of browsers.

Browsers do not separate cookies by port, so the name contains the port: two servers on one machine do not overwrite
each other's cookie. On https the name begins with `__Host-`, so that browsers reject the cookie from other hosts and
from http. `__Host-` requires the path `/`, so under a root path it is `__Secure-` instead.
https://developer.mozilla.org/docs/Web/HTTP/Reference/Headers/Set-Cookie#cookie_prefixes
"""

from __future__ import annotations

from starlette.requests import HTTPConnection
from starlette.responses import Response

SESSION_SECONDS = 30 * 24 * 3600


def is_secure(connection: HTTPConnection) -> bool:
    """Whether the client uses TLS."""
    return connection.scope["scheme"] in ("https", "wss")


def session_token(connection: HTTPConnection) -> str:
    """Return the session cookie's token; empty without the cookie."""
    return connection.cookies.get(_name(connection), "")


def set_session(response: Response, connection: HTTPConnection, token: str) -> None:
    """Set the cookie of a session."""
    response.set_cookie(
        _name(connection),
        token,
        max_age=SESSION_SECONDS,
        path=_path(connection),
        secure=is_secure(connection),
        httponly=True,
        samesite="strict",
    )


def clear_session(response: Response, connection: HTTPConnection) -> None:
    """Remove the cookie of a session."""
    secure = is_secure(connection)
    response.delete_cookie(_name(connection), _path(connection), secure=secure, httponly=True, samesite="strict")


def _name(connection: HTTPConnection) -> str:
    secure = is_secure(connection)
    prefix = "" if not secure else "__Secure-" if connection.scope.get("root_path") else "__Host-"
    _, _, port = connection.headers.get("host", "").rpartition(":")
    if not (port.isascii() and port.isdecimal() and len(port) <= 5):
        port = "443" if secure else "80"
    return f"{prefix}chat_session_{port}"


def _path(connection: HTTPConnection) -> str:
    return f"{connection.scope.get('root_path', '')}/"
