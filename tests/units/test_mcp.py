"""The pool and its toolboxes, with real servers over stdio: the bundled one, and a raw one that can misbehave."""

import asyncio
import json
import os
import signal
import sys
from contextlib import aclosing
from pathlib import Path

import msgspec
import pytest

from agent_chat.agents import ToolCompleted, ToolProgress, ToolStarted, ToolUse
from agent_chat.agents.mcp import connection as mcp_connection
from agent_chat.agents.mcp.config import InvalidMcpFile, Server, read_servers
from agent_chat.agents.mcp.pool import Pool
from agent_chat.agents.mcp.results import RESULT_BYTES
from agent_chat.stores.models import JSONObject
from tests.support.mcp_pool import RAW, MakePool, agent, call, calls, children, held, names, raw, result, until
from tests.support.mcp_pool import make_pool as make_pool

ABSENT = Server(command="/nowhere/no-such-command")
SILENT = Server(command="sh", args=["-c", "cat > /dev/null"])


# --- connections


async def test_pool_reports_the_state_of_each_connection(make_pool: MakePool) -> None:
    missing = msgspec.convert({"command": "/no/such/command"}, Server)
    pool = make_pool(raw=raw(), missing=missing)
    assert pool.states == {"raw": "idle", "missing": "idle"}
    pool.connect()
    assert pool.states == {"raw": "connecting", "missing": "connecting"}
    await until(lambda: pool.states == {"raw": "ready", "missing": "unavailable"})


async def test_many_calls_of_many_runs_share_one_process(make_pool: MakePool) -> None:
    pool, before = make_pool(raw=raw()), children()
    pids = [(await result(pool.toolbox(agent("raw")), "pid"))["pid"] for _ in range(5)]
    assert set(pids) == children() - before
    assert len(set(pids)) == 1


async def test_concurrent_first_runs_share_one_process(make_pool: MakePool) -> None:
    pool = make_pool(raw=raw())
    results = await asyncio.gather(*(result(pool.toolbox(agent("raw")), "pid") for _ in range(5)))
    assert len({each["pid"] for each in results}) == 1


@pytest.mark.usefixtures("patient")
async def test_closing_leaves_no_process_no_task_and_no_open_file() -> None:
    before = held()
    pool = Pool({"a": raw(), "b": raw(), "absent": ABSENT})
    assert "pid" not in await names(pool.toolbox(agent("a", "b", "absent")))
    assert len(children() - before[0]) == 2
    async with asyncio.timeout(5):
        await pool.close()
    assert held() == before
    assert (await call(pool.toolbox(agent("a")), "pid")).error == (
        "The server a is unavailable. The chat server is shutting down."
    )
    assert held() == before


async def test_closing_fails_the_open_calls(tmp_path: Path) -> None:
    pool = Pool({"raw": raw()})
    parts = pool.toolbox(agent("raw")).call([ToolUse("1", "until_cancelled", {"file": str(tmp_path / "file")})])
    async with asyncio.timeout(5):
        assert isinstance(await anext(parts), ToolStarted)
        assert isinstance(await anext(parts), ToolProgress)
        await pool.close()
        assert await anext(parts) == ToolCompleted("1", error="The server raw disconnected during the call.")


async def test_closing_while_connecting_is_prompt() -> None:
    pool, before = Pool({"silent": SILENT}), children()
    waiting = asyncio.create_task(pool.toolbox(agent("silent")).available())
    async with asyncio.timeout(5):
        await until(lambda: children() != before)
        await pool.close()
        assert await waiting == []
    await until(lambda: children() == before)  # a process that has just started is killed, and reaped a moment later


async def test_a_server_killed_during_a_call_fails_that_call_and_restarts_for_the_next(make_pool: MakePool) -> None:
    toolbox = make_pool(raw=raw()).toolbox(agent("raw"))
    first = (await result(toolbox, "pid"))["pid"]
    parts = await calls(toolbox, ("die", {}), ("meet", {"guests": 2}))
    assert {part.error for part in parts if isinstance(part, ToolCompleted)} == {
        "The server raw disconnected during the call."
    }
    assert (await result(toolbox, "pid"))["pid"] != first


