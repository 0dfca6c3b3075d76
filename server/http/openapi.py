"""The OpenAPI 3.1 document, made from the routes: types that validate, docstrings, the problem table.

https://spec.openapis.org/oas/v3.1.0
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from copy import deepcopy
from functools import cached_property
from typing import Any, Union, get_args

import msgspec
from starlette.routing import BaseRoute

from agent_chat.server.errors import (
    InvalidRequest,
    MalformedBody,
    RateLimited,
    TooLarge,
    Unauthenticated,
    UnsupportedMediaType,
)
from agent_chat.server.http.operations import JSON, REQUEST_ID, RETRY_AFTER, APIRoute, Header, Operation, ResponseType
from agent_chat.server.http.problems import codes_of
from agent_chat.server.http.query import parameter_schemas
from agent_chat.server.http.schemas import MessageMetadata, Problem
from agent_chat.stores.errors import (
    AgentNotFound,
    AttachmentNotFound,
    MessageNotFound,
    StoreUnavailable,
    ThreadNotFound,
)
from agent_chat.stores.events import Event, LogOpened, RunError
from agent_chat.stores.models import JSONObject

PublicEvent: Any = Union[tuple(event for event in get_args(Event) if event is not LogOpened)]  # noqa: UP007

_DESCRIPTION = (
    "Threads of messages with agents. `{agent_id}` may be `default`.\n\n"
    "An event stream consists of server-sent events: `event` is the type, `data` an object of the schema `Event`, `id`"
    " the position to resume after. A WebSocket at `/api/v1/chat/{agent_id}/threads/{thread_id}/ws` sends the same"
    " objects with their `position`, and takes commands."
)
_TAGS = {
    "agents": "The agents of the caller's organization.",
    "threads": "Threads of messages with one agent.",
    "messages": "Posting, reading and cancelling.",
    "attachments": "Files of a thread.",
    "events": "Watching a thread.",
    "usage": "What runs consumed.",
    "operations": "For the operator of the server.",
}
_BEARER = {"type": "http", "scheme": "bearer"}
_PATH_PARAMETERS: dict[str, tuple[JSONObject, type[Exception]]] = {
    "agent_id": ({"type": "string", "description": "An agent's id, or `default`."}, AgentNotFound),
    "thread_id": ({"type": "string", "format": "uuid"}, ThreadNotFound),
    "message_id": ({"type": "string", "format": "uuid"}, MessageNotFound),
    "attachment_id": ({"type": "string", "format": "uuid"}, AttachmentNotFound),
}
_RETRYABLE = (429, 503)
_REFERENCE = "#/components/schemas/{name}"


class APIDescription:
    """The document as JSON, encoded once for each root path under which it is served."""

    def __init__(self, routes: Sequence[BaseRoute]) -> None:
        self._routes = routes
        self._json: dict[str, bytes] = {}

    @cached_property
    def document(self) -> JSONObject:
        """The document, without a prefix."""
        return build_document(self._routes)

    def json(self, root_path: str) -> bytes:
        """Return the document as JSON, with this prefix as its server."""
        if root_path not in self._json:
            self._json[root_path] = msgspec.json.encode({**self.document, "servers": [{"url": root_path or "/"}]})
        return self._json[root_path]


def build_document(routes: Sequence[BaseRoute]) -> JSONObject:
    """Build the document of the API's routes, without `servers`."""
    described = [route for route in routes if isinstance(route, APIRoute)]
    schemas = _Schemas([route.operation for route in described])
    paths: dict[str, JSONObject] = {}
    for route in described:
        paths.setdefault(route.path, {})[route.method.lower()] = _describe(route, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Agent chat server", "version": "1", "description": _DESCRIPTION},
        "security": [{"key": []}],
        "tags": [{"name": name, "description": description} for name, description in _TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": schemas.components,
            "securitySchemes": {"key": _BEARER, "metrics_token": _BEARER},
        },
    }


class _Schemas:
    """The schemas of everything that the operations take and return.

    Attributes:
        components: by name, in the document's form.
    """

    def __init__(self, operations: Iterable[Operation]) -> None:
        received = [type for each in operations for type in (each.body, each.form) if type is not None]
        sent = [each.body for operation in operations for each in operation.responses if each.body is not None]
        sent += [Problem, MessageMetadata, PublicEvent]
        self._by_type: dict[str, JSONObject] = {}
        received_components = self._add(received)
        sent_components = self._add(sent)
        for name, schema in sent_components.items():
            if name != RunError.__name__:  # it omits defaults
                _require_all(schema)
        self.components = {**received_components, **sent_components, "Event": self._by_type[repr(PublicEvent)]}
        self.components["Message"]["properties"]["metadata"] = self.of(MessageMetadata)
        self.components[MessageMetadata.__name__]["additionalProperties"] = True

    def of(self, type: Any) -> JSONObject:
        return self._by_type[repr(type)]

    def _add(self, types: Sequence[Any]) -> dict[str, JSONObject]:
        schemas, components = msgspec.json.schema_components(types, ref_template=_REFERENCE)
        for type, schema in zip(types, schemas, strict=True):
            self._by_type[repr(type)] = schema
        for schema in (*schemas, *components.values()):
            _complete(schema)
        return components


