"""/api/v1/chat/{agent_id}/threads: threads with one agent, and the old paths that are gone."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agent_chat.server.errors import Gone
from agent_chat.server.http.auth import principal_of
from agent_chat.server.http.large_json import list_response, thread_response
from agent_chat.server.http.requests import (
    body_of,
    boolean,
    idempotency_key,
    integer,
    next_link,
    public_path,
    service_of,
)
from agent_chat.server.inputs import ThreadCreate, ThreadUpdate
from agent_chat.stores.contracts import ThreadPart

THREADS = "/api/v1/chat/{agent_id}/threads"
THREAD = THREADS + "/{thread_id}"
CUT = "X-Messages-Cut"


async def create_thread(request: Request) -> Response:
    """Create a thread with an agent."""
    body = await body_of(request, ThreadCreate, empty=ThreadCreate())
    made = await service_of(request).create_thread(
        principal_of(request), request.path_params["agent_id"], body, idempotency_key=idempotency_key(request)
    )
    path = f"/api/v1/chat/{made.thread.agent_id}/threads/{made.thread.id}"
    headers = {"Location": public_path(request, path)}
    if made.replayed:
        headers["Idempotency-Replayed"] = "true"
    return await _answer(ThreadPart(made.thread, made.cut), 201, headers)


async def list_threads(request: Request) -> Response:
    """List the organization's threads with an agent, newest updated first."""
    limit, offset = integer(request, "limit", 10, 1, 50), integer(request, "offset", 0, 0)
    page = await service_of(request).list_threads(
        principal_of(request),
        request.path_params["agent_id"],
        limit=limit,
        offset=offset,
        archived=boolean(request, "archived"),
        message_limit=integer(request, "message_limit", 50, 0, 50),
    )
    headers = {}
    if page.more:
        path = f"/api/v1/chat/{request.path_params['agent_id']}/threads"
        headers["Link"] = next_link(request, path, limit=limit, offset=offset + limit)
    if page.cut:
        headers[CUT] = "true"
    return await list_response(page.threads, headers)


async def get_thread(request: Request) -> Response:
    """Read a thread with its latest messages, oldest first."""
    agent_id, thread_id = request.path_params["agent_id"], request.path_params["thread_id"]
    limit = integer(request, "message_limit", 50, 1, 100)
    service = service_of(request)
    return await _answer(await service.get_thread(principal_of(request), agent_id, thread_id, message_limit=limit))


async def update_thread(request: Request) -> Response:
    """Rename, archive or un-archive a thread."""
    body = await body_of(request, ThreadUpdate)
    agent_id, thread_id = request.path_params["agent_id"], request.path_params["thread_id"]
    return await _answer(await service_of(request).update_thread(principal_of(request), agent_id, thread_id, body))


async def delete_thread(request: Request) -> Response:
    """Delete a thread with everything in it."""
    agent_id, thread_id = request.path_params["agent_id"], request.path_params["thread_id"]
    await service_of(request).delete_thread(principal_of(request), agent_id, thread_id)
    return Response(status_code=204)


async def generate_title(request: Request) -> Response:
    """Have the agent's model make a title from the messages, and keep it."""
    agent_id, thread_id = request.path_params["agent_id"], request.path_params["thread_id"]
    return await _answer(await service_of(request).generate_title(principal_of(request), agent_id, thread_id))


async def _answer(part: ThreadPart, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    cut = {CUT: "true"} if part.cut else {}
    return await thread_response(part.thread, status, {**(headers or {}), **cut})


async def gone(request: Request) -> Response:
    """The paths of the service that this one replaces."""
    raise Gone("/api/v1/chat/{agent_id}/threads")


ROUTES = [
    Route("/api/v1/chat/conversations", gone, methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
    Route("/api/v1/chat/conversations/{rest:path}", gone, methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
    Route(THREADS, create_thread, methods=["POST"]),
    Route(THREADS, list_threads, methods=["GET"]),
    Route(THREAD, get_thread, methods=["GET"]),
    Route(THREAD, update_thread, methods=["PATCH"]),
    Route(THREAD, delete_thread, methods=["DELETE"]),
    Route(THREAD + "/generate_title", generate_title, methods=["POST"]),
]
