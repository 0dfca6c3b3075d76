"""MCP servers: the tools of agents.

The server makes one Pool per process and hands each run a toolbox (agents/mcp/toolbox.py). The pool has a slot for each
configured server (agents/mcp/slot.py), a slot the connection to it (agents/mcp/connection.py), which alone knows the
SDK's client, and below it the transport (agents/mcp/transport.py), where what comes in is bounded.
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
"""Above what ending a process takes at most: stdin closed, 2 s, SIGTERM, 2 s, SIGKILL, 2 s."""

_NOBODY = Principal("", "")
_log = logging.getLogger(__name__)


async def _nameless(organization_id: str) -> str | None:
    return None


class Pool:
    """The connections of this process: made at start or on first use, shared by all runs, remade after a death.

    A run waits at most READY_SECONDS for servers that are still being connected. A server that failed costs nothing
    for 1 s, 2 s … 30 s, and at most PATIENCE_SECONDS for each attempt after that. One that hangs costs a call its limit
    and the next use PROBE_SECONDS.

    Args:
        organization_name: the name of an organization, for entries of the file that list names.
    """

    def __init__(
        self,
        servers: Mapping[str, Server],
        *,
        organization_name: Callable[[str], Awaitable[str | None]] = _nameless,
    ) -> None:
        self._slots = {name: Slot(name, server) for name, server in servers.items()}
        self._organization_name = organization_name

    @property
    def names(self) -> list[str]:
        """The configured servers."""
        return list(self._slots)

    @property
    def states(self) -> dict[str, State]:
        """The state of the connection to each configured server."""
        return {name: slot.state for name, slot in self._slots.items()}

    def connect(self) -> None:
        """Begin to connect to all servers in the background, so that the first run need not wait for them."""
        for slot in self._slots.values():
            slot.connect()

    def toolbox(
        self, agent: Agent, who: Principal = _NOBODY, waiting: Callable[[bool], None] = lambda is_waiting: None
    ) -> Toolbox:
        """The tools of an agent for one run of this principal.

        `waiting` is called with True when the run waits noticeably for servers, and with False when that is over.
        """
        slots = {name: self._slots.get(name) for name in agent.mcp_servers}
        return AgentTools(slots, agent.tools, who, self._serves, waiting)

    async def _serves(self, slot: Slot, who: Principal) -> bool:
        if slot.server.organizations is None:
            return True
        name = await self._organization_name(who.organization_id)
        return slot.server.allows(who.organization_id, name)

    async def close(self) -> None:
        """End all connections and their processes; open calls end with an error. Takes at most about 10 s."""
        for slot in self._slots.values():
            slot.close()
        lives = [connection.life for slot in self._slots.values() for connection in slot.lives]
        if lives:
            _, late = await asyncio.wait(lives, timeout=CLOSE_SECONDS)
            for life in late:
                life.cancel()
            if late:
                _log.warning("%d MCP connections had to be cut off", len(late))
                await asyncio.wait(late, timeout=1)
