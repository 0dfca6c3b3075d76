"""From exceptions to problems: one table, used by HTTP, the WebSocket and failed runs.

Lower layers raise plain exceptions that write their own sentence; here each gets its status and its stable code, as
RFC 9457 problem details. An exception that is not in the table is a bug: 500 `internal`, and its text is logged but not
sent.
"""

from __future__ import annotations

import logging
import math

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match, Route

from agent_chat.agents import AgentError
from agent_chat.server.errors import (
    RETRY_SECONDS,
    AgentDeleted,
    AnswerUnknown,
    AuthRateLimited,
    BodyStalled,
    ChatError,
    DiskFull,
    Draining,
    Forbidden,
    Gone,
    InvalidRequest,
    MalformedBody,
    RangeNotSatisfiable,
    RateLimited,
    RunFailedError,
    StorageFull,
    ThreadEmpty,
    TooLarge,
    Unauthenticated,
    UnsupportedMediaType,
)
from agent_chat.server.log_lines import REQUEST_ID
from agent_chat.stores import errors as stores
from agent_chat.stores.models import JSONObject

logger = logging.getLogger(__name__)

SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; base-uri 'none'; frame-ancestors 'none'",
}
"""For every response that sets no value of its own."""


class Problem(msgspec.Struct, frozen=True):
    """The response to a failed request.

    Attributes:
        code: the stable name of the problem.
        detail: a sentence for people.
        more: further members of the body.
    """

    status: int
    code: str
    detail: str
    more: JSONObject = {}
    headers: dict[str, str] = {}

    def body(self) -> JSONObject:
        """The RFC 9457 object."""
        return {
            "type": f"urn:chat:problem:{self.code}",
            "title": self.code.replace("_", " ").capitalize(),
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
            **self.more,
        }

    def response(self) -> Response:
        """Build the HTTP response."""
        headers = {**SAFE_HEADERS, **self.headers}
        return Response(msgspec.json.encode(self.body()), self.status, headers, media_type="application/problem+json")


_TABLE: dict[type[Exception], tuple[int, str]] = {
    MalformedBody: (400, "malformed_body"),
    ClientDisconnect: (400, "malformed_body"),
    BodyStalled: (400, "malformed_body"),
    Unauthenticated: (401, "unauthenticated"),
    Forbidden: (403, "forbidden"),
    stores.AgentNotFound: (404, "agent_not_found"),
    stores.ThreadNotFound: (404, "thread_not_found"),
    stores.MessageNotFound: (404, "message_not_found"),
    stores.AttachmentNotFound: (404, "attachment_not_found"),
    stores.BlobNotFound: (404, "attachment_not_found"),
    stores.ThreadBusy: (409, "thread_busy"),
    stores.ThreadArchived: (409, "thread_archived"),
    ThreadEmpty: (409, "thread_empty"),
    AgentDeleted: (409, "agent_deleted"),
    Gone: (410, "gone"),
    TooLarge: (413, "too_large"),
    UnsupportedMediaType: (415, "unsupported_media_type"),
    RangeNotSatisfiable: (416, "range_not_satisfiable"),
    InvalidRequest: (422, "invalid_request"),
    stores.IdempotencyMismatch: (422, "idempotency_mismatch"),
    RateLimited: (429, "rate_limited"),
    AuthRateLimited: (429, "rate_limited"),
    Draining: (503, "draining"),
    stores.StoreDamaged: (500, "internal"),
    stores.StoreUnavailable: (503, "store_unavailable"),
    AnswerUnknown: (503, "store_unavailable"),
    stores.BlobUnavailable: (503, "store_unavailable"),
    StorageFull: (507, "storage_full"),
    DiskFull: (507, "storage_full"),
    stores.StoreFull: (507, "storage_full"),
    stores.BlobStorageFull: (507, "storage_full"),
}
_RUN_STATUS = {
    "agent_failed": 502,
    "agent_overloaded": 503,
    "interrupted": 503,
    "store_unavailable": 503,
    "agent_timeout": 504,
    "storage_full": 507,
}
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}

