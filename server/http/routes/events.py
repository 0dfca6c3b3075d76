"""…/events: watching a thread."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute

from agent_chat.server.errors import RateLimited
from agent_chat.server.http.auth import principal_of
from agent_chat.server.http.requests import last_event_id, service_of, streams_of
from agent_chat.server.http.routes.threads import THREAD
from agent_chat.server.http.sse import EventStream, later
from agent_chat.server.http.websocket import serve_thread
from agent_chat.stores.errors import StoreUnavailable


async def watch(request: Request) -> Response:
    """Watch a thread as server-sent events; `Last-Event-ID` or `?after=` resumes."""
    who, streams, path = principal_of(request), streams_of(request), request.path_params
    try:
        with streams.starting(who) as slot:
            viewer = await service_of(request).watch(who, path["agent_id"], path["thread_id"], last_event_id(request))
            return EventStream(streams, viewer, slot)
    except (RateLimited, StoreUnavailable):
        return later()


ROUTES: list[BaseRoute] = [
    Route(THREAD + "/events", watch, methods=["GET"]),
    WebSocketRoute(THREAD + "/ws", serve_thread),
]
