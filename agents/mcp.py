"""MCP servers: the tools of agents.

The server makes one Pool per process and hands each run a toolbox (agents/mcp_toolbox.py). The pool has a slot for each
configured server (agents/mcp_slot.py), a slot the connection to it (agents/mcp_connection.py), which alone knows the
SDK.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from agents import Toolbox
from agents.mcp_config import Server
from agents.mcp_slot import Slot
from agents.mcp_toolbox import AgentTools
from stores.models import Agent

CLOSE_SECONDS = 8.0
"""Above what the SDK takes at most to end a process: stdin closed, 2 s, SIGTERM, 2 s, SIGKILL."""

_log = logging.getLogger(__name__)


class Pool:
    """The connections of this process: made on first use, shared by all runs, remade after a death.

    A server that fails costs a turn at most CONNECT_SECONDS once, then nothing for 1 s, 2 s … 30 s, and at most
    PATIENCE_SECONDS for each attempt after that. One that hangs costs a call its limit and the next use PROBE_SECONDS.
    """

    def __init__(self, servers: Mapping[str, Server]) -> None:
        self._slots = {name: Slot(name, server) for name, server in servers.items()}

    @property
    def names(self) -> list[str]:
        """The configured servers."""
        return list(self._slots)

    def toolbox(self, agent: Agent) -> Toolbox:
        """The tools of an agent for one run. Nothing is connected before they are asked for."""
        return AgentTools({name: self._slots.get(name) for name in agent.mcp_servers}, agent.tools)

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
