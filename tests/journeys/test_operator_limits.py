"""What belongs to the operator: which organizations may use an MCP server, which models, and how many tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from agent_chat.agents.registry import Kind
from agent_chat.server.ai_chat_service import AIChatService
from agent_chat.server.organizations import member
from agent_chat.stores.models import Principal
from tests.support.claude_server import mcp_file
from tests.support.client import Client
from tests.support.mcp_pool import raw
from tests.support.scripted import tells
from tests.support.servers import Live, live_server
from tests.support.shapes import is_problem

LIMITS: dict[str, Any] = {"models": ("small", "large"), "max_tokens": 1_000, "thinking_tokens": 500}


@pytest.fixture
async def live(tmp_path: Path) -> AsyncIterator[Live]:
    file = mcp_file(tmp_path, {"crm": raw(organizations=["acme"]), "all": raw()})
    async with live_server(tmp_path, kinds={"tells": Kind(tells)}, mcp_config=file, **LIMITS) as live:
        yield live


def service_of(live: Live) -> AIChatService:
    for middleware in live.app.user_middleware:
        if running := middleware.kwargs.get("running"):
            found: AIChatService = running.state["service"]
            return found
    raise LookupError


async def stored_agent(live: Live, agent_id: str, **changes: Any) -> None:
    """Change an agent behind the API's back, as if it had been stored before there were limits."""
    service = service_of(live)
    organization = await service.store.find_organization("default")
    assert organization is not None
    principal = Principal(organization.id, "")
    await service.store.update_agent(principal, replace(await service.store.get_agent(principal, agent_id), **changes))


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("model", {"model": "dearest"}),
        ("max_tokens", {"max_tokens": 1_001}),
        ("metadata.thinking.budget_tokens", {"metadata": {"thinking": {"type": "enabled", "budget_tokens": 501}}}),
        ("metadata.thinking.budget_tokens", {"metadata": {"thinking": {"type": "enabled", "budget_tokens": "9"}}}),
        ("mcp_servers[1]", {"mcp_servers": ["all", "crm"]}),
    ],
)
async def test_more_than_the_operator_allows_is_refused(live: Live, field: str, fields: dict[str, Any]) -> None:
    made = await live.http.post("/api/v1/agents", json={"name": "A", "kind": "tells", **fields})
    assert is_problem(made, 422, "invalid_request", "field")["field"] == field
    allowed = await live.agent(kind="tells", model="large", max_tokens=1_000, mcp_servers=["all"])
    changed = await live.http.patch(f"/api/v1/agents/{allowed['id']}", json=fields)
    assert is_problem(changed, 422, "invalid_request", "field")["field"] == field


async def test_agents_stored_earlier_run_within_the_limits_or_not_at_all(live: Live) -> None:
    agent = (await live.agent(kind="tells"))["id"]
    thinking = {"thinking": {"type": "enabled", "budget_tokens": 900_000}}
    await stored_agent(live, agent, model="small", max_tokens=1_000_000, metadata=thinking, mcp_servers=["crm", "all"])
    thread = await live.thread(agent)
    missing = {"crm": "It is not configured for this organization."}
    assert (await live.post(thread, "What?")).json()["content"] == f"small 1000 500 True {missing}"
    await stored_agent(live, agent, model="dearest")
    problem = is_problem(await live.post(thread, "What?"), 502, "agent_failed", "thread_id", "message_id", "retryable")
    assert "'dearest'" in problem["detail"]
    assert not problem["retryable"]
    renamed = await live.http.patch(f"/api/v1/agents/{agent}", json={"name": "B"})
    assert renamed.status_code == 200, "only what is sent is checked"


async def test_an_organization_gets_its_servers_and_may_list_them(live: Live) -> None:
    service = service_of(live)
    servers = service._agents._servers
    for name, wanted in (("acme", ["crm", "all"]), ("other", ["all"])):
        organization, user = await member(service.store, name, "u", kind="tells", model=None, servers=servers)
        secret = f"key-of-{name}-which-is-long-enough"
        await service.store.create_key(user, secret)
        client = Client(live.url, secret)
        try:
            (agent,) = await client.get("/api/v1/agents")
            assert agent["mcp_servers"] == wanted
            listing = await client.http.post("/api/v1/agents", json={"name": "B", "mcp_servers": ["crm"]})
            assert listing.status_code == (201 if name == "acme" else 422)
        finally:
            await client.http.aclose()
        assert organization.name == name
