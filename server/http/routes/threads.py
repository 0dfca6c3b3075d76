"""/api/v1/chat/{agent_id}/threads: threads with one agent, and the removed paths of the former service."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agent_chat.server.errors import AgentDeleted, Draining, Gone, RunFailedError, StorageFull, ThreadEmpty
from agent_chat.server.http.auth import principal_of
from agent_chat.server.http.large_json import list_response, thread_response
from agent_chat.server.http.operations import (
    IDEMPOTENCY_REPLAYED,
    LINK,
    LOCATION,
    MESSAGES_CUT,
    APIRoute,
    Operation,
    ResponseType,
)
from agent_chat.server.http.query import Offset, read_query
from agent_chat.server.http.requests import (
    IDEMPOTENCY_KEY,
    idempotency_key,
    next_link,
    public_path,
    read_body,
    service_of,
)
from agent_chat.server.inputs import ThreadCreate, ThreadUpdate
from agent_chat.stores.contracts import ThreadPart
from agent_chat.stores.errors import IdempotencyMismatch
from agent_chat.stores.models import Thread

THREADS = "/api/v1/chat/{agent_id}/threads"
THREAD = THREADS + "/{thread_id}"


class ThreadsQuery(msgspec.Struct, frozen=True):
    """The query of a list of threads."""

    limit: Annotated[int, Meta(ge=1, le=50, description="How many to return.")] = 10
    offset: Offset = 0
    archived: (
        Annotated[bool, Meta(description="Only archived threads, or only the others. Without it: both.")] | None
    ) = None
    message_limit: Annotated[int, Meta(ge=0, le=50, description="How many messages of each thread to return.")] = 50
    external_id: (
        Annotated[str, Meta(min_length=1, max_length=255, description="Only threads with this external id.")] | None
    ) = None


class ThreadQuery(msgspec.Struct, frozen=True):
    """The query of one thread."""

    message_limit: Annotated[int, Meta(ge=1, le=100, description="How many of the latest messages to return.")] = 50


async def create_thread(request: Request) -> Response:
    """Create a thread with an agent, or return the caller's thread with the same `external_id` (200).

    `metadata.thread` of a thread with an external id is `{"external_id": …}`.
    """
    body = await read_body(request, ThreadCreate, empty=ThreadCreate())
    created = await service_of(request).create_thread(
        principal_of(request), request.path_params["agent_id"], body, idempotency_key=idempotency_key(request)
    )
    path = f"/api/v1/chat/{created.thread.agent_id}/threads/{created.thread.id}"
    headers = {LOCATION.name: public_path(request, path)}
    if created.replayed:
        headers[IDEMPOTENCY_REPLAYED.name] = "true"
    return await _respond(ThreadPart(created.thread, created.cut), 200 if created.found else 201, headers)


async def list_threads(request: Request) -> Response:
    """List the organization's threads with an agent, the latest activity first."""
    query = read_query(request, ThreadsQuery)
    page = await service_of(request).list_threads(
        principal_of(request),
        request.path_params["agent_id"],
        limit=query.limit,
        offset=query.offset,
        archived=query.archived,
        message_limit=query.message_limit,
        external_id=query.external_id,
    )
    headers = {}
    if page.more:
        path = f"/api/v1/chat/{request.path_params['agent_id']}/threads"
        headers[LINK.name] = next_link(request, path, limit=query.limit, offset=query.offset + query.limit)
    if page.cut:
        headers[MESSAGES_CUT.name] = "true"
    return await list_response(page.threads, headers)


async def get_thread(request: Request) -> Response:
    """Read a thread with its latest messages, oldest first."""
    agent_id, thread_id = request.path_params["agent_id"], request.path_params["thread_id"]
    limit = read_query(request, ThreadQuery).message_limit
    service = service_of(request)
    return await _respond(await service.get_thread(principal_of(request), agent_id, thread_id, message_limit=limit))


async def update_thread(request: Request) -> Response:
    """Rename, archive or un-archive a thread."""
    body = await read_body(request, ThreadUpdate)
    agent_id, thread_id = request.path_params["agent_id"], request.path_params["thread_id"]
    return await _respond(await service_of(request).update_thread(principal_of(request), agent_id, thread_id, body))


async def delete_thread(request: Request) -> Response:
    """Delete a thread with everything in it."""
    agent_id, thread_id = request.path_params["agent_id"], request.path_params["thread_id"]
    await service_of(request).delete_thread(principal_of(request), agent_id, thread_id)
    return Response(status_code=204)


async def generate_title(request: Request) -> Response:
    """Generate a title from the messages with the agent's model, and store it."""
    agent_id, thread_id = request.path_params["agent_id"], request.path_params["thread_id"]
    return await _respond(await service_of(request).generate_title(principal_of(request), agent_id, thread_id))


async def _respond(part: ThreadPart, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    cut = {MESSAGES_CUT.name: "true"} if part.cut else {}
    return await thread_response(part.thread, status, {**(headers or {}), **cut})


async def gone(request: Request) -> Response:
    """Refuse the paths of the service that this one replaces."""
    raise Gone("/api/v1/chat/{agent_id}/threads")


_THREAD = ResponseType(Thread, headers=(MESSAGES_CUT,))
_GONE_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]
ROUTES = [
    Route("/api/v1/chat/conversations", gone, methods=_GONE_METHODS),
    Route("/api/v1/chat/conversations/{rest:path}", gone, methods=_GONE_METHODS),
    APIRoute(
        "POST",
        THREADS,
        create_thread,
        Operation(
            tag="threads",
            responses=(
                ResponseType(Thread, 201, headers=(LOCATION, IDEMPOTENCY_REPLAYED, MESSAGES_CUT)),
                ResponseType(
                    Thread, 200, headers=(LOCATION, MESSAGES_CUT), description="The thread with this `external_id`."
                ),
            ),
            body=ThreadCreate,
            body_required=False,
            headers=(IDEMPOTENCY_KEY,),
            raises=(IdempotencyMismatch, StorageFull),
        ),
    ),
    APIRoute(
        "GET",
        THREADS,
        list_threads,
        Operation(
            tag="threads", responses=(ResponseType(list[Thread], headers=(LINK, MESSAGES_CUT)),), query=ThreadsQuery
        ),
    ),
    APIRoute("GET", THREAD, get_thread, Operation(tag="threads", responses=(_THREAD,), query=ThreadQuery)),
    APIRoute("PATCH", THREAD, update_thread, Operation(tag="threads", responses=(_THREAD,), body=ThreadUpdate)),
    APIRoute("DELETE", THREAD, delete_thread, Operation(tag="threads", responses=(ResponseType(status=204),))),
    APIRoute(
        "POST",
        THREAD + "/generate_title",
        generate_title,
        Operation(
            tag="threads",
            responses=(_THREAD,),
            raises=(ThreadEmpty, AgentDeleted, Draining, RunFailedError),
        ),
    ),
]
