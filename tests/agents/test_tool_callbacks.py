"""`run.tools.invoke`: calls that an agent's framework makes while the generator waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from agent_chat.agents import (
    JSONObject,
    Kind,
    Part,
    Reply,
    Run,
    RunTools,
    Text,
    ToolCompleted,
    ToolPart,
    ToolStarted,
    ToolUse,
)
from agent_chat.agents.testing import ScriptedTools, run_reply
from agent_chat.stores.events import RunStarted, decode
from agent_chat.stores.fold import fold
from tests.support.claude_server import mcp_file
from tests.support.client import Frame, frames
from tests.support.mcp_pool import raw
from tests.support.servers import Live, live_server


@asynccontextmanager
async def serving(folder: Path, reply: Reply) -> AsyncIterator[tuple[Live, str]]:
    """A server whose agent of kind `framework` has the tools of the server `raw`, and the path of a thread with it."""
    tools = mcp_file(folder, {"raw": raw()})
    async with live_server(folder, kinds={"framework": Kind(reply)}, mcp_config=tools, connect_tools=True) as live:
        agent = await live.agent(kind="framework", mcp_servers=["raw"])
        yield live, await live.thread(agent["id"])


def names(events: list[Frame]) -> list[str]:
    """Without the snapshots that show that the tool server is still being connected."""
    return [frame.event for frame in events if frame.event != "message.snapshot"]


async def test_concurrent_calls_are_published_between_the_texts_around_them(tmp_path: Path) -> None:
    async def reply(run: Run) -> AsyncIterator[Part]:
        await run.tools.available()
        yield Text("Before.")
        guests = [ToolUse(f"guest {number}", "meet", {"guests": 2}) for number in range(2)]
        first, second = await asyncio.gather(*map(run.tools.invoke, guests))
        assert first.result == second.result == {"content": [{"type": "text", "text": "met"}]}
        await run.tools.invoke(ToolUse("last", "echo", {"text": "hi"}))
        yield Text("After.")

    async with serving(tmp_path, reply) as (live, thread):
        events = await live.streamed(thread, "Go.")
        stored = events[-1].data["message"]
    started, completed = "tool_call.started", "tool_call.completed"
    calls = [started, started, completed, completed, started, completed]
    assert names(events) == [
        "message.created", "run.started", "message.delta", *calls, "message.delta", "run.completed",
    ]  # fmt: skip
    assert stored["content"] == "Before.\n\nAfter."
    assert [call["round"] for call in stored["metadata"]["run"]["tool_calls"]] == [0, 0, 1]
    begun, *happened = [decode(frame.raw.split(b"\n")[1].removeprefix(b"data: ")) for frame in events[1:-1]]
    assert isinstance(begun, RunStarted)
    folded = fold(happened, onto=begun.message)
    assert (folded.content, len(folded.tool_calls)) == (stored["content"], 3)


async def test_a_cancelled_run_cancels_the_call_which_the_store_had_before_it_was_made(tmp_path: Path) -> None:
    file = tmp_path / "outcome"

    async def reply(run: Run) -> AsyncIterator[Part]:
        await run.tools.invoke(ToolUse("1", "until_cancelled", {"file": str(file)}))
        yield Text("Never.")

    async with serving(tmp_path, reply) as (live, thread), live.posting(thread, "Go.") as response:
        events = frames(response)
        seen = [await anext(events)]
        while seen[-1].event != "tool_call.progress":
            seen.append(await anext(events))
        message = f"{thread}/messages/{seen[-1].data['message_id']}"
        assert [call["tool_name"] for call in (await live.get(message))["tool_calls"]] == ["until_cancelled"]
        await live.http.post(f"{message}/cancel")
        *_, last = [frame async for frame in events]
        await written(file)
    assert last.event == "run.cancelled"
    assert last.data["message"]["tool_calls"][0]["error"] == "The run was cancelled."


async def written(file: Path) -> None:
    async with asyncio.timeout(10):
        while not file.exists():  # noqa: ASYNC110, ASYNC240 (another process writes it)
            await asyncio.sleep(0.01)


class Endless:
    """The script of a tool that returns only when it is cancelled."""

    def __init__(self) -> None:
        self.called = asyncio.Event()
        self.cancelled = False

    async def __call__(self, arguments: JSONObject) -> JSONObject:
        self.called.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled = True
        return {}


async def test_a_call_that_the_framework_gives_up_is_completed_and_the_run_goes_on() -> None:
    endless = Endless()

    async def reply(run: Run) -> AsyncIterator[Part]:
        call = asyncio.create_task(run.tools.invoke(ToolUse("1", "wait", {})))
        await endless.called.wait()
        call.cancel()
        await asyncio.wait({call})
        yield Text("I waited long enough.")

    answer = await run_reply(reply, "Go.", tools=ScriptedTools({"wait": endless}))
    assert endless.cancelled
    assert answer.tool_calls[0].error == "The call was cancelled."
    assert answer.content == "I waited long enough."


async def test_a_call_that_the_agent_leaves_behind_is_cancelled() -> None:
    endless = Endless()
    left: list[asyncio.Task[ToolCompleted]] = []

    async def reply(run: Run) -> AsyncIterator[Part]:
        left.append(asyncio.create_task(run.tools.invoke(ToolUse("1", "wait", {}))))
        await endless.called.wait()
        yield Text("Done.")

    answer = await run_reply(reply, "Go.", tools=ScriptedTools({"wait": endless}))
    assert endless.cancelled
    await asyncio.wait(left)
    assert left[0].cancelled()
    assert answer.tool_calls[0].error == "The call was cancelled."


async def test_an_error_of_the_agents_own_ends_the_run_though_the_framework_swallows_it(tmp_path: Path) -> None:
    async def reply(run: Run) -> AsyncIterator[Part]:
        for _ in range(2):
            try:
                await run.tools.invoke(ToolUse("same id", "echo", {"text": "hi"}))
            except Exception:
                yield Text("Swallowed.")
        yield Text("Never.")

    async with serving(tmp_path, reply) as (live, thread):
        failed = await live.post(thread, "Go.")
        (answer,) = (await live.get(thread, message_limit=1))["messages"]
    assert (failed.status_code, failed.json()["code"]) == (502, "agent_failed")
    assert (answer["content"], answer["metadata"]["run"]["status"]) == ("", "failed")


async def test_no_call_is_made_before_its_start_is_published() -> None:
    published: list[ToolPart] = []
    may_go_on = asyncio.Event()

    async def publish(part: ToolPart) -> None:
        published.append(part)
        await may_go_on.wait()

    toolbox = ScriptedTools({"look": {"seen": 1}})
    invoking = asyncio.create_task(RunTools(toolbox, publish).invoke(ToolUse("1", "look", {})))
    while not published:  # noqa: ASYNC110 (the loop turns, nothing else is awaited)
        await asyncio.sleep(0)
    for _ in range(10):
        await asyncio.sleep(0)
    assert toolbox.uses == []
    may_go_on.set()
    assert await invoking == ToolCompleted("1", {"seen": 1})
    assert published == [ToolStarted("1", "look", {}), ToolCompleted("1", {"seen": 1})]


async def test_nothing_is_called_after_the_run_has_ended() -> None:
    toolbox = ScriptedTools({"look": {}})
    tools = RunTools(toolbox)
    await tools.close()
    with pytest.raises(asyncio.CancelledError):
        await tools.invoke(ToolUse("1", "look", {}))
    assert toolbox.uses == []


def odd() -> Any:
    return "not a part"


async def test_yielding_something_else_than_a_part_fails_the_run(tmp_path: Path) -> None:
    async def reply(run: Run) -> AsyncIterator[Part]:
        yield odd()

    async with live_server(tmp_path, kinds={"odd": Kind(reply)}) as live:
        failed = await live.post(await live.thread((await live.agent(kind="odd"))["id"]), "Go.")
    assert (failed.status_code, failed.json()["code"]) == (502, "agent_failed")
