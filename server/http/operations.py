"""What an endpoint takes and returns, declared at its route; `server.http.openapi` makes the document from it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agent_chat.stores.models import JSONObject

Tag = Literal["agents", "threads", "messages", "attachments", "events", "usage", "operations"]
JSON = "application/json"
EVENT_STREAM = "text/event-stream"


class Header(msgspec.Struct, frozen=True):
    """A header of a request or a response."""

    name: str
    description: str
    schema: JSONObject = msgspec.field(default_factory=lambda: {"type": "string"})


REQUEST_ID = Header("X-Request-Id", "What this request has in the server's log; every response has it.")
RETRY_AFTER = Header("Retry-After", "In how many seconds to try again.", {"type": "integer", "minimum": 0})
LOCATION = Header("Location", "The path of what was created.")
LINK = Header("Link", '`<…>; rel="next"`: the next page (RFC 8288); absent on the last one.')
MESSAGES_CUT = Header("X-Messages-Cut", "`true` if messages were left out, because the response would be too large.")
IDEMPOTENCY_REPLAYED = Header("Idempotency-Replayed", "`true` if the key was used before: nothing new was stored.")
PREFERENCE_APPLIED = Header("Preference-Applied", "What was applied of `Prefer` (RFC 7240).")


class ResponseType(msgspec.Struct, frozen=True):
    """A response that is not a problem.

    Attributes:
        body: the type of its content; None if it has none.
        headers: what it has, at least in some cases, besides those of every response.
    """

    body: Any = None
    status: int = 200
    media_type: str = JSON
    description: str = "Success."
    headers: tuple[Header, ...] = ()


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """What an endpoint takes and returns.

    Attributes:
        tag: the group in which the document lists it.
        responses: its responses, without problems; the first one is the usual one.
        body: the type of a JSON body.
        body_required: False if the body may be absent.
        form: the type of a multipart/form-data body, instead of or besides `body`.
        query: the struct of its query parameters, with which the endpoint calls `read_query`.
        headers: the request headers that it reads.
        raises: what it raises besides the errors that follow from its path, key, body and query.
        security: the name of its security scheme; None if it needs no key.
    """

    tag: Tag
    responses: tuple[ResponseType, ...]
    body: type[msgspec.Struct] | None = None
    body_required: bool = True
    form: type[msgspec.Struct] | None = None
    query: type[msgspec.Struct] | None = None
    headers: tuple[Header, ...] = ()
    raises: tuple[type[Exception], ...] = ()
    security: Literal["key", "metrics_token"] | None = "key"


class APIRoute(Route):
    """A route of the API, with what the OpenAPI document needs besides the endpoint's name and docstring."""

    def __init__(
        self, method: str, path: str, endpoint: Callable[[Request], Awaitable[Response]], operation: Operation
    ) -> None:
        super().__init__(path, endpoint, methods=[method])
        self.method = method
        self.operation = operation
