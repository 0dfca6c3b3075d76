"""A server that opens the data of an earlier version returns everything that the earlier one returned."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from agent_chat.server.command_line import main
from tests.support.earlier_data import recorded, unpack_folder
from tests.support.recording import connect, read
from tests.support.servers import Process, server_process

JSON = dict[str, Any]

ASYNC = {"Prefer": "respond-async"}


async def check_returns_everything(server: Process, recording: JSON) -> None:
    """Compare all agents, threads, messages and files, then post to the thread whose run had died."""
    for earlier in recording["organizations"]:
        with connect(server.url, earlier["key"]) as http:
            now = await asyncio.to_thread(read, http, earlier["deleted_agent"])
            for thread_id, thread in earlier["threads"].items():
                if thread_id == earlier["dying"]:
                    check_interrupted(thread, now["threads"][thread_id])
                else:
                    assert now["threads"][thread_id] == thread
            assert now["threads"].keys() == earlier["threads"].keys()
            assert now["agents"] == earlier["agents"]
            assert now["default_agent"] == earlier["default_agent"]
            path = f"/chat/default/threads/{earlier['dying']}/messages"
            answer = await asyncio.to_thread(http.post, path, json={"content": "Hello"}, headers=ASYNC)
            assert answer.status_code == 202
    with connect(server.url, recording["revoked"]) as http:
        assert http.get("/agents").status_code == 401


def check_interrupted(earlier: JSON, now: JSON) -> None:
    """The thread is as it was, except that its last run has failed and has stored what its record contained."""
    changed = {"messages": [], "updated_at": ""}
    assert {**now, **changed} == {**earlier, **changed}
    assert now["messages"][:-1] == earlier["messages"][:-1]
    before, after = earlier["messages"][-1], now["messages"][-1]
    assert after["content"].startswith(before["content"])
    assert after["metadata"]["run"]["status"] == "failed"
    assert after["metadata"]["run"]["in_reply_to"] == before["metadata"]["run"]["in_reply_to"]
    for call, call_before in zip(after["tool_calls"], before["tool_calls"], strict=True):
        if call_before["end_time"]:
            assert call == call_before
        else:
            assert call["error"]
            assert call["end_time"]


def list_keys(data_dir: Path) -> list[JSON]:
    """What `keys list` prints of each key, without what 0.1.0 did not print."""
    result = CliRunner().invoke(main, ["keys", "list"], env={"CHAT_DATA_DIR": str(data_dir)})
    assert result.exit_code == 0, result.output
    header, *rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert header == ["id", "organization", "user", "ends with", "source", "created", "state"]
    names = ["id", "organization", "user", "hint", "source", "created", "state"]
    return [{name: each for name, each in zip(names, row, strict=True) if name != "source"} for row in rows]


@pytest.mark.slow
async def test_a_data_folder_of_version_0_1_0_loses_nothing(tmp_path: Path) -> None:
    recording = recorded("0.1.0", "sqlite")
    folder = unpack_folder("0.1.0", tmp_path)
    async with server_process(folder, CHAT_API_KEY="") as server:
        await check_returns_everything(server, recording)
        await server.kill()
        await server.start()
        with connect(server.url, recording["organizations"][0]["key"]) as http:
            assert (await asyncio.to_thread(http.get, "/agents")).status_code == 200
    assert await asyncio.to_thread(list_keys, folder) == recording["keys"]