EXPECTED: tuple[type[Exception], ...] = (ChatError, stores.StoreError, AgentError, HTTPException, ClientDisconnect)
"""What requests raise without a bug. Starlette logs every other exception with a traceback, even if it is handled."""


def problem_of(error: Exception) -> Problem:
    """Return the problem for an exception; an unexpected one is logged and becomes 500 `internal`."""
    match error:
        case RunFailedError(message=message):
            more = {"thread_id": message.thread_id, "message_id": message.id, "retryable": error.retryable}
            status = _RUN_STATUS.get(error.code, 502)
            headers = _retry_after(status, error.retry_after) if error.retryable else {}
            return Problem(status, error.code, str(error), more, headers)
        case AgentError():
            status = _RUN_STATUS.get(error.code, 502)
            headers = _retry_after(status, error.retry_after)
            return Problem(status, error.code, error.detail, {"retryable": error.retryable}, headers)
        case HTTPException():
            code = _HTTP_CODES.get(error.status_code, "http_error")
            return Problem(error.status_code, code, error.detail, {}, dict(error.headers or {}))
    if type(error) not in _TABLE:
        logger.error("unexpected %s", type(error).__name__, exc_info=error)
        return Problem(500, "internal", "The server failed unexpectedly.")
    status, code = _TABLE[type(error)]
    return Problem(status, code, _sentence(error), _facts(error), _headers(error, status))


def codes_of(error: type[Exception]) -> list[tuple[int, str]]:
    """Every status and code that `problem_of` can give to exceptions of this type."""
    if error is RunFailedError:
        return [(status, code) for code, status in _RUN_STATUS.items()]
    return [_TABLE[error]]


def _headers(error: Exception, status: int) -> dict[str, str]:
    match error:
        case RateLimited(retry_after=retry_after) | AuthRateLimited(retry_after=retry_after):
            return {"Retry-After": str(retry_after)}
        case RangeNotSatisfiable(size=size):
            return {"Content-Range": f"bytes */{size}"}
        case Unauthenticated():
            return {"WWW-Authenticate": "Bearer"}
        case BodyStalled():
            return {"Connection": "close"}
        case _:
            return {"Retry-After": str(RETRY_SECONDS)} if status == 503 else {}


def _retry_after(status: int, seconds: float | None) -> dict[str, str]:
    """Return the Retry-After header in whole seconds, as RFC 9110 requires; a 503 always has one."""
    if seconds is None:
        return {"Retry-After": str(RETRY_SECONDS)} if status == 503 else {}
    return {"Retry-After": str(math.ceil(seconds))}


def _sentence(error: Exception) -> str:
    match error:
        case stores.AgentNotFound():
            return f"{error} Create one with POST /api/v1/agents."
        case ClientDisconnect():
            return "The body ended too early."
        case stores.StoreDamaged():
            return "The server's database is damaged; its operator has to restore it."
        case DiskFull() | stores.StoreFull() | stores.BlobStorageFull():
            return "The server's disk is full; nothing was stored."
        case stores.StoreUnavailable():
            return "The database does not answer; try again."
        case _:
            return str(error)


def _facts(error: Exception) -> JSONObject:
    match error:
        case InvalidRequest(field=field) | TooLarge(field=field):
            return {"field": field}
        case stores.ThreadBusy(message_id=message_id):
            return {"message_id": message_id}
        case AnswerUnknown(thread_id=thread_id, message_id=message_id):
            return {"thread_id": thread_id, "message_id": message_id, "retryable": True}
        case Gone(path=path):
            return {"use": path}
        case _:
            return {}


async def respond(request: Request, error: Exception) -> Response:
    """Starlette's exception hook for everything."""
    response = problem_of(error).response()
    if response.status_code == 405:
        response.headers["Allow"] = ", ".join(sorted(_methods(request)))
    if response.status_code == 500 and (request_id := REQUEST_ID.get()):
        response.headers["X-Request-Id"] = request_id  # this response does not pass the middleware
    return response


def _methods(request: Request) -> set[str]:
    """Return all methods of the path; Starlette's own 405 names those of its first route only."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    return {
        method
        for route in routes
        if route.matches(request.scope)[0] is not Match.NONE
        for method in route.methods or ()
    }
