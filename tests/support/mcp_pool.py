"""The MCP pool under test: real server processes, and calls to their tools."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

from agent_chat.agents import Toolbox, ToolCompleted, ToolPart, ToolUse
from agent_chat.agents.mcp.config import Server
from agent_chat.agents.mcp.pool import Pool
from agent_chat.stores.models import Agent, JSONObject

RAW = str(Path(__file__).parents[1] / "support" / "raw_mcp_server.py")


MakePool = Callable[..., Pool]


def raw(**more: object) -> Server:
    return msgspec.convert({"command": sys.executable, "args": ["-S", RAW], **more}, Server)


def agent(*servers: str, tools: list[str] | None = None) -> Agent:
    return Agent("a", "o", "", "demo", None, "", list(servers), tools, None, False, {}, "", "")


def children() -> set[int]:
    """The child processes of this process, zombies included."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(stat.parent.name))
        except OSError:
            pass
    return found


def held() -> tuple[set[int], int, int]:
    """What connections use: processes, tasks and open files."""
    return children(), len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))


async def until(true: Callable[[], bool]) -> None:
    """Poll until it is true: for what another process does."""
    async with asyncio.timeout(5):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def calls(toolbox: Toolbox, *uses: tuple[str, JSONObject]) -> list[ToolPart]:
    async with asyncio.timeout(8):
        made = [ToolUse(str(number), name, arguments) for number, (name, arguments) in enumerate(uses)]
        return [part async for part in toolbox.call(made)]


async def call(toolbox: Toolbox, name: str, arguments: JSONObject | None = None) -> ToolCompleted:
    last = (await calls(toolbox, (name, arguments or {})))[-1]
    assert isinstance(last, ToolCompleted)
    return last


async def result(toolbox: Toolbox, name: str, arguments: JSONObject | None = None) -> JSONObject:
    completed = await call(toolbox, name, arguments)
    assert completed.result is not None, completed
    return completed.result


async def names(toolbox: Toolbox) -> set[str]:
    async with asyncio.timeout(8):
        return {tool.name for tool in await toolbox.available()}


@pytest.fixture
async def make_pool() -> AsyncIterator[MakePool]:
    pools: list[Pool] = []

    def make(**servers: Server) -> Pool:
        pools.append(Pool(servers))
        return pools[-1]

    yield make
    for pool in pools:
        await pool.close()
