"""SIGTERM and Ctrl-C: every request is completed, the process ends in time, and the next start finds all answers."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from agent_chat.server.serving import _CLOSE_SECONDS
from tests.support.client import Frame, frames
from tests.support.scripted import FolderGates
from tests.support.servers import Process, server_process
from tests.support.sockets import socket
from tests.support.thread_view import status

DRAIN_SECONDS = 2
SLACK_SECONDS = 10
ENDLESS = "say never\nlookup oven\nhold for-ever"
KEY = {"Idempotency-Key": "k"}


async def until(stream: AsyncIterator[Frame], event: str) -> Frame:
    """The next frame of that type."""
    while (frame := await anext(stream)).event != event:
        pass
    return frame


async def until_refused(server: Process, thread: str) -> tuple[httpx.Response, list[str]]:
    """Post until the server drains: its refusal, and the ids of the answers until the signal had arrived."""
    accepted: list[str] = []
    async with asyncio.timeout(DRAIN_SECONDS):
        while True:
            answer = await server.post(thread, "say hello")
            if answer.json().get("code") == "draining":
                return answer, accepted
            assert answer.status_code == 201 or answer.json()["code"] == "interrupted", answer.text
            accepted.append(answer.json().get("id") or answer.json()["message_id"])


async def goodbye(response: httpx.Response) -> tuple[str, bytes]:
    """The last event of a raw stream that ends, and what came behind it."""
    told = b"".join([data async for data in response.aiter_raw()])
    *_, last, rest, nothing = told.split(b"\n\n")
    assert nothing == b""
    return last.split(b"\n")[0].decode(), rest


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
async def test_a_graceful_stop_completes_every_request_and_the_next_start_finds_all_answers(
    tmp_path: Path, how: signal.Signals
) -> None:
    environment = {"CHAT_DRAIN_SECONDS": str(DRAIN_SECONDS), "TEST_GATES": str(tmp_path)}
    async with server_process(tmp_path / "data", **environment) as server:
        agent = (await server.agent())["id"]
        endless, short, idle, refused = [await server.thread(agent) for _ in range(4)]
        async with (
            server.posting(endless, ENDLESS, **KEY) as posting,
            server.posting(short, "say soon\nhold short\nsay done") as completing,
            server.http.stream("GET", f"{endless}/events") as watching,
            server.http.stream("GET", f"{idle}/events") as nothing,
            socket(server.url, endless) as viewer,
        ):
            interrupted, completed = frames(posting), frames(completing)
            old = [await until(interrupted, "tool_call.started"), await until(completed, "message.delta")]
            assert (await viewer.receive())["type"] == "thread.snapshot"
            waiting = asyncio.create_task(server.post(endless, ENDLESS, **KEY))

            asked = time.monotonic()
            server.signal(how)
            refusal, accepted = await until_refused(server, refused)
            FolderGates(tmp_path).release("short")

            assert (refusal.status_code, "retry-after" in refusal.headers) == (503, True)
            whole = (await until(completed, "run.completed")).data["message"]
            answer = await waiting
            assert (answer.status_code, answer.json()["code"]) == (503, "interrupted")
            kept = (await until(interrupted, "run.failed")).data["message"]
            assert (await viewer.until("run.failed"))[-1]["message"] == kept
            assert await viewer.close_code() == 1012
            assert await goodbye(watching) == ("event: run.failed", b"retry: 1000")
            assert await goodbye(nothing) == ("event: thread.snapshot", b"retry: 1000")
            async with asyncio.timeout(DRAIN_SECONDS + _CLOSE_SECONDS + SLACK_SECONDS):
                assert await server.ended() == 0
            assert time.monotonic() - asked > DRAIN_SECONDS - 0.1, "the endless run had its time"

        await server.start()
        assert (whole["content"], status(whole)) == ("soondone", "completed")
        assert is_interrupted(kept)["content"] == "never"
        for thread, position, last in ((endless, old[0].id, kept), (short, old[1].id, whole)):
            await goes_on_behind(server, thread, position, last)
        stored = (await server.get(refused))["messages"]
        assert [message["id"] for message in stored if message["role"] == "assistant"] == accepted
        assert len(stored) == 2 * len(accepted), "what was refused is not stored"


def is_interrupted(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose run was cut off, its tool call too."""
    error = message["metadata"]["run"]["error"]
    assert (status(message), error["code"], error["retryable"]) == ("failed", "interrupted", True)
    assert all(call["error"] and call["end_time"] for call in message["tool_calls"])
    return message


async def goes_on_behind(server: Process, thread: str, position: str, last: dict[str, Any]) -> None:
    """The thread ends with that message; a position from before the restart is resumed exactly; the next post works."""
    stored = (await server.get(thread))["messages"]
    assert stored[1:] == [last]
    terminal = f"run.{status(last)}"
    async with server.watching(thread, position) as watcher, socket(server.url, thread, after=position) as viewer:
        assert (await until(watcher, terminal)).data["message"] == last
        assert (await viewer.until(terminal))[-1]["message"] == last
        following = await server.post(thread, "say next")
        assert (following.status_code, following.json()["content"]) == (201, "next")
        assert (await until(watcher, "run.completed")).data["message"] == following.json()
        assert (await viewer.until("run.completed"))[-1]["message"] == following.json()
