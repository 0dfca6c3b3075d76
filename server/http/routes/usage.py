"""/api/v1/usage: what the organization's runs consumed."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from agent_chat.server.http.auth import principal_of
from agent_chat.server.http.operations import LINK, APIRoute, Operation, ResponseType
from agent_chat.server.http.query import Day, Offset, read_query
from agent_chat.server.http.requests import as_json, next_link, service_of
from agent_chat.stores.contracts.usage import UsageGroup, UsageTotal

USAGE = "/api/v1/usage"


class UsageQuery(msgspec.Struct, frozen=True, rename={"first_day": "from", "last_day": "to"}):
    """The query of usage."""

    first_day: Annotated[Day, Meta(description="The first day, in UTC; without it 29 days before today.")] | None = None
    last_day: Annotated[Day, Meta(description="The last day, in UTC; without it today.")] | None = None
    group_by: Annotated[UsageGroup, Meta(description="What to return totals for each of.")] = "day"
    limit: Annotated[int, Meta(ge=1, le=1000, description="How many to return.")] = 100
    offset: Offset = 0


async def get_usage(request: Request) -> Response:
    """Read what the runs of the caller's organization consumed, in tokens and tool calls.

    A run counts on the day on which it ended, also after its thread was deleted. The totals are ordered by `key`.
    """
    query = read_query(request, UsageQuery)
    totals = await service_of(request).usage.sum_up(
        principal_of(request),
        first_day=query.first_day,
        last_day=query.last_day,
        group_by=query.group_by,
        limit=query.limit + 1,
        offset=query.offset,
    )
    headers = {}
    if len(totals) > query.limit:
        headers[LINK.name] = next_link(request, USAGE, limit=query.limit, offset=query.offset + query.limit)
    return as_json(totals[: query.limit], headers=headers)


ROUTES = [
    APIRoute(
        "GET",
        USAGE,
        get_usage,
        Operation(tag="usage", responses=(ResponseType(list[UsageTotal], headers=(LINK,)),), query=UsageQuery),
    )
]
