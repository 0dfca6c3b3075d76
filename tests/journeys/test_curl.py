"""Deltas arrive one by one, as `curl -N` shows them: it prints what has arrived, and nothing that has not."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from agent_chat.stores.events import TERMINAL_TYPES
from tests.support.client import KEY, Frame, parse
from tests.support.servers import Live

SCRIPT = """say first
hold there
say second
tool calculate {"expression": "6*7"}
hold here
say 🎈"""
WITHOUT_CURL = """
import sys, urllib.request
url, key, body = sys.argv[1:]
headers = {"Authorization": f"Bearer {key}", "Accept": "text/event-stream", "Content-Type": "application/json"}
response = urllib.request.urlopen(urllib.request.Request(url, body.encode(), headers))
out = sys.stdout.buffer
out.write(b"HTTP/1.1 %d\\r\\n" % response.status)
out.write(b"".join(f"{name}: {value}\\r\\n".encode() for name, value in response.headers.items()) + b"\\r\\n")
while data := response.read1(65536):
    out.flush()
    out.write(data)
    out.flush()
"""


@asynccontextmanager
async def curl(url: str, content: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Post a message as a reader of the README would; without curl, by a script that prints the same."""
    body = json.dumps({"content": content})
    command = [sys.executable, "-c", WITHOUT_CURL, url, KEY, body]
    if binary := shutil.which("curl"):
        headers = [f"Authorization: Bearer {KEY}", "Accept: text/event-stream", "Content-Type: application/json"]
        command = [binary, "-N", "-sS", "-i", url, "-d", body, *(word for each in headers for word in ("-H", each))]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def head(out: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(10):
        return await out.readuntil(b"\r\n\r\n")


async def until(out: asyncio.StreamReader, event: str) -> list[Frame]:
    """The frames up to the next of that type, each exactly as it came: event, data, id, with LF ends."""
    seen: list[Frame] = []
    async with asyncio.timeout(10):
        while not seen or seen[-1].event != event:
            seen.append(parse(await out.readuntil(b"\n\n")))
    return seen


@pytest.mark.slow
async def test_each_delta_arrives_when_it_is_published(live: Live) -> None:
    thread = await live.scripted_thread(mcp_servers=["demo"])
    async with curl(f"{live.url}{thread}/messages", SCRIPT) as process:
        out = process.stdout
        assert out is not None
        told = (await head(out)).lower()
        assert told.startswith(b"http/1.1 200")
        assert b"\r\ncontent-type: text/event-stream" in told

        seen = await until(out, "message.delta")
        await live.gates.reached("there")
        assert [frame.event for frame in seen] == ["message.created", "run.started", "message.delta"]
        assert seen[-1].data["text"] == "first"
        live.gates.release("there")

        seen += await until(out, "message.delta")
        assert seen[-1].data["text"] == "second"
        seen += await until(out, "tool_call.completed")
        await live.gates.reached("here")
        assert seen[-1].data["tool_call"]["result"]["value"] == 42
        live.gates.release("here")

        seen += await until(out, "run.completed")
        async with asyncio.timeout(10):
            assert (await out.read(), await process.wait()) == (b"", 0)
    events = [frame.event for frame in seen]
    assert [events.count(event) for event in ("tool_call.started", "tool_call.completed")] == [1, 1]
    assert [event for event in events if event in TERMINAL_TYPES] == ["run.completed"]
    assert len({frame.id for frame in seen}) == len(seen)
    assert not any(b"\r" in frame.raw for frame in seen)
    assert seen[-1].data["message"] == (await live.get(thread))["messages"][-1]
