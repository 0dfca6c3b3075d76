"""…/messages: posting with its three forms of response, older pages, one message, cancelling."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta
from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import Response

from agent_chat.server.errors import AgentDeleted, Draining, RunFailedError, StorageFull
from agent_chat.server.http.auth import principal_of
from agent_chat.server.http.bodies import decode_form
from agent_chat.server.http.large_json import list_response
from agent_chat.server.http.operations import (
    EVENT_STREAM,
    IDEMPOTENCY_REPLAYED,
    LOCATION,
    MESSAGES_CUT,
    PREFERENCE_APPLIED,
    APIRoute,
    Operation,
    ResponseType,
)
from agent_chat.server.http.problems import problem_of
from agent_chat.server.http.query import MessageId, PageLimit, read_query
from agent_chat.server.http.requests import (
    IDEMPOTENCY_KEY,
    LAST_EVENT_ID,
    PREFER,
    accepts_stream,
    as_json,
    idempotency_key,
    last_event_id,
    preferred_wait,
    public_path,
    read_body,
    service_of,
    streams_of,
)
from agent_chat.server.http.routes.threads import THREAD
from agent_chat.server.http.schemas import MessageForm
from agent_chat.server.http.sse import EventStream
from agent_chat.server.http.uploads import is_multipart, read_form
from agent_chat.server.inputs import IfBusy, MessageCreate
from agent_chat.stores.contracts import Posted
from agent_chat.stores.errors import IdempotencyMismatch, ThreadArchived, ThreadBusy
from agent_chat.stores.models import Message

MESSAGES = THREAD + "/messages"


class PostQuery(msgspec.Struct, frozen=True):
    """The query of a posted message."""

    stream: (
        Annotated[bool, Meta(description="Respond with an event stream, or not. Without it the Accept header decides.")]
        | None
    ) = None
    if_busy: Annotated[IfBusy, Meta(description="What to do if another run is in progress.")] = "reject"


class MessagesQuery(msgspec.Struct, frozen=True):
    """The query of a list of messages."""

    before: Annotated[MessageId, Meta(description="Only messages before this one.")] | None = None
    limit: PageLimit = 50


async def post_message(request: Request) -> Response:
    """Post a message. A user's message starts a run of the agent.

    The response is the agent's finished message, the message in progress (`Prefer`), or the run's events (`stream`).
    """
    principal, service = principal_of(request), service_of(request)
    agent_id, thread_id = request.path_params["agent_id"], request.path_params["thread_id"]
    if position := last_event_id(request):
        with streams_of(request).starting(principal) as slot:
            return EventStream(
                streams_of(request), await service.resume(principal, agent_id, thread_id, position), slot
            )
    query = read_query(request, PostQuery)
    if not (accepts_stream(request) if query.stream is None else query.stream):
        posted = await _post(request, query.if_busy)
        return await _respond(request, posted, _replay_headers(posted))
    with streams_of(request).starting(principal) as slot:
        posted = await _post(request, query.if_busy, stream=True)
        viewer = await service.stream(principal, thread_id, posted)
        return EventStream(streams_of(request), viewer, slot, _replay_headers(posted))


def _replay_headers(posted: Posted) -> dict[str, str]:
    return {IDEMPOTENCY_REPLAYED.name: "true"} if posted.replayed else {}


async def _post(request: Request, if_busy: IfBusy, *, stream: bool = False) -> Posted:
    """Read the message, as JSON or as a form with files, and post it."""
    principal, service = principal_of(request), service_of(request)
    agent_id, thread_id = request.path_params["agent_id"], request.path_params["thread_id"]
    key = idempotency_key(request)
    if is_multipart(request):
        await service.find_thread(principal, agent_id, thread_id)
        if key is None:  # a repeated key starts no run. The role is not known yet: assume a user's message
            service.check_capacity(principal)
        async with read_form(request) as form:
            body = decode_form(form.fields, files=bool(form.files))
            return await service.post_message(
                principal,
                agent_id,
                thread_id,
                body,
                idempotency_key=key,
                if_busy=if_busy,
                files=form.files,
                stream=stream,
            )
    body = await read_body(request, MessageCreate)
    return await service.post_message(
        principal, agent_id, thread_id, body, idempotency_key=key, if_busy=if_busy, stream=stream
    )


async def _respond(request: Request, posted: Posted, headers: dict[str, str]) -> Response:
    """Build the JSON response: 201 with the finished message, 202 with one in progress, or the failed run's problem."""
    message = posted.answer or posted.message
    seconds = preferred_wait(request)
    path = MESSAGES.format(**request.path_params)
    headers[LOCATION.name] = public_path(request, f"{path}/{message.id}")
    if seconds is not None:
        headers[PREFERENCE_APPLIED.name] = f"wait={seconds:g}" if seconds else "respond-async"
    if message.in_progress and seconds != 0:
        message = await service_of(request).wait(principal_of(request), message.thread_id, message.id, seconds)
    if message.status == "failed":
        problem = problem_of(RunFailedError(message))
        return replace(problem, headers={**headers, **problem.headers}).response()
    return as_json(message, 202 if message.in_progress else 201, headers)


