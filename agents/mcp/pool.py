"""MCP servers: the tools of agents.

The server makes one Pool per process, which gives each run a toolbox (agents/mcp/toolbox.py). The pool has one slot
per configured server (agents/mcp/slot.py), and a slot has the connection to its server (agents/mcp/connection.py), the
only user of the SDK's client. Below the connection is the transport (agents/mcp/transport.py), which limits and repairs
incoming messages.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from agent_chat.agents import Toolbox
from agent_chat.agents.mcp.config import Server
from agent_chat.agents.mcp.slot import Slot, State
from agent_chat.agents.mcp.toolbox import AgentTools
from agent_chat.stores.models import Agent, Principal

CLOSE_SECONDS = 8.0
"""More than the longest shutdown of a server's process: stdin closed, 2 s, SIGTERM, 2 s, SIGKILL, 2 s."""

_NO_PRINCIPAL = Principal("", "")
_log = logging.getLogger(__name__)


async def _no_name(organization_id: str) -> str | None:
    return None


class Pool:
    """The MCP connections of this process, shared by all runs.

    A connection is opened at start or on first use, and opened again after it was lost. A run waits at most
    READY_SECONDS for servers that are connecting. A failed server is not tried again for 1 s, 2 s … 30 s; a run then
    waits at most RETRY_WAIT_SECONDS for the next attempt. A server that hangs costs a call its time limit and the next
    call at most PROBE_SECONDS.

    Args:
        servers: the configured servers by name.
        organization_name: returns the name of an organization, for entries of the file that list names.
    """

    def __init__(
        self,
        servers: Mapping[str, Server],
        *,
        organization_name: Callable[[str], Awaitable[str | None]] = _no_name,
    ) -> None:
        self._slots = {name: Slot(name, server) for name, server in servers.items()}
        self._organization_name = organization_name

    @property
    def names(self) -> list[str]:
        """The names of the configured servers."""
        return list(self._slots)

    @property
    def states(self) -> dict[str, State]:
        """The state of the connection to each configured server."""
        return {name: slot.state for name, slot in self._slots.items()}

    def connect(self) -> None:
        """Start connecting to all servers in the background, so that the first run need not wait for them."""
        for slot in self._slots.values():
            slot.connect()

    def toolbox(
        self,
        agent: Agent,
        principal: Principal = _NO_PRINCIPAL,
        waiting: Callable[[bool], None] = lambda is_waiting: None,
    ) -> Toolbox:
        """Build the toolbox of an agent for one run of this principal.

        `waiting` is called with True when the run waits noticeably for servers, and with False when the wait is over.
        """
        slots = {name: self._slots.get(name) for name in agent.mcp_servers}
        return AgentTools(slots, agent.tools, principal, self._allows, waiting)

    async def _allows(self, slot: Slot, principal: Principal) -> bool:
        if slot.server.organizations is None:
            return True
        name = await self._organization_name(principal.organization_id)
        return slot.server.allows(principal.organization_id, name)

    async def close(self) -> None:
        """Close all connections and stop their processes. Open calls fail. Takes at most about 10 s."""
        for slot in self._slots.values():
            slot.close()
        tasks = [connection.task for slot in self._slots.values() for connection in slot.connections]
        if tasks:
            _, pending = await asyncio.wait(tasks, timeout=CLOSE_SECONDS)
            for task in pending:
                task.cancel()
            if pending:
                _log.warning("%d MCP connections did not close within %g s, cancelled", len(pending), CLOSE_SECONDS)
                await asyncio.wait(pending, timeout=1)
