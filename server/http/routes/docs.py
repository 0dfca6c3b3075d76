"""/openapi.json, and /docs: a page that shows it with the bundled Swagger UI, without any outside host."""

from __future__ import annotations

from typing import cast

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from agent_chat.server.http.openapi import APIDescription
from agent_chat.server.http.requests import public_path
from agent_chat.server.http.routes.pages import DEMO, PAGE_HEADERS


async def openapi(request: Request) -> Response:
    """The OpenAPI 3.1 document."""
    api = cast(APIDescription, request.state.api)
    headers = {"Cache-Control": "no-cache"}
    return Response(api.json(public_path(request, "")), media_type="application/json", headers=headers)


async def docs(_: Request) -> Response:
    """The OpenAPI document as a page."""
    return FileResponse(DEMO / "docs.html", headers=PAGE_HEADERS)


ROUTES = [Route("/openapi.json", openapi, methods=["GET"]), Route("/docs", docs, methods=["GET"])]
