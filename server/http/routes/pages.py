"""The web demo at `/`, and the login URL: `/?key=…` starts a session and redirects to `/`, as Jupyter does."""

from __future__ import annotations

from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Match, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from agent_chat.server.errors import Unauthenticated
from agent_chat.server.http.problems import problem_of
from agent_chat.server.http.routes.sessions import confirmation_page, needs_confirmation, sign_in

DEMO = Path(__file__).parents[3] / "web_demo"
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; frame-ancestors 'none';"
        " form-action 'self'"
    ),
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


async def index(request: Request) -> Response:
    """Return the demo page; with `?key=`, sign in."""
    key = request.query_params.get("key")
    if key is None or request.method == "HEAD":
        return FileResponse(DEMO / "index.html", headers=PAGE_HEADERS)
    if request.headers.get("sec-fetch-dest", "document") != "document":
        return problem_of(Unauthenticated()).response()  # an image in a message must not sign its reader in
    if needs_confirmation(request):
        return confirmation_page(key)
    try:
        return await sign_in(request, key)
    except Unauthenticated:
        return FileResponse(DEMO / "index.html", 401, PAGE_HEADERS)  # the page explains how to sign in


class _Files(StaticFiles):
    """The demo's files. Every other path is not found, with any method."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        if scope["method"] not in ("GET", "HEAD"):
            raise HTTPException(404)
        return await super().get_response(path, scope)

    def file_response(self, *args: object, **kwargs: object) -> Response:
        response = super().file_response(*args, **kwargs)  # type: ignore[arg-type]
        response.headers.update(PAGE_HEADERS)
        return response


class _Fallback(Mount):
    """Serves the paths of no other route. It matches partially, so that a known path with a wrong method is a 405."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child = super().matches(scope)
        return (Match.PARTIAL if match is Match.FULL else match), child


ROUTES: list[BaseRoute] = [
    Route("/", index, methods=["GET"]),
    _Fallback("/", _Files(directory=DEMO, check_dir=False)),
]
