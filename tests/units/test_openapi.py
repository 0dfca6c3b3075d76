"""The OpenAPI document is the API: every route is in it, with the types that validate."""

from __future__ import annotations

from pathlib import Path

import msgspec
from starlette.routing import Route

from agent_chat.server.app import ROUTES, create_app
from agent_chat.server.http.openapi import OPERATIONS, APIDescription, document
from agent_chat.server.http.routes import docs, pages, sessions, threads
from agent_chat.server.settings import Settings

UNDESCRIBED = {docs.openapi, docs.docs, pages.index, sessions.login, sessions.logout, threads.gone}


def test_the_document_is_built_once_and_encoded_once_for_each_prefix() -> None:
    api = APIDescription(ROUTES)
    assert api.json("") is api.json("")
    assert api.json("/a") is api.json("/a")
    assert msgspec.json.decode(api.json("/a")) == {**document(ROUTES), "servers": [{"url": "/a"}]}


def test_every_route_is_described_and_nothing_else_is() -> None:
    endpoints = {route.endpoint for route in ROUTES if isinstance(route, Route)}
    assert endpoints - UNDESCRIBED == set(OPERATIONS)


def test_the_document_names_every_path_and_method() -> None:
    paths = document(ROUTES)["paths"]
    described = {(path, method.upper()) for path, methods in paths.items() for method in methods}
    served = {
        (route.path, method)
        for route in ROUTES
        if isinstance(route, Route) and route.endpoint not in UNDESCRIBED
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert described == served


def test_every_reference_resolves_and_operation_ids_are_unique(tmp_path: Path) -> None:
    api = document(create_app(Settings(data_dir=tmp_path)).routes)
    text = repr(api)
    names = [part.split("'")[0] for part in text.split("#/components/schemas/")[1:]]
    assert set(names) <= set(api["components"]["schemas"])
    ids = [operation["operationId"] for methods in api["paths"].values() for operation in methods.values()]
    assert len(ids) == len(set(ids))


def test_a_message_has_exactly_the_keys_of_the_design() -> None:
    schema = document(ROUTES)["components"]["schemas"]["Message"]
    assert list(schema["properties"]) == [
        "id",
        "thread_id",
        "content",
        "content_html",
        "role",
        "tool_calls",
        "attachments",
        "metadata",
        "created_at",
    ]
