"""The session cookie of browsers.

Cookies ignore ports, so its name has the port: two servers of one machine don't replace each other's. On https the name
has a prefix with which browsers refuse it from other hosts and from http; `__Host-` demands the path `/`, so it is
`__Secure-` under a prefix. https://developer.mozilla.org/docs/Web/HTTP/Reference/Headers/Set-Cookie#cookie_prefixes
"""

from __future__ import annotations

from starlette.requests import HTTPConnection
from starlette.responses import Response

SESSION_SECONDS = 30 * 24 * 3600


def is_secure(connection: HTTPConnection) -> bool:
    """Whether the client uses TLS."""
    return connection.scope["scheme"] in ("https", "wss")


def session_token(connection: HTTPConnection) -> str:
    """The token of the session cookie; empty without one."""
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
