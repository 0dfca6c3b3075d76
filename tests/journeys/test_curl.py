"""Deltas arrive one by one: seen by `curl -N`, which shows whatever has arrived and nothing that hasn't."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from agent_chat.stores.events import TERMINAL_TYPES
from tests.support.client import KEY, Frame, parse
from tests.support.servers import Live
from tests.support.services import missing

SCRIPT = """say first
hold there
say second
tool calculate {"expression": "6*7"}
hold here
say 🎈"""


@asynccontextmanager
async def curl(url: str, content: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Post a message as a reader of the README would."""
    binary = shutil.which("curl") or missing("no curl on PATH")
    process = await asyncio.create_subprocess_exec(
        *(binary, "-N", "-sS", "-i", url, "-H", f"Authorization: Bearer {KEY}", "-H", "Accept: text/event-stream"),
        *("-H", "Content-Type: application/json", "-d", json.dumps({"content": content})),
        stdout=asyncio.subprocess.PIPE,
    )
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
async def test_curl_shows_each_delta_when_it_is_said_and_no_later(live: Live) -> None:
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
