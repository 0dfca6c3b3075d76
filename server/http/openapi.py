"""The OpenAPI 3.1 document, made from the types that validate and the routes' own docstrings.

Every route is an entry of `OPERATIONS`, keyed by its endpoint; a test compares the table with the routes.
https://spec.openapis.org/oas/v3.1.0
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import msgspec
from starlette.routing import BaseRoute, Route

from agent_chat.server.http.auth import KEYED
from agent_chat.server.http.routes import agents, attachments, events, health, messages, threads
from agent_chat.server.inputs import AgentCreate, AgentUpdate, MessageCreate, ThreadCreate, ThreadUpdate
from agent_chat.stores.models import Agent, Attachment, JSONObject, Message, Role, Thread


class Problem(msgspec.Struct, frozen=True):
    """An RFC 9457 problem, with a stable `code`; some codes have further members (`field`, `message_id`, …)."""

    type: str
    title: str
    status: int
    code: str
    detail: str


class Upload(msgspec.Struct, frozen=True):
    """A form with files alone."""

    files: list[bytes]


class MessageForm(msgspec.Struct, frozen=True):
    """A message's fields and files; `metadata` and `attachments` are JSON text."""

    content: str = ""
    content_html: str = ""
    role: Role = "user"
    metadata: str = "{}"
    attachments: str = "[]"
    files: list[bytes] = []


class Query(msgspec.Struct, frozen=True):
    """A query parameter."""

    name: str
    schema: JSONObject
    description: str = ""


class Operation(msgspec.Struct, frozen=True):
    """What a route takes and gives. `answer` null: no body. `optional`: the body may be absent. `form`: multipart."""

    answer: Any
    status: int = 200
    body: Any = None
    optional: bool = False
    query: tuple[Query, ...] = ()
    headers: tuple[str, ...] = ()
    stream: bool = False
    form: Any = None
    media_type: str = "application/json"


def _integer(name: str, default: int, low: int, high: int | None = None) -> Query:
    schema: JSONObject = {"type": "integer", "default": default, "minimum": low}
    return Query(name, schema | ({"maximum": high} if high is not None else {}))


_AFTER = Query("after", {"type": "string"}, "A position to resume behind; the Last-Event-ID header wins.")
_IF_BUSY = Query("if_busy", {"enum": ["reject", "interrupt"], "default": "reject"}, "What to do with a running run.")
_STREAM = Query("stream", {"type": "boolean"}, "Answer as an event stream.")
_ARCHIVED = Query("archived", {"type": "boolean"}, "Only archived ones, or only others; absent: both.")
_BEFORE = Query("before", {"type": "string", "format": "uuid"}, "A message's id.")
_KEY = "Idempotency-Key"

OPERATIONS: dict[Callable[..., object], Operation] = {
    health.healthz: Operation(JSONObject),
    health.readyz: Operation(JSONObject),
    health.metrics: Operation(str, media_type="text/plain"),
    agents.create_agent: Operation(Agent, 201, AgentCreate),
    agents.list_agents: Operation(list[Agent], query=(_integer("limit", 50, 1, 100), _integer("offset", 0, 0))),
    agents.get_agent: Operation(Agent),
    agents.update_agent: Operation(Agent, body=AgentUpdate),
    agents.delete_agent: Operation(None, 204),
    threads.create_thread: Operation(Thread, 201, ThreadCreate, optional=True, headers=(_KEY,)),
    threads.list_threads: Operation(
        list[Thread],
        query=(_integer("limit", 10, 1, 50), _integer("offset", 0, 0), _ARCHIVED, _integer("message_limit", 50, 0, 50)),
    ),
    threads.get_thread: Operation(Thread, query=(_integer("message_limit", 50, 1, 100),)),
    threads.update_thread: Operation(Thread, body=ThreadUpdate),
    threads.delete_thread: Operation(None, 204),
    threads.generate_title: Operation(Thread),
    messages.post_message: Operation(
        Message,
        201,
        MessageCreate,
        query=(_STREAM, _IF_BUSY),
        headers=(_KEY, "Prefer", "Last-Event-ID"),
        stream=True,
        form=MessageForm,
    ),
    messages.list_messages: Operation(list[Message], query=(_BEFORE, _integer("limit", 50, 1, 100))),
    messages.get_message: Operation(Message),
    messages.cancel: Operation(Message),
    attachments.upload: Operation(list[Attachment], 201, form=Upload),
    attachments.download: Operation(bytes, headers=("Range",), media_type="application/octet-stream"),
    events.watch: Operation(str, query=(_AFTER,), headers=("Last-Event-ID",), media_type="text/event-stream"),
}