async def test_a_server_killed_between_calls_restarts_without_an_error(make_pool: MakePool) -> None:
    toolbox, before = make_pool(raw=raw()).toolbox(agent("raw")), held()
    first = (await result(toolbox, "pid"))["pid"]
    os.kill(first, 9)
    await until(lambda: held() == before)
    assert (await result(toolbox, "pid"))["pid"] != first


async def test_an_unreachable_server_removes_only_its_own_tools(make_pool: MakePool) -> None:
    pool = make_pool(raw=raw(), absent=ABSENT, quits=Server(command="true"))
    toolbox = pool.toolbox(agent("absent", "raw", "quits", "unknown"))
    assert "echo" in await names(toolbox)
    assert toolbox.missing == {
        "absent": "Its command was not found.",
        "quits": "It disconnected before it responded.",
        "unknown": "It is not configured.",
    }


async def test_a_failed_server_is_not_started_again_during_its_back_off(make_pool: MakePool, tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    toolbox = make_pool(quits=Server(command="sh", args=["-c", f"echo >> {starts}"])).toolbox(agent("quits"))
    for _ in range(20):
        assert await names(toolbox) == set()
    assert toolbox.missing == {"quits": "It disconnected before it responded."}
    assert starts.read_text() == "\n"


async def test_connecting_to_a_silent_server_times_out(make_pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(silent=SILENT, raw=raw())
    assert "echo" in await names(pool.toolbox(agent("raw")))
    monkeypatch.setattr(mcp_connection, "CONNECT_SECONDS", 0.3)
    toolbox = pool.toolbox(agent("silent", "raw"))
    assert "echo" in await names(toolbox)
    assert toolbox.missing == {"silent": "It did not respond within 0.3 s."}


@pytest.mark.parametrize("way", ["timed out", "cancelled"])
async def test_a_hanging_server_gets_no_calls_after_a_timeout_or_cancellation(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, way: str
) -> None:
    monkeypatch.setattr(mcp_connection, "PROBE_SECONDS", 0.3)
    toolbox = make_pool(raw=raw(timeout=1 if way == "timed out" else 60)).toolbox(agent("raw"))
    first = (await result(toolbox, "pid"))["pid"]
    parts = toolbox.call([ToolUse("1", "until_cancelled", {"file": str(tmp_path / "file")})])
    async with asyncio.timeout(5), aclosing(parts):  # type: ignore[type-var]
        assert isinstance(await anext(parts), ToolStarted)
        assert isinstance(await anext(parts), ToolProgress)
        os.kill(first, signal.SIGSTOP)
        if way == "timed out":
            assert await anext(parts) == ToolCompleted("1", error="The tool did not respond within 1 s.")
    assert (await result(toolbox, "pid"))["pid"] != first
    os.kill(first, signal.SIGCONT)
    await until(lambda: first not in children())


async def test_open_calls_of_a_retired_server_continue(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(mcp_connection, "PROBE_SECONDS", 0.5)
    toolbox = make_pool(raw=raw()).toolbox(agent("raw"))
    first = (await result(toolbox, "pid"))["pid"]
    async with asyncio.timeout(8):
        async with aclosing(toolbox.call([ToolUse("1", "until_cancelled", {"file": str(tmp_path / "file")})])) as parts:  # type: ignore[type-var]
            assert isinstance(await anext(parts), ToolStarted)
            assert isinstance(await anext(parts), ToolProgress)
            os.kill(first, signal.SIGSTOP)
            waiting = asyncio.create_task(result(toolbox, "pid"))
            await asyncio.sleep(0)
        assert (await result(toolbox, "pid"))["pid"] != first
        os.kill(first, signal.SIGCONT)
        assert (await waiting)["pid"] == first


async def test_a_responsive_server_is_not_retired_after_a_call_timed_out(make_pool: MakePool, tmp_path: Path) -> None:
    toolbox = make_pool(raw=raw(timeout=0.5)).toolbox(agent("raw"))
    first = (await result(toolbox, "pid"))["pid"]
    slow = ("until_cancelled", {"file": str(tmp_path / "file")})
    errors = [
        part.error for part in await calls(toolbox, slow, ("meet", {"guests": 2})) if isinstance(part, ToolCompleted)
    ]
    assert errors == ["The tool did not respond within 0.5 s."] * 2
    assert (await result(toolbox, "pid"))["pid"] == first


async def test_a_server_that_exits_right_after_connecting_gets_a_back_off(make_pool: MakePool, tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    script = f"echo >> {starts}; exec {sys.executable} -S {RAW} ends-when-listed"
    toolbox = make_pool(brief=Server(command="sh", args=["-c", script])).toolbox(agent("brief"))
    for _ in range(8):
        assert (await call(toolbox, "pid")).result is None
    assert await names(toolbox) == set()
    assert toolbox.missing["brief"] in (
        "It disconnected immediately after connecting.",
        "It disconnected during the last call.",
    )
    assert starts.read_text() == "\n"


# --- which tools


async def test_an_agent_without_servers_starts_no_process(make_pool: MakePool) -> None:
    pool, before = make_pool(raw=raw()), children()
    toolbox = pool.toolbox(agent())
    assert await toolbox.available() == []
    assert (await call(toolbox, "echo", {"text": ""})).error == "There is no tool named 'echo'."
    assert children() == before
    assert pool.names == ["raw"]


async def test_tools_are_those_that_the_operator_and_the_agent_allow(make_pool: MakePool) -> None:
    pool = make_pool(raw=raw(tools=["pid", "echo"]))
    assert await names(pool.toolbox(agent("raw"))) == {"pid", "echo"}
    narrow = pool.toolbox(agent("raw", tools=["echo", "raw__pid", "die"]))
    assert await names(narrow) == {"echo", "pid"}
    assert (await call(pool.toolbox(agent("raw", tools=[])), "echo", {"text": ""})).result is None
    assert (await call(narrow, "die")).error == "There is no tool named 'die'."


async def test_a_tool_name_of_two_servers_is_prefixed_with_the_server(make_pool: MakePool) -> None:
    pool = make_pool(a=raw(tools=["pid", "echo"]), b=raw(tools=["pid", "big"]))
    toolbox = pool.toolbox(agent("a", "b", "a"))
    assert await names(toolbox) == {"a__pid", "b__pid", "echo", "big"}
    assert await result(toolbox, "a__pid") != await result(toolbox, "b__pid")


async def test_all_pages_are_listed_and_a_tool_with_an_invalid_schema_is_skipped(make_pool: MakePool) -> None:
    found = await names(make_pool(raw=raw()).toolbox(agent("raw")))
    assert {"pid", "grow", "older_dialect"} <= found
    assert found.isdisjoint({"wrong_schema", "bottomless"})


async def test_tools_are_listed_again_when_they_change(make_pool: MakePool) -> None:
    toolbox = make_pool(raw=raw()).toolbox(agent("raw"))
    assert "grown" not in await names(toolbox)
    await result(toolbox, "grow")
    async with asyncio.timeout(5):
        while "grown" not in await names(toolbox):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


# --- calls


async def test_all_calls_are_started_in_order_before_other_parts(make_pool: MakePool) -> None:
    toolbox = make_pool(raw=raw()).toolbox(agent("raw"))
    uses = [ToolUse("x", "echo", {"text": "1"}), ToolUse("y", "nothing", {}), ToolUse("z", "echo", {"text": "2"})]
    async with asyncio.timeout(5):
        parts = [part async for part in toolbox.call(uses, round=3)]
    assert parts[:3] == [
        ToolStarted(use.id, use.name, use.arguments, 3, repeatable=use.name == "nothing") for use in uses
    ]
    assert {part.id: part for part in parts[3:]} == {
        "x": ToolCompleted("x", {"content": [{"type": "text", "text": "1"}]}),
        "y": ToolCompleted("y", error="There is no tool named 'nothing'."),
        "z": ToolCompleted("z", {"content": [{"type": "text", "text": "2"}]}),
    }


async def test_calls_run_concurrently(make_pool: MakePool) -> None:
    toolbox = make_pool(raw=raw()).toolbox(agent("raw"))
    parts = await calls(toolbox, *[("meet", {"guests": 8})] * 8)
    assert sum(isinstance(part, ToolCompleted) and part.error is None for part in parts) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({}, "'text' is a required property"), ({"text": 1}, "at text: 1 is not of type 'string'"), ([], "JSON object")],
)
async def test_invalid_arguments_are_an_error(make_pool: MakePool, arguments: JSONObject, message: str) -> None:
    completed = (await calls(make_pool(raw=raw()).toolbox(agent("raw")), ("echo", arguments)))[-1]
    assert isinstance(completed, ToolCompleted)
    assert message in str(completed.error)


async def test_arguments_are_validated_by_the_dialect_that_the_schema_names(make_pool: MakePool) -> None:
    toolbox = make_pool(raw=raw()).toolbox(agent("raw"))
    assert "less than or equal to the minimum" in str((await call(toolbox, "older_dialect", {"n": 0})).error)


async def test_a_tool_error_is_the_error_of_the_call(make_pool: MakePool) -> None:
    assert (await call(make_pool(raw=raw()).toolbox(agent("raw")), "fail")).error == "It went wrong."


async def test_a_call_that_times_out_fails_and_is_cancelled_on_the_server(make_pool: MakePool, tmp_path: Path) -> None:
    file = tmp_path / "file"
    toolbox = make_pool(raw=raw(timeout=0.2)).toolbox(agent("raw"))
    completed = await call(toolbox, "until_cancelled", {"file": str(file)})
    assert completed.error == "The tool did not respond within 0.2 s."
    await wait_until_cancelled(file)


async def wait_until_cancelled(file: Path) -> None:
    await until(lambda: file.exists() and file.read_text() == "cancelled")


@pytest.mark.parametrize("way", ["closed", "closed by another task", "task cancelled"])
async def test_closing_the_iterator_cancels_the_calls_on_the_server(
    make_pool: MakePool, tmp_path: Path, way: str
) -> None:
    toolbox, file, reached = make_pool(raw=raw()).toolbox(agent("raw")), tmp_path / "file", asyncio.Event()
    await toolbox.available()
    tasks = len(asyncio.all_tasks())

    parts = toolbox.call([ToolUse("1", "until_cancelled", {"file": str(file)})])

    async def follow() -> None:
        async for part in parts:
            if isinstance(part, ToolProgress):
                reached.set()
                if way != "task cancelled":
                    return

    following = asyncio.create_task(follow())
    async with asyncio.timeout(5):
        await reached.wait()
        if way == "task cancelled":
            following.cancel()
        await asyncio.wait([following])
        if way == "closed by another task":
            await asyncio.create_task(parts.aclose())  # type: ignore[attr-defined]
        else:
            await parts.aclose()  # type: ignore[attr-defined]
    await wait_until_cancelled(file)
    assert len(asyncio.all_tasks()) == tasks
    assert "pid" in await result(toolbox, "pid")


async def test_unread_progress_is_replaced_by_newer_progress(make_pool: MakePool) -> None:
    toolbox = make_pool(raw=raw()).toolbox(agent("raw"))
    parts = await calls(toolbox, ("flood", {}))
    steps = [part.progress for part in parts if isinstance(part, ToolProgress)]
    assert steps == sorted(set(steps))
    assert isinstance(parts[-1], ToolCompleted)


async def test_a_large_result_is_truncated_and_marked(make_pool: MakePool) -> None:
    toolbox = make_pool(raw=raw()).toolbox(agent("raw"))
    truncated = await result(toolbox, "big", {"times": 50_000})
    assert set(truncated) == {"truncated", "full_bytes", "text"}
    assert truncated["truncated"] is True
    assert truncated["full_bytes"] > 300_000
    assert truncated["text"].startswith('é"\n' * 1000)
    assert 60_000 < len(msgspec.json.encode(truncated)) <= RESULT_BYTES
    whole = await result(toolbox, "big", {"times": 5})
    assert whole == {"content": [{"type": "text", "text": 'é"\n' * 5}]}


async def test_a_picture_that_is_too_large_is_replaced_by_a_note(make_pool: MakePool) -> None:
    toolbox = make_pool(raw=raw()).toolbox(agent("raw"))
    truncated = await result(toolbox, "picture", {"size": 40_000})
    assert truncated["full_bytes"] > 80_000
    assert truncated["text"].split("\n") == [
        "Seen.",
        "[image, image/png: 40000 base64 characters, omitted]",
        "[harbour://map: a file of 40000 base64 characters, omitted]",
    ]
    whole = await result(toolbox, "picture", {"size": 4000})
    assert [block["type"] for block in whole["content"]] == ["text", "image", "resource"]


async def test_the_bundled_server_reports_progress(make_pool: MakePool) -> None:
    pool = make_pool(**read_servers(None, {}))
    toolbox = pool.toolbox(agent("demo"))
    async with aclosing(toolbox.call([ToolUse("1", "slow_task", {"seconds": 0.06, "steps": 3})])) as parts:  # type: ignore[type-var]
        async with asyncio.timeout(10):
            received = [part async for part in parts]
    assert received[1:] == [
        *[ToolProgress("1", step, 3.0, f"Step {step} of 3") for step in (1, 2, 3)],
        ToolCompleted("1", {"seconds": 0.06, "steps": 3}),
    ]


# --- the operator's file


def write(folder: Path, content: object) -> Path:
    file = folder / "mcp.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


async def test_the_file_configures_command_environment_and_folder(make_pool: MakePool, tmp_path: Path) -> None:
    entry = {"command": "${PYTHON}", "args": ["-S", RAW], "env": {"GREETING": "${WORD:-hello} you"}, "cwd": "${HERE}"}
    file = write(tmp_path, {"mcpServers": {"mine": entry}})
    pool = make_pool(**read_servers(file, {"PYTHON": sys.executable, "HERE": str(tmp_path)}))
    assert await result(pool.toolbox(agent("mine")), "environment") == {"greeting": "hello you", "cwd": str(tmp_path)}


def test_a_server_may_be_a_url_with_headers(tmp_path: Path) -> None:
    entry = {"url": "https://tools.example/mcp", "headers": {"Authorization": "Bearer ${KEY}"}, "timeout": 5}
    servers = read_servers(write(tmp_path, {"mcpServers": {"far": entry}}), {"KEY": "k"})
    assert servers["far"].headers == {"Authorization": "Bearer k"}
    assert servers["far"].timeout == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ([], '"mcpServers"'),
        ({"mcpServers": {"a b": {"command": "x"}}}, "the server name 'a b'"),
        ({"mcpServers": {"a": {}}}, "the server 'a' is invalid: it needs either a `command` or a `url`"),
        ({"mcpServers": {"a": {"command": "x", "url": "http://x"}}}, "either a `command` or a `url`"),
        ({"mcpServers": {"a": {"url": "file:///x"}}}, "its `url` must begin with http"),
        ({"mcpServers": {"a": {"command": "${NO}"}}}, "the environment variable NO is not set"),
        ({"mcpServers": {"a": {"command": "x", "args": "y"}}}, "$.args"),
        ({"mcpServers": {"a": {"command": "x", "timeout": 0}}}, "`timeout`"),
        ({"mcpServers": {"a": {"command": "x", "tool": ["y"]}}}, "unknown field `tool`"),
        ({"mcpServers": {"a": {"url": "http://x", "type": "sse"}}}, "`type` 'sse'"),
        ({"mcpServers": {"a": 1}}, "the server 'a'"),
    ],
)
def test_an_invalid_file_is_rejected_with_one_sentence(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(InvalidMcpFile) as rejection:
        read_servers(write(tmp_path, content), {})
    assert message in str(rejection.value)
    assert str(rejection.value).endswith(".")
    assert "\n" not in str(rejection.value)


def test_a_missing_file_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(InvalidMcpFile, match="No such file"):
        read_servers(tmp_path / "none.json", {})
