"""The OpenAPI document is the API: every route is in it, with the types that validate."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import msgspec
from openapi_spec_validator.schemas import openapi_v31_schema_validator
from starlette.routing import Route

from agent_chat.server.app import ROUTES, create_app
from agent_chat.server.http.openapi import APIDescription, build_document
from agent_chat.server.http.operations import APIRoute
from agent_chat.server.http.routes import docs, pages, sessions, threads
from agent_chat.server.settings import Settings
from agent_chat.stores.events import Event

EVENT_TYPES = {str(event.__struct_config__.tag) for event in get_args(Event)}
UNDESCRIBED = {docs.openapi, docs.docs, pages.index, sessions.login, sessions.logout, threads.gone}


def test_the_document_is_built_once_and_encoded_once_for_each_prefix() -> None:
    api = APIDescription(ROUTES)
    assert api.json("") is api.json("")
    assert api.json("/a") is api.json("/a")
    assert msgspec.json.decode(api.json("/a")) == {**build_document(ROUTES), "servers": [{"url": "/a"}]}
    assert msgspec.json.decode(api.json(""))["servers"] == [{"url": "/"}]


def test_every_route_is_described_and_nothing_else_is() -> None:
    endpoints = {route.endpoint for route in ROUTES if isinstance(route, Route)}
    described = {route.endpoint for route in ROUTES if isinstance(route, APIRoute)}
    assert endpoints - UNDESCRIBED == described


def test_the_document_names_every_path_and_method() -> None:
    paths = build_document(ROUTES)["paths"]
    described = {(path, method.upper()) for path, methods in paths.items() for method in methods}
    served = {
        (route.path, method)
        for route in ROUTES
        if isinstance(route, Route) and route.endpoint not in UNDESCRIBED
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert described == served


def test_every_reference_resolves_and_operation_ids_are_unique(tmp_path: Path) -> None:
    api = build_document(create_app(Settings(data_dir=tmp_path)).routes)
    assert not list(openapi_v31_schema_validator.iter_errors(api))
    text = repr(api)
    names = [part.split("'")[0] for part in text.split("#/components/schemas/")[1:]]
    assert set(names) <= set(api["components"]["schemas"])
    ids = [operation["operationId"] for methods in api["paths"].values() for operation in methods.values()]
    assert len(ids) == len(set(ids))


def test_every_operation_has_a_declared_tag_and_its_problems() -> None:
    api = build_document(ROUTES)
    tags = {tag["name"] for tag in api["tags"]}
    operations = [operation for methods in api["paths"].values() for operation in methods.values()]
    assert {tag for operation in operations for tag in operation["tags"]} == tags
    post = api["paths"]["/api/v1/chat/{agent_id}/threads/{thread_id}/messages"]["post"]
    assert set(post["responses"]) >= {"200", "201", "202", "400", "401", "404", "409", "413", "415", "422", "429"}
    assert post["responses"]["409"]["description"] == "`agent_deleted` or `thread_archived` or `thread_busy`"


def test_files_are_binary_ids_are_uuids_and_times_are_date_times() -> None:
    api = build_document(ROUTES)
    schemas = api["components"]["schemas"]
    binary = {"type": "string", "format": "binary"}
    assert schemas["UploadForm"]["properties"]["files"]["items"] == binary
    download = api["paths"]["/api/v1/chat/{agent_id}/threads/{thread_id}/attachments/{attachment_id}"]["get"]
    for status in ("200", "206"):
        assert download["responses"][status]["content"] == {"application/octet-stream": {"schema": binary}}
    for schema in schemas.values():
        for name, member in schema.get("properties", {}).items():
            if name.endswith("_id") and schema["title"] not in ("ThreadCreate",):  # that one may be `default`
                assert member.get("format") == "uuid", (schema["title"], name)
            if name.endswith(("_at", "_time")):
                assert "date-time" in repr(member), (schema["title"], name)


def test_objects_without_declared_members_are_open() -> None:
    def check(schema: object) -> None:
        if isinstance(schema, dict):
            if schema.get("type") == "object" and not schema.get("properties"):
                assert schema["additionalProperties"]
            for each in schema.values():
                check(each)
        elif isinstance(schema, list):
            for each in schema:
                check(each)

    check(build_document(ROUTES))


def test_every_event_that_clients_get_has_a_schema() -> None:
    schemas = build_document(ROUTES)["components"]["schemas"]
    assert set(schemas["Event"]["discriminator"]["mapping"]) == EVENT_TYPES - {"log.opened"}
    assert schemas["MessageDelta"]["properties"]["type"] == {"type": "string", "const": "message.delta"}


def test_a_message_has_exactly_the_keys_of_the_design() -> None:
    schema = build_document(ROUTES)["components"]["schemas"]["Message"]
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