def _complete(schema: Any) -> None:
    """Add what generators of clients need and msgspec leaves implicit: types of enums, that free-form objects are open.

    Descriptions come from docstrings: their indentation is removed.
    """
    if isinstance(schema, list):
        for each in schema:
            _complete(each)
    if not isinstance(schema, dict):
        return
    if schema.get("type") == "object" and not schema.get("properties") and "additionalProperties" not in schema:
        schema["additionalProperties"] = True
    match schema.get("enum"):
        case [str() as only]:
            del schema["enum"]
            schema |= {"type": "string", "const": only}
        case [str(), *_]:
            schema["type"] = "string"
    if isinstance(description := schema.get("description"), str):
        schema["description"] = inspect.cleandoc(description)
    for each in schema.values():
        _complete(each)


def _require_all(schema: JSONObject) -> None:
    """Require the members with a default: the server sends them always. (UNSET, which is not sent, is no default.)"""
    for name, member in schema["properties"].items():
        if "default" in member:
            del member["default"]
            schema["required"].append(name)


def _describe(route: APIRoute, schemas: _Schemas) -> JSONObject:
    operation = route.operation
    summary, _, description = (inspect.getdoc(route.endpoint) or "").partition("\n")
    found: JSONObject = {
        "operationId": route.name,
        "tags": [operation.tag],
        "summary": summary,
        "parameters": _parameters(route),
        "responses": _responses(route, schemas),
    }
    if description.strip():
        found["description"] = description.strip()
    if operation.security != "key":
        found["security"] = [{operation.security: []}] if operation.security else []
    content: JSONObject = {}
    if operation.body is not None:
        content[JSON] = {"schema": schemas.of(operation.body)}
    if operation.form is not None:
        content["multipart/form-data"] = {"schema": schemas.of(operation.form)}
    if content:
        found["requestBody"] = {"required": operation.body_required, "content": content}
    return found


def _names_in(path: str) -> list[str]:
    return re.findall(r"{(\w+)}", path)


def _parameters(route: APIRoute) -> list[JSONObject]:
    in_path = [
        {"name": name, "in": "path", "required": True, "schema": _PATH_PARAMETERS[name][0]}
        for name in _names_in(route.path)
    ]
    declared = deepcopy(parameter_schemas(route.operation.query)) if route.operation.query is not None else {}
    _complete(declared)
    in_query = [{"name": name, "in": "query", "schema": schema} for name, schema in declared.items()]
    in_header = [{"name": header.name, "in": "header", **_header(header)} for header in route.operation.headers]
    return [*in_path, *in_query, *in_header]


def _header(header: Header) -> JSONObject:
    return {"description": header.description, "schema": header.schema}


def _responses(route: APIRoute, schemas: _Schemas) -> JSONObject:
    responses: JSONObject = {}
    for each in route.operation.responses:
        responses[str(each.status)] = _response(each, schemas)
    content = {"application/problem+json": {"schema": schemas.of(Problem)}}
    codes: dict[int, set[str]] = {}
    for error in _errors(route):
        for status, code in codes_of(error):
            codes.setdefault(status, set()).add(code)
    for status in sorted(codes):
        description = " or ".join(f"`{code}`" for code in sorted(codes[status]))
        headers = (RETRY_AFTER,) if status in _RETRYABLE else ()
        responses[str(status)] = {"description": description, "headers": _headers(headers), "content": content}
    responses["default"] = {"description": "Any other problem.", "headers": _headers(()), "content": content}
    return responses


def _response(type: ResponseType, schemas: _Schemas) -> JSONObject:
    response: JSONObject = {"description": type.description, "headers": _headers(type.headers)}
    if type.body is not None:
        response["content"] = {type.media_type: {"schema": schemas.of(type.body)}}
    return response


def _headers(headers: Sequence[Header]) -> JSONObject:
    return {header.name: _header(header) for header in (*headers, REQUEST_ID)}


def _errors(route: APIRoute) -> list[type[Exception]]:
    """What the endpoint may raise."""
    operation, names = route.operation, _names_in(route.path)
    errors = [*operation.raises]
    errors += [_PATH_PARAMETERS[name][1] for name in names if name != "agent_id" or names == ["agent_id"]]
    if operation.security is not None:
        errors += [Unauthenticated]
    if operation.security == "key":
        errors += [RateLimited, StoreUnavailable]
    if operation.body is not None or operation.form is not None:
        errors += [MalformedBody, TooLarge, UnsupportedMediaType, InvalidRequest]
    if operation.query is not None:
        errors += [InvalidRequest]
    return errors
