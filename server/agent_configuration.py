"""Builds agents from what clients send, within what the operator allows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import msgspec
from msgspec import UNSET
from msgspec.structs import replace

from agent_chat.agents.mcp.config import Server as McpServer
from agent_chat.server.errors import InvalidRequest
from agent_chat.server.inputs import AgentCreate, AgentUpdate
from agent_chat.server.model_policy import ModelPolicy
from agent_chat.stores.contracts import Directory
from agent_chat.stores.models import Agent, Principal, new_id


class AgentConfiguration:
    """What agents may be configured with.

    Args:
        kinds: the names of the kinds that there are.
        default_kind: the kind of agents for which the client names none.
        servers: the MCP servers that the operator configured, by name.
        model_policy: the operator's limits on models.
        now: the time as a timestamp.
    """

    def __init__(
        self,
        directory: Directory,
        *,
        kinds: Collection[str],
        default_kind: str,
        servers: Mapping[str, McpServer],
        model_policy: ModelPolicy,
        now: Callable[[], str],
    ) -> None:
        self._directory = directory
        self._kinds = kinds
        self._default_kind = default_kind
        self._servers = servers
        self._model_policy = model_policy
        self._now = now

    async def build(self, principal: Principal, body: AgentCreate) -> Agent:
        """Build a new agent. Raises: InvalidRequest."""
        now = self._now()
        agent = Agent(
            id=new_id(),
            organization_id=principal.organization_id,
            name=body.name,
            kind=self._default_kind if body.kind is UNSET else body.kind,
            model=body.model,
            instructions=body.instructions,
            mcp_servers=body.mcp_servers,
            tools=body.tools,
            max_tokens=body.max_tokens,
            is_default=body.is_default,
            metadata={} if body.metadata is UNSET else body.metadata,
            created_at=now,
            updated_at=now,
        )
        await self._check(principal, agent, AgentCreate.__struct_fields__)
        return agent

    async def change(self, principal: Principal, agent: Agent, body: AgentUpdate) -> Agent:
        """The agent with what the body sets. Raises: InvalidRequest."""
        given = {name: value for name, value in msgspec.structs.asdict(body).items() if value is not UNSET}
        changed = replace(agent, **given, updated_at=self._now())
        await self._check(principal, changed, given)
        return changed

    async def _check(self, principal: Principal, agent: Agent, given: Collection[str]) -> None:
        """Check the fields that the client has sent: the others may be older than the operator's limits."""
        if agent.kind not in self._kinds:
            raise InvalidRequest("kind", f"There is no kind {agent.kind!r}; there are {', '.join(self._kinds)}.")
        self._model_policy.check(agent, given)
        if "mcp_servers" in given:
            await self._check_servers(principal, agent.mcp_servers)

    async def _check_servers(self, principal: Principal, names: Sequence[str]) -> None:
        """Raises: InvalidRequest, with the same sentence for another organization's server as for an unknown one."""
        organization = await self._directory.find_organization(principal.organization_id)
        for index, name in enumerate(names):
            server = self._servers.get(name)
            if server is None or not server.allows(
                principal.organization_id, organization.name if organization else None
            ):
                raise InvalidRequest(f"mcp_servers[{index}]", f"The operator configured no MCP server {name!r}.")
