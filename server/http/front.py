"""What every request passes first: the running application, the public path, and headers for responses without them.

Pure ASGI, outermost but for Starlette's own handler of unexpected errors. It copies the scope, because under a `Mount`
the scope belongs to the outer application. What is sent passes through one plain function, which looks at the first
message of a response only: a wrapper coroutine would cost each token of each stream.
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
    """The application serves without its lifespan, so it has no database."""

    def __init__(self) -> None:
        super().__init__(
            "This app was mounted without its lifespan: enter `app.router.lifespan_context(app)` in the lifespan of the"
            " outer application."
        )


class Running:
    """The state that the lifespan opens: the application's own, whatever an outer one keeps in `scope["state"]`."""

    def __init__(self) -> None:
        self.state: Mapping[str, Any] | None = None


class Front:
    """Raises AppNotStarted outside of the lifespan.

    Args:
        root_path: the public prefix (CHAT_ROOT_PATH), whether the proxy strips it or not. Ignored under a `Mount` or
            a server that sets the scope's own.
    """

    def __init__(self, app: ASGIApp, *, running: Running, root_path: str = "") -> None:
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
                await _to_slash(scope)(scope, receive, send)
                return
            if not scope["path"].startswith(f"{self._root_path}/"):
                scope["path"] = self._root_path + scope["path"]
            scope["root_path"] = self._root_path
        await self._app(scope, receive, _with_safe_headers(send) if scope["type"] == "http" else send)


def _to_slash(scope: Scope) -> ASGIApp:
    """From `/prefix` to `/prefix/`, without which the page's relative URLs would miss the prefix."""
    query = scope.get("query_string", b"").decode("latin-1")
    return RedirectResponse(f"{quote(scope['path'])}/" + (f"?{query}" if query else ""))


def _with_safe_headers(send: Send) -> Send:
    def sending(message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in SAFE_HEADERS.items():
                headers.setdefault(name, value)
        return send(message)

    return sending