async def list_messages(request: Request) -> Response:
    """List the latest `limit` messages before `before`, oldest first.

    The response has at most 8 MB, but at least one message; `X-Messages-Cut: true` if its size leaves some out.
    """
    query = read_query(request, MessagesQuery)
    page = await service_of(request).list_messages(
        principal_of(request),
        request.path_params["agent_id"],
        request.path_params["thread_id"],
        before=query.before,
        limit=query.limit,
    )
    return await list_response(page.messages, {MESSAGES_CUT.name: "true"} if page.cut else {})


async def get_message(request: Request) -> Response:
    """Read one message. Clients that do not stream poll a run with it."""
    path = request.path_params
    return as_json(
        await service_of(request).get_message(
            principal_of(request), path["agent_id"], path["thread_id"], path["message_id"]
        )
    )


async def cancel(request: Request) -> Response:
    """Cancel the run of this message. The response is the stored message; a finished one does not change."""
    path = request.path_params
    return as_json(
        await service_of(request).cancel(principal_of(request), path["agent_id"], path["thread_id"], path["message_id"])
    )


_POSTED_HEADERS = (LOCATION, IDEMPOTENCY_REPLAYED, PREFERENCE_APPLIED)
ROUTES = [
    APIRoute(
        "POST",
        MESSAGES,
        post_message,
        Operation(
            tag="messages",
            responses=(
                ResponseType(
                    Message,
                    201,
                    description="The agent's finished message; for other roles, the stored one.",
                    headers=_POSTED_HEADERS,
                ),
                ResponseType(
                    str, 200, EVENT_STREAM, "The events of the run, as they are published.", (IDEMPOTENCY_REPLAYED,)
                ),
                ResponseType(
                    Message,
                    202,
                    description="The message in progress; `Location` is where to poll it.",
                    headers=_POSTED_HEADERS,
                ),
            ),
            body=MessageCreate,
            form=MessageForm,
            query=PostQuery,
            headers=(IDEMPOTENCY_KEY, PREFER, LAST_EVENT_ID),
            raises=(
                ThreadBusy,
                ThreadArchived,
                AgentDeleted,
                IdempotencyMismatch,
                Draining,
                StorageFull,
                RunFailedError,
            ),
        ),
    ),
    APIRoute(
        "GET",
        MESSAGES,
        list_messages,
        Operation(
            tag="messages", responses=(ResponseType(list[Message], headers=(MESSAGES_CUT,)),), query=MessagesQuery
        ),
    ),
    APIRoute(
        "GET", MESSAGES + "/{message_id}", get_message, Operation(tag="messages", responses=(ResponseType(Message),))
    ),
    APIRoute(
        "POST", MESSAGES + "/{message_id}/cancel", cancel, Operation(tag="messages", responses=(ResponseType(Message),))
    ),
]