class APIDescription:
    """The document, built once, as JSON for each prefix under which it is served."""

    def __init__(self, routes: Sequence[BaseRoute]) -> None:
        self._routes = routes
        self._json: dict[str, bytes] = {}

    @cached_property
    def document(self) -> JSONObject:
        return document(self._routes)

    def json(self, root_path: str) -> bytes:
        if root_path not in self._json:
            servers = {"servers": [{"url": root_path}]} if root_path else {}
            self._json[root_path] = msgspec.json.encode(self.document | servers)
        return self._json[root_path]


def document(routes: Sequence[BaseRoute]) -> JSONObject:
    """The OpenAPI document of the API routes; pages and the WebSocket have no place in it."""
    described = [route for route in routes if isinstance(route, Route) and route.endpoint in OPERATIONS]
    types: list[Any] = [Problem]
    for operation in OPERATIONS.values():
        types += [type for type in (operation.answer, operation.body, operation.form) if type is not None]
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    by_type = {repr(type): schema for type, schema in zip(types, schemas, strict=True)}
    paths: dict[str, JSONObject] = {}
    for route in described:
        operation = OPERATIONS[route.endpoint]
        for method in sorted((route.methods or set()) - {"HEAD"}):
            paths.setdefault(route.path, {})[method.lower()] = _operation(route, operation, by_type)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Agent chat server", "version": "1", "description": _DESCRIPTION},
        "security": [{"key": []}],
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": _BEARER, "metrics_token": _BEARER}},
    }


_BEARER = {"type": "http", "scheme": "bearer"}
_DESCRIPTION = (
    "Threads of messages with agents. `{agent_id}` may be `default`. A WebSocket at "
    "`/api/v1/chat/{agent_id}/threads/{thread_id}/ws` gives the same events as `…/events`, and takes commands."
)


def _operation(route: Route, operation: Operation, schemas: dict[str, JSONObject]) -> JSONObject:
    documentation = inspect.getdoc(route.endpoint) or ""
    in_path = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", route.path)
    ]
    in_query = [
        {"name": query.name, "in": "query", "schema": query.schema, "description": query.description}
        for query in operation.query
    ]
    in_header = [{"name": name, "in": "header", "schema": {"type": "string"}} for name in operation.headers]
    found: JSONObject = {
        "operationId": route.name,
        "summary": documentation.splitlines()[0],
        "parameters": [*in_path, *in_query, *in_header],
        "responses": _responses(operation, schemas),
    }
    if route.endpoint is health.metrics:
        found["security"] = [{"metrics_token": []}]
    elif not route.path.startswith(KEYED):
        found["security"] = []
    content = _json(schemas[repr(operation.body)]) if operation.body is not None else {}
    if operation.form is not None:
        content["multipart/form-data"] = {"schema": schemas[repr(operation.form)]}
    if content:
        found["requestBody"] = {"required": not operation.optional, "content": content}
    return found


def _responses(operation: Operation, schemas: dict[str, JSONObject]) -> JSONObject:
    content: JSONObject = {}
    if operation.answer is not None:
        content = {operation.media_type: {"schema": schemas[repr(operation.answer)]}}
    done: JSONObject = {"description": "Done."} | ({"content": content} if content else {})
    responses: JSONObject = {str(operation.status): done}
    if operation.stream:
        frames = {"text/event-stream": {"schema": {"type": "string"}}}
        responses["200"] = {"description": "The run's events, as they come.", "content": frames}
        responses["202"] = {"description": "In progress; poll Location.", "content": content}
    responses["default"] = {
        "description": "A problem.",
        "content": {"application/problem+json": {"schema": schemas[repr(Problem)]}},
    }
    return responses


def _json(schema: JSONObject) -> JSONObject:
    return {"application/json": {"schema": schema}}
