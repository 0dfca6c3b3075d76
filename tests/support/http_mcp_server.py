"""`python tests/support/http_mcp_server.py`: an MCP server over streamable HTTP, made with the SDK's own, that counts.

Prints its port. It knows how many TCP connections it got and how often each of its methods was called.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections import Counter

import uvicorn
from mcp.server.mcpserver import Context, MCPServer
from mcp.types import (
    BlobResourceContents,
    ContentBlock,
    ElicitRequest,
    ElicitRequestFormParams,
    EmbeddedResource,
    ImageContent,
    InputRequiredResult,
    TextContent,
    TextResourceContents,
)
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

server = MCPServer("counting")
clients: set[object] = set()
requests: Counter[str] = Counter()
PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
"""A red dot."""
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
def look() -> list[ContentBlock]:
    """A picture, a text and a file, as MCP has them."""
    log = TextResourceContents(uri="harbour://log", mime_type="text/plain", text="417 herons at Ærø")
    chart = BlobResourceContents(uri="harbour://chart", mime_type="image/png", blob=PICTURE)
    return [
        TextContent(type="text", text="This is what I see."),
        ImageContent(type="image", data=PICTURE, mime_type="image/png"),
        EmbeddedResource(type="resource", resource=log),
        EmbeddedResource(type="resource", resource=chart),
    ]


class Name(BaseModel):
    name: str


@server.tool()
async def ask(ctx: Context) -> str:
    """Ask the user while it runs."""
    return str(await ctx.elicit("Who are you?", Name))


@server.tool()
def require() -> InputRequiredResult:
    """Respond that the user must be asked first."""
    form = ElicitRequestFormParams(message="Who are you?", requested_schema=Name.model_json_schema())
    return InputRequiredResult(input_requests={"who": ElicitRequest(params=form)}, request_state="1")


@server.tool()
def huge() -> str:
    """More than a message may be."""
    return "x" * 5 * 2**20


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


def main(port: int) -> None:
    sock = socket.create_server(("127.0.0.1", port))  # whoever comes before the server runs waits in its backlog
    print(sock.getsockname()[1], flush=True)  # noqa: T201
    config = uvicorn.Config(counting, log_level="critical", access_log=False, timeout_graceful_shutdown=1)
    uvicorn.Server(config).run([sock])


if __name__ == "__main__":
    main(int(sys.argv[1]))
