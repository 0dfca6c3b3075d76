"""/openapi.json, and /docs: a page that shows it without any outside host."""

from __future__ import annotations

from html import escape
from typing import cast

import msgspec
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from agent_chat.server.http.openapi import APIDescription
from agent_chat.server.http.requests import public_path
from agent_chat.stores.models import JSONObject

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>API</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
summary {{ cursor: pointer; padding: .4rem 0 }} summary code {{ font-weight: 600 }}
pre {{ overflow: auto; padding: .8rem; border: 1px solid #8884; border-radius: 6px; font-size: 13px }}
</style>
<h1>{title}</h1><p>{description}</p><p><a href="openapi.json">openapi.json</a></p>{operations}
<h2>Types</h2>{schemas}</html>"""

_JSON_HEADERS = {"Cache-Control": "no-cache"}
_PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'; form-action 'none'"
    ),
}


async def openapi(request: Request) -> Response:
    """The OpenAPI 3.1 document."""
    api = cast(APIDescription, request.state.api)
    return Response(api.json(public_path(request, "")), media_type="application/json", headers=_JSON_HEADERS)


async def docs(request: Request) -> Response:
    """The OpenAPI document as a page."""
    api = cast(APIDescription, request.state.api).document
    operations = [
        _folded(f"<code>{method.upper()} {escape(path)}</code> {escape(operation['summary'])}", operation)
        for path, methods in api["paths"].items()
        for method, operation in methods.items()
    ]
    schemas = [_folded(f"<code>{escape(name)}</code>", schema) for name, schema in api["components"]["schemas"].items()]
    page = _PAGE.format(
        title=escape(api["info"]["title"]),
        description=escape(api["info"]["description"]),
        operations="".join(operations),
        schemas="".join(schemas),
    )
    return HTMLResponse(page, headers=_PAGE_HEADERS)


def _folded(summary: str, content: JSONObject) -> str:
    shown = msgspec.json.format(msgspec.json.encode(content), indent=2).decode()
    return f"<details><summary>{summary}</summary><pre>{escape(shown)}</pre></details>"


ROUTES = [Route("/openapi.json", openapi, methods=["GET"]), Route("/docs", docs, methods=["GET"])]
