"""The first middleware of every request: lifespan state, root path, and default security headers.

Pure ASGI, inside nothing but Starlette's own error middleware. It copies the scope, because under a `Mount` the scope
belongs to the outer application. `send` is wrapped in a plain function that inspects only the first message of a
response: a coroutine would add CPU time to each token of each stream.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import Any
from urllib.parse import quote

from starlette.datastructures import MutableHeaders
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agent_chat.server.http.problems import SAFE_HEADERS


class AppNotStarted(RuntimeError):
    """The application received a request although its lifespan was not entered, so it has no database."""

    def __init__(self) -> None:
        super().__init__(
            "This app was mounted without its lifespan: enter `app.router.lifespan_context(app)` in the lifespan of the"
            " outer application."
        )


class LifespanState:
    """What the lifespan opens. It is the application's own: an outer application has another `scope["state"]`.

    Attributes:
        state: None before the lifespan is entered and after it is left.
    """

    def __init__(self) -> None:
        self.state: Mapping[str, Any] | None = None


class Front:
    """The middleware. It raises AppNotStarted outside of the lifespan.

    Args:
        root_path: the public prefix (CHAT_ROOT_PATH), whether the proxy strips it or not. It is ignored if the scope
            has a root path already, from a `Mount` or from the server.
    """

    def __init__(self, app: ASGIApp, *, running: LifespanState, root_path: str = "") -> None:
        self._app = app
        self._running = running
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a connection on to the running application."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if self._running.state is None:
            raise AppNotStarted
        scope = {**scope, "state": dict(self._running.state)}
        if self._root_path and not scope.get("root_path"):
            if scope["path"] == self._root_path and scope["type"] == "http":
                await _redirect_to_slash(scope)(scope, receive, send)
                return
            if not scope["path"].startswith(f"{self._root_path}/"):
                scope["path"] = self._root_path + scope["path"]
            scope["root_path"] = self._root_path
        await self._app(scope, receive, _with_safe_headers(send) if scope["type"] == "http" else send)


def _redirect_to_slash(scope: Scope) -> ASGIApp:
    """Redirect `/prefix` to `/prefix/`: relative URLs of the page would not contain the prefix otherwise."""
    query = scope.get("query_string", b"").decode("latin-1")
    return RedirectResponse(f"{quote(scope['path'])}/" + (f"?{query}" if query else ""))


def _with_safe_headers(send: Send) -> Send:
    def send_with_headers(message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in SAFE_HEADERS.items():
                headers.setdefault(name, value)
        return send(message)

    return send_with_headers
