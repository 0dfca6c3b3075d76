"""A live server whose default agent is of kind `claude`, with MCP servers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from agents.claude import Claude
from agents.mcp_config import Server
from agents.registry import Kind
from tests.agents.standin import StandIn
from tests.journeys.live import Live, live_server


def quick(service: StandIn, *, stall_seconds: float = 5.0) -> Claude:
    """One that tries again at once, and loses patience with a silent stream after so many seconds."""
    return Claude(
        service.key,
        service.url,
        model="stand-in-1",
        title_model="small",
        stall_seconds=stall_seconds,
        retry_seconds=0.01,
    )


@asynccontextmanager
async def claude_server(
    folder: Path, service: StandIn, claude: Claude, servers: Mapping[str, Server]
) -> AsyncIterator[Live]:
    config = folder / "mcp.json"
    entries = {
        name: {key: value for key, value in msgspec.to_builtins(server).items() if value}
        for name, server in servers.items()
    }
    config.write_bytes(msgspec.json.encode({"mcpServers": entries}))
    async with live_server(
        folder,
        kinds={"claude": Kind(claude.reply, claude.title)},
        mcp_config=config,
        anthropic_api_key=service.key,
        anthropic_base_url=service.url,
    ) as live:
        yield live
