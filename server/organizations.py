"""New organizations, and the one that the first start makes: with a user and an agent, so that it works."""

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
    """A new key: 256 random bits, recognizable in a leak scan."""
    return f"chat_{secrets.token_urlsafe(32)}"


async def member(
    store: Store, organization: str, user: str, *, kind: str, model: str | None, servers: Mapping[str, McpServer]
) -> tuple[Organization, User]:
    """Find or make the organization (by id or name), its user and, if it has no agent, its default agent.

    The demo agent that was made so, and that nobody has changed, becomes one of `kind` once there is a better kind.
    """
    found = await store.find_organization(organization) or await store.create_organization(organization)
    owner = await store.find_user(found.id, user) or await store.create_user(found.id, user)
    who = Principal(found.id, owner.id)
    name = _DEMO if kind == "demo" else "Assistant"
    now = timestamp(utcnow())
    agents = (await store.list_agents(who, limit=2)).agents
    if not agents:
        agent = Agent(
            id=new_id(),
            organization_id=found.id,
            name=name,
            kind=kind,
            model=model,
            instructions="",
            mcp_servers=[each for each, server in servers.items() if server.serves(found.id, found.name)],
            tools=None,
            max_tokens=None,
            is_default=False,
            metadata={},
            created_at=now,
            updated_at=now,
        )
        made = await store.create_agent(who, agent)
        if not made.is_default:  # another process, started at the same moment, made the default just now
            await store.delete_agent(who, made.id)
    elif kind != "demo" and len(agents) == 1 and _is_untouched_demo(agents[0]):
        await store.update_agent(who, replace(agents[0], name=name, kind=kind, model=model, updated_at=now))
    return found, owner


def _is_untouched_demo(agent: Agent) -> bool:
    return agent.kind == "demo" and agent.name == _DEMO and agent.updated_at == agent.created_at


async def first_member(store: Store, *, kind: str, model: str | None, servers: Mapping[str, McpServer]) -> User:
    """The user of the organization that every start finds or makes, with its default agent."""
    return (await member(store, FIRST, FIRST, kind=kind, model=model, servers=servers))[1]
