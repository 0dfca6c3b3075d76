"""A live server whose default agent is of kind `claude`, with MCP servers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from agent_chat.agents.claude.agent import Claude
from agent_chat.agents.mcp.config import Server
from agent_chat.agents.registry import Kind
from tests.support.anthropic_api import StandIn
from tests.support.servers import Live, live_server


def quick(service: StandIn, *, stall_seconds: float = 5.0) -> Claude:
    """A Claude agent that retries immediately, and gives up a silent stream after `stall_seconds`."""
    return Claude(
        service.key,
        service.url,
        model="stand-in-1",
        title_model="small",
        stall_seconds=stall_seconds,
        retry_seconds=0.01,
    )


def mcp_file(folder: Path, servers: Mapping[str, Server]) -> Path:
    """Write the operator's file that names these servers."""
    entries = {
        name: {key: value for key, value in msgspec.to_builtins(server).items() if value}
        for name, server in servers.items()
    }
    file = folder / "mcp.json"
    file.write_bytes(msgspec.json.encode({"mcpServers": entries}))
    return file


@asynccontextmanager
async def claude_server(
    folder: Path,
    service: StandIn,
    claude: Claude,
    servers: Mapping[str, Server],
    kinds: Mapping[str, Kind] | None = None,
) -> AsyncIterator[Live]:
    """`kinds` are further ones, beside `claude` and `scripted`."""
    async with live_server(
        folder,
        kinds={"claude": Kind(claude.reply, claude.title), **(kinds or {})},
        mcp_config=mcp_file(folder, servers),
        anthropic_api_key=service.key,
        anthropic_base_url=service.url,
    ) as live:
        yield live


JSON = dict[str, Any]


def blocks(request: JSON) -> list[JSON]:
    """The blocks of the last user turn."""
    last: list[JSON] = request["messages"][-1]["content"]
    return last


async def claude_thread(live: Live) -> str:
    return await live.thread((await live.agent(kind="claude"))["id"])
