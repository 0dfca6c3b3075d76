"""`kill -9` of a server on embedded stores at random moments: what readers have received is stored and resumes exactly.

`TEST_KILLS=100 pytest tests/faults/test_kill_embedded.py -s` kills it more often.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from agent_chat.stores.events import TERMINAL_TYPES
from tests.support.client import Frame
from tests.support.servers import Process, server_process
from tests.support.thread_view import View, status

KILLS = int(os.environ.get("TEST_KILLS", 3))
THREADS = 4
POSITIONS = 8
"""At how many random positions of each thread it resumes, beside the first one."""
SCRIPT = """say 🎈
count 15 1
lookup oven
count 15 1
result look {"found": [1, "two"]}
count 40 1
open kettle
count 400 1"""


class Reader:
    """A reader of one thread until the server dies, with what it has received."""

    def __init__(self, thread: str) -> None:
        self.thread = thread
        self.frames: list[Frame] = []

    async def read(self, server: Process) -> None:
        try:
            async with server.watching(self.thread) as stream:
                async for frame in stream:
                    self.frames.append(frame)
        except httpx.TransportError:
            pass

    def check_stored(self, messages: dict[str, dict[str, Any]], counts: Counter[str]) -> None:
        """Every character and every tool event that was received is in the stored message."""
        view = View()
        for frame in self.frames:
            view.apply(frame)
        for message_id, seen in view.messages.items():
            stored = messages[message_id]
            assert stored["content"].startswith(seen["content"])
            for call, now in zip(seen["tool_calls"], stored["tool_calls"], strict=False):
                assert now["end_time"], "the end of a run ends its open calls"
                assert (now["tool_name"], now["arguments"]) == (call["tool_name"], call["arguments"])
                assert call["end_time"] is None or now == call
            assert len(stored["tool_calls"]) >= len(seen["tool_calls"])
            counts["characters"] += len(seen["content"]) if seen["role"] == "assistant" else 0
            counts["tool calls"] += len(seen["tool_calls"])
        counts["events"] += len(self.frames)

    async def check_positions(self, server: Process, chance: random.Random, counts: Counter[str]) -> None:
        """At every position it gets what it had received after it, byte for byte, and then the run's one end."""
        whole = [self.frames[0], *await resumed(server, self.thread, self.frames[0].id)]
        assert [frame.raw for frame in whole[: len(self.frames)]] == [frame.raw for frame in self.frames]
        for number in chance.sample(range(len(self.frames)), min(POSITIONS, len(self.frames))):
            after = await resumed(server, self.thread, self.frames[number].id)
            assert [frame.raw for frame in after] == [frame.raw for frame in whole[number + 1 :]]
            counts["positions"] += 1


async def resumed(server: Process, thread: str, position: str) -> list[Frame]:
    """What follows a position, up to the event by which `settle` marks the end."""
    found: list[Frame] = []
    async with asyncio.timeout(20), server.watching(thread, position) as stream:
        async for frame in stream:
            if frame.event == "thread.updated" and frame.data["thread"]["title"] == "settled":
                return found
            found.append(frame)
    raise AssertionError("the stream ended")


async def settle(server: Process, thread: str, position: str) -> dict[str, dict[str, Any]]:
    """Wait until every run has ended in the store and in the log, and mark the log's end; the messages."""
    async with asyncio.timeout(20):
        while True:
            messages = (await server.get(thread))["messages"]
            if not any(status(message) == "in_progress" for message in messages):
                break
            await asyncio.sleep(0.02)
        runs = {message["id"] for message in messages if message["role"] == "assistant"}
        async with server.watching(thread, position) as stream:
            while runs:
                frame = await anext(stream)
                if frame.event in TERMINAL_TYPES:
                    runs.discard(frame.data["message"]["id"])
    await server.http.patch(thread, json={"title": "settled"})
    return {message["id"]: message for message in messages}


@pytest.mark.timeout(60 + 20 * KILLS)
async def test_a_kill_loses_nothing_that_a_reader_has_received(tmp_path: Path) -> None:
    chance, counts = random.Random(), Counter[str]()
    async with server_process(tmp_path) as server:
        agent = (await server.agent())["id"]
        for _ in range(KILLS):
            readers = [Reader(await server.thread(agent)) for _ in range(THREADS)]
            reading = [asyncio.create_task(reader.read(server)) for reader in readers]
            async with asyncio.timeout(10):
                while not all(reader.frames for reader in readers):  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
            posting = [asyncio.create_task(server.start_run(reader.thread, SCRIPT)) for reader in readers]
            await asyncio.sleep(chance.random() * 0.8)
            await server.kill()
            await asyncio.gather(*reading)
            await asyncio.gather(*posting, return_exceptions=True)
            await server.start()
            for reader in readers:
                reader.check_stored(await settle(server, reader.thread, reader.frames[0].id), counts)
            for reader in readers:
                await reader.check_positions(server, chance, counts)
                ends = [
                    frame.data["message"]["id"]
                    for frame in await resumed(server, reader.thread, reader.frames[0].id)
                    if frame.event in TERMINAL_TYPES
                ]
                assert len(ends) == len(set(ends)), "one terminal event for each run"
                counts["ends"] += len(ends)
            counts["kills"] += 1
            print(dict(counts), flush=True)  # noqa: T201
    assert counts["characters"]
