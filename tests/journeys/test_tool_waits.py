"""A run that waits for tool servers reports it in its stream, waits two seconds, and continues without them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec

from agent_chat.agents.mcp.config import Server
from agent_chat.agents.registry import Kind
from agent_chat.stores.events import decode
from agent_chat.stores.fold import fold
from agent_chat.stores.models import Message
from tests.support.claude_server import mcp_file
from tests.support.scripted import tells
from tests.support.servers import live_server
from tests.support.thread_view import View

MUTE = Server(command="sh", args=["-c", "cat > /dev/null"])


async def test_the_first_answer_does_not_wait_for_a_hanging_tool_server(tmp_path: Path) -> None:
    file = mcp_file(tmp_path, {"mute": MUTE})
    async with live_server(tmp_path, kinds={"tells": Kind(tells)}, connect_tools=True, mcp_config=file) as live:
        thread = await live.thread((await live.agent(kind="tells", mcp_servers=["mute"]))["id"])
        began = time.monotonic()
        streamed = await live.streamed(thread, "What?")
        assert time.monotonic() - began < 4
        snapshots = [frame.data["message"] for frame in streamed if frame.event == "message.snapshot"]
        assert [each["metadata"]["run"].get("activity") for each in snapshots] == ["connecting_to_tools", None]
        answer = streamed[-1].data["message"]
        assert streamed[-1].event == "run.completed"
        assert "activity" not in answer["metadata"]["run"]
        assert "It is still being connected." in answer["content"]
        assert (await live.get(thread))["messages"][-1] == answer

        started = next(frame for frame in streamed if frame.event == "run.started")
        events = [decode(msgspec.json.encode(frame.data)) for frame in streamed[:-1]]
        folded = fold(events, onto=msgspec.convert(started.data["message"], Message))
        assert folded.content == answer["content"]
        assert "activity" not in (folded.run or {})


async def test_a_run_that_is_cancelled_while_it_waits_has_no_activity_left(tmp_path: Path) -> None:
    file = mcp_file(tmp_path, {"mute": MUTE})
    async with live_server(tmp_path, kinds={"tells": Kind(tells)}, mcp_config=file) as live:
        thread = await live.thread((await live.agent(kind="tells", mcp_servers=["mute"]))["id"])
        view = View()
        async with live.watching(thread) as stream:
            posted = await live.http.post(
                f"{thread}/messages", json={"content": "What?"}, headers={"Prefer": "respond-async"}
            )
            async for frame in stream:
                view.apply(frame)
                if frame.event == "message.snapshot":
                    break
            cancelled: Any = await live.http.post(f"{thread}/messages/{posted.json()['id']}/cancel")
            async for frame in stream:
                view.apply(frame)
                if frame.event == "run.cancelled":
                    break
        assert "activity" not in cancelled.json()["metadata"]["run"]
        assert view.shows(await live.get(thread))
