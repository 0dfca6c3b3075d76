"""Random, seeded traffic: runs, retries, cancels, interrupts, deletions, and viewers that reconnect."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from agent_chat.stores.events import TERMINAL_TYPES
from tests.support.chaos import Chaos
from tests.support.gates import all_left, critical
from tests.support.thread_view import status

SECONDS = 4.0
THREADS = 6


@pytest.mark.parametrize("seed", [1])
async def test_after_random_traffic_every_viewer_has_the_stored_thread_and_every_run_ended_once(
    tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    async with critical(tmp_path) as race:
        until = asyncio.get_running_loop().time() + SECONDS
        agent = (await race.live.agent())["id"]
        threads = [await race.live.thread(agent) for _ in range(THREADS)]
        async with asyncio.timeout(SECONDS + 15), asyncio.TaskGroup() as group:
            chaos = [
                group.create_task(
                    Chaos(race, random.Random(rng.random()), thread, until).whole(deleting=thread == threads[0])
                )
                for thread in threads
            ]
        for thread, task in zip(threads, chaos, strict=True):
            views, watching = task.result()
            if thread == threads[0]:
                assert watching.frames[-1].event == "thread.deleted"
                assert (await race.live.http.get(thread)).status_code == 404
                continue
            stored = await race.live.get(thread, message_limit=100)
            started = [f.data["message"]["id"] for f in watching.frames if f.event == "run.started"]
            ended = [f.data["message"]["id"] for f in watching.frames if f.event in TERMINAL_TYPES]
            assert sorted(started) == sorted(ended)
            assert len(set(ended)) == len(ended)
            assert not [message for message in stored["messages"] if status(message) == "in_progress"]
            for message in stored["messages"]:
                assert watching.view.messages[message["id"]] == message
                for view in views:
                    if message["id"] in view.messages:
                        assert view.messages[message["id"]] == message
            assert all(view.listed()[-1] == stored["messages"][-1] for view in views)
        await all_left(race, *threads[1:])
