"""…/events: watching a thread."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, WebSocketRoute

from agent_chat.server.errors import RateLimited
from agent_chat.server.http.auth import principal_of
from agent_chat.server.http.operations import EVENT_STREAM, APIRoute, Operation, ResponseType
from agent_chat.server.http.query import read_query
from agent_chat.server.http.requests import LAST_EVENT_ID, last_event_id, service_of, streams_of
from agent_chat.server.http.routes.threads import THREAD
from agent_chat.server.http.sse import EventStream, retry_later
from agent_chat.server.http.websocket import serve_thread
from agent_chat.stores.errors import StoreUnavailable


class WatchQuery(msgspec.Struct, frozen=True):
    """The query of a watcher."""

    after: Annotated[str, Meta(description="The position to resume after; the header wins.")] | None = None


async def watch(request: Request) -> Response:
    """Watch a thread as server-sent events.

    Without a position the first event is a `thread.snapshot`; with one the stream resumes after it.
    """
    principal, streams, path = principal_of(request), streams_of(request), request.path_params
    try:
        with streams.starting(principal) as slot:
            after = last_event_id(request) or read_query(request, WatchQuery).after or None
            viewer = await service_of(request).watch(principal, path["agent_id"], path["thread_id"], after)
            return EventStream(streams, viewer, slot)
    except (RateLimited, StoreUnavailable):
        return retry_later()


ROUTES: list[BaseRoute] = [
    APIRoute(
        "GET",
        THREAD + "/events",
        watch,
        Operation(
            tag="events",
            responses=(ResponseType(str, 200, EVENT_STREAM, "Events, as they are published."),),
            query=WatchQuery,
            headers=(LAST_EVENT_ID,),
        ),
    ),
    WebSocketRoute(THREAD + "/ws", serve_thread),
]
