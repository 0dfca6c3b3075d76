"""MCP servers built with the SDK, behind the pool: over stdio and HTTP, in many runs, killed and restarted."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from agent_chat.agents import ToolCompleted, ToolUse
from agent_chat.agents.claude.agent import Claude
from agent_chat.agents.mcp import connection as mcp_connection
from agent_chat.agents.mcp import slot as mcp_slot
from agent_chat.agents.mcp.config import Server
from agent_chat.agents.mcp.pool import Pool
from tests.support.anthropic_api import StandIn, says, text, use
from tests.support.claude_server import claude_server
from tests.support.http_mcp_server import PICTURE
from tests.support.mcp_pool import agent, call, children, held, names, raw, result, until
from tests.support.servers import Live

TIME = Server(command=sys.executable, args=["-m", "mcp_server_time", "--local-timezone", "UTC"])
HTTP_TOOLS = str(Path(__file__).parents[1] / "support" / "http_mcp_server.py")
HTTP_NAMES = {"add", "counted", "wait", "meet", "look", "die", "ask", "require", "huge"}
LOG = {"uri": "harbour://log", "mimeType": "text/plain", "text": "417 herons at Ærø"}
DONE = says(text("Done."))


class Http:
    """The HTTP server that counts requests, in a process of its own. A restart uses the same port."""

    def __init__(self) -> None:
        self.port = 0
        self.process: asyncio.subprocess.Process | None = None

    @property
    def config(self) -> Server:
        return Server(url=f"http://127.0.0.1:{self.port}/mcp")

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, HTTP_TOOLS, str(self.port), stdout=asyncio.subprocess.PIPE
        )
        assert self.process.stdout is not None
        async with asyncio.timeout(15):
            self.port = int(await self.process.stdout.readline())

    async def kill(self) -> None:
        assert self.process is not None
        if self.process.returncode is None:
            self.process.kill()
        await self.wait_for_exit()

    async def wait_for_exit(self) -> None:
        assert self.process is not None
        async with asyncio.timeout(5):
            await self.process.wait()


@pytest.fixture(scope="module")
async def started_http() -> AsyncIterator[Http]:
    http = Http()
    await http.start()
    yield http
    await http.kill()


@pytest.fixture
async def http(started_http: Http) -> Http:
    """The server that all tests share, since it takes seconds to start. Restarted if a test stopped it."""
    assert started_http.process is not None
    if started_http.process.returncode is not None:
        await started_http.start()
    return started_http


@asynccontextmanager
async def pool(**servers: Server) -> AsyncIterator[Pool]:
    pool = Pool(servers)
    try:
        yield pool
    finally:
        await pool.close()


async def post_message(live: Live, thread: str, content: str) -> dict[str, Any]:
    """Post a message and return the answer. Fails if the run failed."""
    answer = await live.post(thread, content)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


@pytest.mark.slow
async def test_two_agents_with_different_servers_run_concurrently(
    tmp_path: Path, service: StandIn, claude: Claude, http: Http
) -> None:
    servers = {"time": TIME, "http": http.config}
    convert = use("convert_time", {"source_timezone": "UTC", "time": "12:00", "target_timezone": "Asia/Tokyo"})
    async with claude_server(tmp_path, service, claude, servers) as live:
        clock, adder = [
            await live.thread((await live.agent(kind="claude", mcp_servers=[name]))["id"]) for name in servers
        ]
        service.otherwise = lambda request: (
            DONE
            if request["messages"][-1]["content"][0]["type"] == "tool_result"
            else says(convert)
            if "convert_time" in {tool["name"] for tool in request["tools"]}
            else says(use("add", {"a": 2, "b": 40}))
        )
        for _ in range(2):
            time_response, added = await asyncio.gather(live.post(clock, "What time?"), live.post(adder, "How much?"))
            assert "21:00" in str(time_response.json()["tool_calls"][0]["result"])
            assert added.json()["tool_calls"][0]["result"] == {"result": 42}
        offered = [{tool["name"] for tool in request["tools"]} for request in service.requests]
        assert {"convert_time", "get_current_time"} in offered
        assert HTTP_NAMES in offered
        assert all(len(names & {"add", "convert_time"}) == 1 for names in offered)
    assert service.refused == []


async def test_pictures_and_resources_of_a_tool_are_stored_and_sent_to_the_model(
    tmp_path: Path, service: StandIn, claude: Claude, http: Http
) -> None:
    async with claude_server(tmp_path, service, claude, {"http": http.config}) as live:
        thread = await live.thread()
        service.will(says(use("look", {})), DONE)
        (call,) = (await post_message(live, thread, "What do you see?"))["tool_calls"]
        assert (await live.get(thread))["messages"][-1]["tool_calls"] == [call]
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PICTURE}}
    assert call["error"] is None
    assert call["result"] == {
        "content": [
            {"type": "text", "text": "This is what I see."},
            {"type": "image", "data": PICTURE, "mimeType": "image/png"},
            {"type": "resource", "resource": LOG},
            {"type": "resource", "resource": {"uri": "harbour://chart", "mimeType": "image/png", "blob": PICTURE}},
        ]
    }
    (block,) = service.requests[-1]["messages"][-1]["content"]
    assert (block["type"], block.get("is_error", False)) == ("tool_result", False)
    assert block["content"] == [
        {"type": "text", "text": "This is what I see."},
        picture,
        {"type": "text", "text": "harbour://log\n417 herons at Ærø"},
        picture,
    ]
    assert service.refused == []


async def test_text_and_images_beside_structured_content_reach_the_record_and_the_model(
    tmp_path: Path, service: StandIn, claude: Claude
) -> None:
    async with claude_server(tmp_path, service, claude, {"raw": raw()}) as live:
        thread = await live.thread()
        service.will(says(use("both", {"picture": PICTURE}), use("both", {"picture": PICTURE, "own": True})), DONE)
        other, own = (await post_message(live, thread, "What do you see?"))["tool_calls"]
        assert (await live.get(thread))["messages"][-1]["tool_calls"] == [other, own]
        service.will(DONE)
        await post_message(live, thread, "And now?")
    rows, image = {"rows": [1, 2]}, {"type": "image", "data": PICTURE, "mimeType": "image/png"}
    assert other["result"] == {"structuredContent": rows, "content": [{"type": "text", "text": "Two rows."}, image]}
    assert own["result"] == {"structuredContent": rows, "content": [image]}
    shown = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PICTURE}}
    contents = [block["content"] for block in service.requests[-2]["messages"][-1]["content"]]
    assert contents == [
        [{"type": "text", "text": '{"rows":[1,2]}'}, {"type": "text", "text": "Two rows."}, shown],
        [{"type": "text", "text": '{"rows":[1,2]}'}, shown],
    ]
    assert service.requests[-1]["messages"][2] == service.requests[-2]["messages"][-1], "the cached prefix is the same"
    assert service.refused == []


@pytest.mark.parametrize("tool", ["ask", "require"])
async def test_a_tool_that_needs_user_input_fails_with_a_clear_sentence(http: Http, tool: str) -> None:
    """`ask` elicits while it runs; `require` responds with `input_required`, as servers since 2026-07-28 do."""
    async with pool(http=http.config) as connections:
        toolbox = connections.toolbox(agent("http"))
        assert (await call(toolbox, tool)).error == (
            "The tool asks the user for input (elicitation), which this chat server does not support yet."
        )
        assert await result(toolbox, "add", {"a": 1, "b": 2}) == {"result": 3}


async def test_a_response_over_http_that_is_too_large_fails_only_its_call(http: Http) -> None:
    async with pool(http=http.config) as connections:
        toolbox = connections.toolbox(agent("http"))
        parts = [
            part.error
            async for part in toolbox.call([ToolUse("1", "huge", {}), ToolUse("2", "add", {"a": 1, "b": 2})])
            if isinstance(part, ToolCompleted)
        ]
        assert sorted(map(str, parts)) == ["None", "The server's response was larger than 4 MB and was dropped."]


async def test_connections_are_reused_by_later_messages(
    tmp_path: Path, service: StandIn, claude: Claude, http: Http
) -> None:
    before = children()
    async with claude_server(tmp_path, service, claude, {"http": http.config}) as live:
        thread = await live.thread()
        counts = []
        for _ in range(6):
            service.will(says(use("add", {"a": 1, "b": 2}), use("counted", {})), DONE)
            calls = (await post_message(live, thread, "Count."))["tool_calls"]
            counts.append(calls[1]["result"])
        assert calls[0]["result"] == {"result": 3}
        assert counts[-1]["connections"] <= counts[0]["connections"] + 1
        assert counts[-1]["POST"] - counts[0]["POST"] <= 2 * 5, "the tools are listed once"
        assert children() <= before


@pytest.mark.slow
async def test_fifty_concurrent_runs_share_one_pooled_server(tmp_path: Path, service: StandIn, claude: Claude) -> None:
    async with claude_server(tmp_path, service, claude, {"raw": raw()}) as live:
        service.otherwise = lambda request: (
            DONE
            if request["messages"][-1]["content"][0]["type"] == "tool_result"
            else says(use("meet", {"guests": 50}), use("pid", {}))
        )
        threads = [await live.thread() for _ in range(50)]
        answers = await asyncio.gather(*(live.post(thread, "Meet.") for thread in threads))
        calls = [answer.json()["tool_calls"] for answer in answers]
        assert [met["error"] for met, _ in calls] == [None] * 50
        assert len({pid["result"]["pid"] for _, pid in calls}) == 1
    assert service.refused == []


@pytest.mark.slow
async def test_an_http_server_killed_during_a_call_fails_that_call_and_is_reconnected(
    tmp_path: Path, service: StandIn, claude: Claude, http: Http, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mcp_slot, "BACK_OFF_SECONDS", 0.01)
    monkeypatch.setattr(mcp_slot, "RETRY_WAIT_SECONDS", 10.0)
    async with claude_server(tmp_path, service, claude, {"http": http.config, "time": TIME}) as live:
        thread = await live.thread()
        service.will(says(use("wait", {"seconds": 30}), use("get_current_time", {"timezone": "UTC"})), DONE)
        async with live.posting(thread, "Wait.") as posting:
            stream, seen = posting.aiter_raw(), b""
            async with asyncio.timeout(10):
                async for data in stream:
                    seen += data
                    if b"tool_call.progress" in seen:
                        break
            assert b"tool_call.progress" in seen, seen.decode()
            await http.kill()
            rest = b"".join([data async for data in stream])
        assert b"run.completed" in rest
        waited, after = (await live.get(thread))["messages"][-1]["tool_calls"]
        assert "http" in waited["error"]
        assert after["error"] is None

        service.will(says(use("get_current_time", {"timezone": "UTC"})), DONE)
        assert (await post_message(live, thread, "And now?"))["tool_calls"][0]["error"] is None
        assert "The tools of the server http are not available now." in str(service.requests[-1]["system"])

        await http.start()
        service.will(says(use("add", {"a": 1, "b": 2})), DONE)
        assert (await post_message(live, thread, "And now?"))["tool_calls"][0]["result"] == {"result": 3}
    assert service.refused == []


@pytest.mark.slow
async def test_a_stdio_server_killed_between_runs_is_restarted(
    tmp_path: Path, service: StandIn, claude: Claude
) -> None:
    async with claude_server(tmp_path, service, claude, {"time": TIME}) as live:
        thread = await live.thread()
        request_time = says(use("get_current_time", {"timezone": "UTC"}))
        before = children()
        for _ in range(3):
            service.will(request_time, DONE)
            assert (await post_message(live, thread, "When?"))["tool_calls"][0]["error"] is None
            for pid in children() - before:
                os.kill(pid, signal.SIGKILL)
            await until(lambda: children() <= before)


@pytest.mark.slow
async def test_two_hundred_runs_leave_no_process_task_or_file(tmp_path: Path, service: StandIn, claude: Claude) -> None:
    call_tools = says(text("I look. "), use("echo", {"text": "a"}), use("nothing", {}))
    async with claude_server(tmp_path, service, claude, {"raw": raw()}) as live:
        threads = [await live.thread() for _ in range(25)]
        service.otherwise = lambda request: (
            (DONE if len(service.requests) % 5 else DONE.ends("cut", 5))
            if request["messages"][-1]["content"][0]["type"] == "tool_result"
            else call_tools
        )

        async def ask(times: int) -> None:
            for _ in range(times):
                answers = await asyncio.gather(*(live.post(thread, "Go.") for thread in threads))
                assert {answer.status_code for answer in answers} <= {201, 502}

        await ask(1)
        gc.collect()
        before = held()
        await ask(7)
        gc.collect()

        def settled() -> bool:
            processes, tasks, files = held()
            return processes == before[0] and tasks <= before[1] and files <= before[2]

        await until(settled)
        assert len(service.requests) >= 2 * 200
    assert service.refused == []


async def test_an_idle_connection_is_closed_and_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcp_connection, "IDLE_SECONDS", 0.2)
    before = held()
    async with pool(raw=raw()) as connections:
        toolbox = connections.toolbox(agent("raw"))
        first = (await result(toolbox, "pid"))["pid"]
        await until(lambda: held() == before)
        assert (await result(toolbox, "pid"))["pid"] != first
    assert held() == before


@pytest.mark.slow
async def test_a_call_longer_than_the_idle_time_is_not_interrupted(monkeypatch: pytest.MonkeyPatch, http: Http) -> None:
    monkeypatch.setattr(mcp_connection, "IDLE_SECONDS", 0.1)
    async with pool(http=http.config) as connections:
        toolbox = connections.toolbox(agent("http"))
        assert await names(toolbox) == HTTP_NAMES
        assert (await call(toolbox, "wait", {"seconds": 0.5})).error is None
        died = await call(toolbox, "die")
        assert "http" in str(died.error)
        await http.wait_for_exit()


@pytest.mark.slow
async def test_more_than_a_hundred_concurrent_calls_reach_one_http_server(http: Http) -> None:
    uses = [ToolUse(str(number), "meet", {"guests": 120}) for number in range(120)]
    async with pool(http=http.config) as connections, asyncio.timeout(30):
        parts = [part async for part in connections.toolbox(agent("http")).call(uses)]
    assert [part.error for part in parts if isinstance(part, ToolCompleted)] == [None] * 120
