"""What several routes read from requests and write to responses."""

from __future__ import annotations

from typing import TypeVar, cast
from urllib.parse import quote, urlencode

import msgspec
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from agent_chat.server.ai_chat_service import AIChatService
from agent_chat.server.errors import InvalidRequest, TooLarge, UnsupportedMediaType
from agent_chat.server.http.bodies import BODY_BYTES, decode_body
from agent_chat.server.http.body_stream import receive_body
from agent_chat.server.http.operations import Header
from agent_chat.server.reading.streams import Streams

B = TypeVar("B", bound=msgspec.Struct)

_KEY_CHARACTERS = 255
IDEMPOTENCY_KEY = Header(
    "Idempotency-Key",
    "A request with a key that was used within 24 hours has the effect, and the response, of the first one.",
    {"type": "string", "minLength": 1, "maxLength": _KEY_CHARACTERS},
)
PREFER = Header("Prefer", "`respond-async` or `wait=N` (seconds): respond with the message in progress (RFC 7240).")
LAST_EVENT_ID = Header("Last-Event-ID", "The position to resume after.")
RANGE = Header("Range", "One range of bytes.")


def service_of(connection: HTTPConnection) -> AIChatService:
    """Return the application's chat service."""
    return cast(AIChatService, connection.state.service)


def streams_of(connection: HTTPConnection) -> Streams:
    """Return the application's open streams."""
    return cast(Streams, connection.state.streams)


def public_path(connection: HTTPConnection, path: str) -> str:
    """Return the path as clients see it: percent-encoded and with the root path."""
    return quote(connection.scope.get("root_path", "") + path, safe="/:@")


def as_json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Build a JSON response."""
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")


async def read_body(request: Request, type: type[B], *, empty: B | None = None) -> B:
    """Read a JSON body.

    Args:
        empty: what to return for an empty body; without it an empty body is malformed.

    Raises: UnsupportedMediaType, TooLarge, BodyStalled, MalformedBody, InvalidRequest.
    """
    data = bytearray()
    async for part in receive_body(request):
        data += part
        if len(data) > BODY_BYTES:
            raise TooLarge("body", BODY_BYTES)
    if not data and empty is not None:
        return empty
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise UnsupportedMediaType(kind)
    return decode_body(bytes(data), type)


def next_link(request: Request, path: str, *, limit: int, offset: int) -> str:
    """Return the Link header of a list's next page. https://www.rfc-editor.org/rfc/rfc8288"""
    query = urlencode({**request.query_params, "limit": limit, "offset": offset})
    return f'<{public_path(request, path)}?{query}>; rel="next"'


def idempotency_key(request: Request) -> str | None:
    """Return the Idempotency-Key header, 1 to 255 visible characters; None without it. Raises: InvalidRequest."""
    key = request.headers.get("idempotency-key")
    if key is not None and not (0 < len(key) <= _KEY_CHARACTERS and key.isprintable()):
        raise InvalidRequest("Idempotency-Key", f"An Idempotency-Key has 1 to {_KEY_CHARACTERS} visible characters.")
    return key


def accepts_stream(request: Request) -> bool:
    """Return True if the Accept header names text/event-stream and not application/json."""
    accept = request.headers.get("accept", "").lower()
    return "text/event-stream" in accept and "application/json" not in accept


def preferred_wait(request: Request) -> float | None:
    """Return how many seconds to wait for the run, by `Prefer: wait=N` or `respond-async` (0); None: until it ends.

    https://www.rfc-editor.org/rfc/rfc7240
    """
    seconds: float | None = None
    for preference in ",".join(request.headers.getlist("prefer")).split(","):
        name, _, value = preference.partition(";")[0].partition("=")
        match name.strip().lower(), value.strip().strip('"'):
            case "wait", digits if digits.isascii() and digits.isdecimal() and len(digits) < 7:
                return float(digits)
            case "respond-async", _:
                seconds = 0.0
            case _:
                pass
    return seconds


def last_event_id(request: Request) -> str | None:
    """Return the Last-Event-ID header; None if it is missing or empty."""
    return request.headers.get("last-event-id") or None
