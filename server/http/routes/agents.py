"""/api/v1/agents: the agents of the caller's organization."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from agent_chat.server.errors import StorageFull
from agent_chat.server.http.auth import principal_of
from agent_chat.server.http.large_json import list_response
from agent_chat.server.http.operations import LINK, LOCATION, APIRoute, Operation, ResponseType
from agent_chat.server.http.query import Offset, PageLimit, read_query
from agent_chat.server.http.requests import as_json, next_link, public_path, read_body, service_of
from agent_chat.server.inputs import AgentCreate, AgentUpdate
from agent_chat.stores.models import Agent


class AgentsQuery(msgspec.Struct, frozen=True):
    """The query of a list of agents."""

    limit: PageLimit = 50
    offset: Offset = 0


async def create_agent(request: Request) -> Response:
    """Create an agent. The first agent of an organization is its default."""
    agent = await service_of(request).create_agent(principal_of(request), await read_body(request, AgentCreate))
    return as_json(agent, 201, {LOCATION.name: public_path(request, f"/api/v1/agents/{agent.id}")})


async def list_agents(request: Request) -> Response:
    """List the organization's agents, oldest first.

    The response has at most 8 MB; the `Link` header names the next page.
    """
    query = read_query(request, AgentsQuery)
    page = await service_of(request).list_agents(principal_of(request), limit=query.limit, offset=query.offset)
    headers = {}
    if page.more:
        offset = query.offset + len(page.agents)
        headers[LINK.name] = next_link(request, "/api/v1/agents", limit=query.limit, offset=offset)
    return await list_response(page.agents, headers)


async def get_agent(request: Request) -> Response:
    """Read one agent, or `default`."""
    return as_json(await service_of(request).get_agent(principal_of(request), request.path_params["agent_id"]))


async def update_agent(request: Request) -> Response:
    """Change the given fields; `is_default: true` makes it the default agent."""
    body = await read_body(request, AgentUpdate)
    agent_id = request.path_params["agent_id"]
    return as_json(await service_of(request).update_agent(principal_of(request), agent_id, body))


async def delete_agent(request: Request) -> Response:
    """Delete an agent. Its threads stay readable."""
    await service_of(request).delete_agent(principal_of(request), request.path_params["agent_id"])
    return Response(status_code=204)


ROUTES = [
    APIRoute(
        "POST",
        "/api/v1/agents",
        create_agent,
        Operation(
            tag="agents",
            responses=(ResponseType(Agent, 201, headers=(LOCATION,)),),
            body=AgentCreate,
            raises=(StorageFull,),
        ),
    ),
    APIRoute(
        "GET",
        "/api/v1/agents",
        list_agents,
        Operation(tag="agents", responses=(ResponseType(list[Agent], headers=(LINK,)),), query=AgentsQuery),
    ),
    APIRoute("GET", "/api/v1/agents/{agent_id}", get_agent, Operation(tag="agents", responses=(ResponseType(Agent),))),
    APIRoute(
        "PATCH",
        "/api/v1/agents/{agent_id}",
        update_agent,
        Operation(tag="agents", responses=(ResponseType(Agent),), body=AgentUpdate, raises=(StorageFull,)),
    ),
    APIRoute(
        "DELETE",
        "/api/v1/agents/{agent_id}",
        delete_agent,
        Operation(tag="agents", responses=(ResponseType(status=204),)),
    ),
]
