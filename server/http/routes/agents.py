"""/api/v1/agents: the agents of the caller's organization."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agent_chat.server.http.auth import principal_of
from agent_chat.server.http.large_json import list_response
from agent_chat.server.http.requests import as_json, body_of, integer, next_link, public_path, service_of
from agent_chat.server.inputs import AgentCreate, AgentUpdate


async def create_agent(request: Request) -> Response:
    """Create an agent. An organization's first is its default."""
    agent = await service_of(request).create_agent(principal_of(request), await body_of(request, AgentCreate))
    return as_json(agent, 201, {"Location": public_path(request, f"/api/v1/agents/{agent.id}")})


async def list_agents(request: Request) -> Response:
    """List the organization's agents, oldest first. At most 8 MB: `Link` names the next page."""
    limit, offset = integer(request, "limit", 50, 1, 100), integer(request, "offset", 0, 0)
    page = await service_of(request).list_agents(principal_of(request), limit=limit, offset=offset)
    headers = {}
    if page.more:
        headers["Link"] = next_link(request, "/api/v1/agents", limit=limit, offset=offset + len(page.agents))
    return await list_response(page.agents, headers)


async def get_agent(request: Request) -> Response:
    """Read one agent, or `default`."""
    return as_json(await service_of(request).get_agent(principal_of(request), request.path_params["agent_id"]))


async def update_agent(request: Request) -> Response:
    """Change what is given; `is_default` true makes it the default."""
    body = await body_of(request, AgentUpdate)
    agent_id = request.path_params["agent_id"]
    return as_json(await service_of(request).update_agent(principal_of(request), agent_id, body))


async def delete_agent(request: Request) -> Response:
    """Delete an agent. Its threads stay readable."""
    await service_of(request).delete_agent(principal_of(request), request.path_params["agent_id"])
    return Response(status_code=204)


ROUTES = [
    Route("/api/v1/agents", create_agent, methods=["POST"]),
    Route("/api/v1/agents", list_agents, methods=["GET"]),
    Route("/api/v1/agents/{agent_id}", get_agent, methods=["GET"]),
    Route("/api/v1/agents/{agent_id}", update_agent, methods=["PATCH"]),
    Route("/api/v1/agents/{agent_id}", delete_agent, methods=["DELETE"]),
]
