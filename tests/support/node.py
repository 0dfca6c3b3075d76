"""web_demo/client.js in Node, and a server that streams given events to it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from agent_chat.stores.events import Event
from tests.support.services import missing

SCRIPTS = Path(__file__).parents[1] / "clients"


async def node(script: str, *arguments: str, stdin: bytes = b"", seconds: float = 30) -> Any:
    """Run a script of tests/clients; the JSON that it printed."""
    if not shutil.which("node"):
        missing("node is not installed")
    process = await asyncio.create_subprocess_exec(
        "node", str(SCRIPTS / script), *arguments, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(seconds):
            out, _ = await process.communicate(stdin)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0
    return msgspec.json.decode(out)


@asynccontextmanager
async def scripted_stream(connections: Sequence[Sequence[tuple[str, Event]]]) -> AsyncIterator[tuple[str, list[str]]]:
    """A server that streams one of the lists of ids and events to each connection; its URL, and the requested paths."""
    asked: list[str] = []

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:  # Node may connect ahead of a request that it gives up
            return writer.close()
        asked.append(head.decode().split(" ")[1])
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        for position, event in connections[len(asked) - 1]:
            writer.write(b"data: " + msgspec.json.encode(event) + f"\nid: {position}\n\n".encode())
        writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", asked
    finally:
        server.close()
