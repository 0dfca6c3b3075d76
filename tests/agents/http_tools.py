"""`python tests/agents/http_tools.py`: an MCP server over streamable HTTP, made with the SDK's own, that counts.

Prints its port. It knows how many TCP connections it got and how often each of its methods was called.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections import Counter

import uvicorn
from mcp.server.mcpserver import Context, MCPServer
from starlette.types import Receive, Scope, Send

server = MCPServer("counting")
clients: set[object] = set()
requests: Counter[str] = Counter()
met = 0
all_there = asyncio.Event()


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.tool()
def counted() -> dict[str, int]:
    """What was counted until now."""
    return {"connections": len(clients), **requests}


@server.tool()
async def wait(seconds: float, ctx: Context) -> str:
    """Wait, and tell of it."""
    await ctx.report_progress(1, 2, "waiting")
    await asyncio.sleep(seconds)
    return "waited"


@server.tool()
async def meet(guests: int) -> str:
    """Return only when as many calls as `guests` have come."""
    global met
    met += 1
    if met == guests:
        all_there.set()
    async with asyncio.timeout(30):
        await all_there.wait()
    return "met"


@server.tool()
def die() -> str:
    """End the process at once."""
    os._exit(3)


async def counting(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        clients.add(scope["client"])
        requests[scope["method"]] += 1
    await app(scope, receive, send)


app = server.streamable_http_app()


async def main(port: int) -> None:
    config = uvicorn.Config(counting, port=port, log_level="critical", access_log=False, timeout_graceful_shutdown=1)
    running = uvicorn.Server(config)
    serving = asyncio.create_task(running.serve())
    while not running.started:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    print(running.servers[0].sockets[0].getsockname()[1], flush=True)  # noqa: T201
    await serving


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
