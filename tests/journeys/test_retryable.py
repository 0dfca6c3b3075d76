"""A failed run is retryable only if a retry makes no tool call twice that does not declare itself repeatable."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.support.claude_server import mcp_file
from tests.support.gates import critical
from tests.support.mcp_pool import raw
from tests.support.servers import Live, live_server, server_process
from tests.support.shapes import is_problem
from tests.support.viewers import watcher

KEY = {"Idempotency-Key": "k"}


async def fails(live: Live, thread: str, script: str) -> tuple[bool, bool]:
    """Post a script that fails in a way that may be retried; whether it is retryable, and whether its key is free."""
    first = await live.post(thread, script, **KEY)
    problem = is_problem(first, 503, "agent_overloaded", "thread_id", "message_id", "retryable")
    assert ("retry-after" in first.headers) == problem["retryable"], "clients repeat requests because of this header"
    again = await live.post(thread, script, **KEY)
    replayed = again.headers.get("idempotency-replayed") == "true"
    assert (again.json()["message_id"] == problem["message_id"]) == replayed
    assert len((await live.get(thread))["messages"]) == (2 if replayed else 3)
    return problem["retryable"], not replayed


@pytest.mark.parametrize(
    ("calls", "retryable"),
    [("", True), ("lookup oven\n", True), ("open oven\n", False), ("lookup a\nopen b\nlookup c\n", False)],
)
async def test_a_failed_run_is_retryable_and_frees_its_key_only_without_other_calls(
    live: Live, calls: str, retryable: bool
) -> None:
    thread = await live.scripted_thread()
    assert await fails(live, thread, f"say some\n{calls}overload busy") == (retryable, retryable)


async def test_mcp_tools_are_repeatable_if_they_declare_themselves_read_only_or_idempotent(tmp_path: Path) -> None:
    async with live_server(tmp_path, mcp_config=mcp_file(tmp_path, {"raw": raw()})) as live:
        agent = (await live.agent(mcp_servers=["raw"]))["id"]
        found = {
            call: await fails(live, await live.thread(agent), f"tool {call}\noverload busy")
            for call in ("pid {}", "read {}", "put {}", "claims {}", 'echo {"text": 1}', "absent {}")
        }
    once = {call for call, (retryable, _) in found.items() if not retryable}
    assert once == {"pid {}", "claims {}"}, "refused arguments and unknown tools are no calls"
    assert all(retryable == free for retryable, free in found.values())


async def test_no_tool_is_called_before_the_call_is_stored(tmp_path: Path) -> None:
    async with critical(tmp_path) as race:
        thread = await race.live.scripted_thread()
        checkpoint = race.store.hold("checkpoint", "before")
        async with watcher(race.live, thread) as watching:
            script = "open oven\nhold made\nopen sink\nhold later"
            posting = asyncio.create_task(race.live.streamed(thread, script))
            await watching.sees("tool_call.started")
            await checkpoint.reached()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await race.live.gates.reached("made")
            checkpoint.release()
            await race.live.gates.reached("made")
            second = race.store.hold("checkpoint", "before")
            race.live.gates.release("made")
            await race.live.gates.reached("later")  # one such call has decided: those after it don't wait
            second.release()
            race.live.gates.release("later")
            await posting


async def test_after_a_kill_during_the_first_call_its_key_stays_used(tmp_path: Path) -> None:
    """The process dies in the moment in which the tool has run: nothing but the wait before it stored the call."""
    ran = tmp_path / "ran"
    server = raw(args=["-S", str(Path(__file__).parents[1] / "support" / "raw_mcp_server.py")], env={"RAN": str(ran)})
    config = mcp_file(tmp_path, {"raw": server})
    async with server_process(tmp_path / "data", CHAT_MCP_CONFIG=str(config)) as process:
        agent = (await process.agent(mcp_servers=["raw"]))["id"]
        thread = await process.thread(agent)
        body, headers = {"content": "tool kill_caller {}"}, {**KEY, "Prefer": "respond-async"}
        run = (await process.http.post(f"{thread}/messages", json=body, headers=headers)).json()["id"]
        await process.ended()
        await process.start()
        stored = await process.get(f"{thread}/messages/{run}")
        assert stored["metadata"]["run"]["error"]["retryable"] is False
        again = await process.http.post(f"{thread}/messages", json=body, headers=headers)
        assert again.headers["idempotency-replayed"] == "true"
    assert ran.read_text() == "ran\n"
