"""Creates organizations with a user and a default agent, above all the one that every first start needs."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from msgspec.structs import replace

from agent_chat.agents.mcp.config import Server as McpServer
from agent_chat.stores.contracts import Store
from agent_chat.stores.models import Agent, Organization, Principal, User, new_id, timestamp, utcnow

FIRST = "default"
_DEMO = "Demo"


def new_secret() -> str:
    """Generate a key: 256 random bits, with a prefix that scanners for leaked secrets recognize."""
    return f"chat_{secrets.token_urlsafe(32)}"


async def member(
    store: Store, organization: str, user: str, *, kind: str, model: str | None, servers: Mapping[str, McpServer]
) -> tuple[Organization, User]:
    """Find or create the organization, its user (both by id or name) and, if it has no agent, its default agent.

    A demo agent that was created so and never changed becomes one of `kind` once that is not `demo` any more.
    """
    found = await store.find_organization(organization) or await store.create_organization(organization)
    owner = await store.find_user(found.id, user) or await store.create_user(found.id, user)
    principal = Principal(found.id, owner.id)
    name = _DEMO if kind == "demo" else "Assistant"
    now = timestamp(utcnow())
    agents = (await store.list_agents(principal, limit=2)).agents
    if not agents:
        agent = Agent(
            id=new_id(),
            organization_id=found.id,
            name=name,
            kind=kind,
            model=model,
            instructions="",
            mcp_servers=[each for each, server in servers.items() if server.allows(found.id, found.name)],
            tools=None,
            max_tokens=None,
            is_default=False,
            metadata={},
            created_at=now,
            updated_at=now,
        )
        created = await store.create_agent(principal, agent)
        if not created.is_default:  # another process that started at the same moment was first
            await store.delete_agent(principal, created.id)
    elif kind != "demo" and len(agents) == 1 and _is_untouched_demo(agents[0]):
        await store.update_agent(principal, replace(agents[0], name=name, kind=kind, model=model, updated_at=now))
    return found, owner


def _is_untouched_demo(agent: Agent) -> bool:
    return agent.kind == "demo" and agent.name == _DEMO and agent.updated_at == agent.created_at


async def first_member(store: Store, *, kind: str, model: str | None, servers: Mapping[str, McpServer]) -> User:
    """The user of the organization that every start finds or creates, with its default agent."""
    return (await member(store, FIRST, FIRST, kind=kind, model=model, servers=servers))[1]
