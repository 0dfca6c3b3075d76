"""Fifty threads over two processes, at random but seeded: connections die, viewers come and go, and nothing is amiss.

CHAT_TEST_SOAK_SECONDS (8) is how long; CHAT_TEST_SOAK_SEED (1) is which.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.support.servers import Process
from tests.support.services import RedisServer, redis_process
from tests.support.site import Site, opened_site
from tests.support.thread_view import status
from tests.support.viewers import DOORS, Viewer, viewing

SECONDS = float(os.environ.get("CHAT_TEST_SOAK_SECONDS", "8"))
SEED = int(os.environ.get("CHAT_TEST_SOAK_SEED", "1"))
THREADS = 50
KINDS = ("normal", "pubsub")
FORMS: tuple[dict[str, str], ...] = ({}, {"Prefer": "respond-async"}, {"Accept": "text/event-stream"})

pytestmark = pytest.mark.timeout(SECONDS + 60)


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with redis_process() as server:
        yield server


@pytest.fixture
async def site(tmp_path: Path, mongo_url: str, redis: RedisServer) -> AsyncIterator[Site]:
    async with opened_site(tmp_path, mongo_url, redis.url) as site:
        yield site


class Soak:
    """The concurrent clients, and what they did."""

    def __init__(self, servers: list[Process], redis: RedisServer) -> None:
        self.servers = servers
        self.redis = redis
        self.rng = random.Random(SEED)
        self.did: Counter[str] = Counter()
        self.until = asyncio.get_running_loop().time() + SECONDS

    @property
    def goes_on(self) -> bool:
        return asyncio.get_running_loop().time() < self.until

    async def pause(self, seconds: float) -> None:
        await asyncio.sleep(self.rng.random() * seconds)

    async def poster(self, thread: str) -> None:
        """Post again and again, here and there, sometimes twice with the same key, sometimes into a run."""
        while self.goes_on:
            count, pace = self.rng.randrange(1, 60), self.rng.choice([1, 5, 20])
            script = f"say 🎈\ncount {count} {pace}\nopen tool\ncount {count} {pace}"
            query = self.rng.choice(["", "", "?if_busy=interrupt"])
            key = f"key-{self.rng.randrange(10**9)}"
            for _ in range(self.rng.choice([1, 1, 1, 2])):
                headers = {"Idempotency-Key": key, **self.rng.choice(FORMS)}
                answer = await self.rng.choice(self.servers).post(thread, script, query=query, **headers)
                assert answer.status_code in (200, 201, 202, 409), answer.text
                self.did[f"posts {answer.status_code}"] += 1
                if answer.status_code == 202 and self.rng.random() < 0.3:
                    await self.pause(0.3)
                    cancelled = await self.rng.choice(self.servers).cancel(thread, answer.json()["id"])
                    assert cancelled.status_code == 200
                    self.did["cancels"] += 1
            await self.pause(0.2)

    async def cutter(self, viewers: list[Viewer]) -> None:
        """Have viewers leave in mid-word."""
        while self.goes_on:
            self.rng.choice(viewers).cut()
            self.did["viewers cut"] += 1
            await self.pause(0.05)

    async def killer(self) -> None:
        """Kill the servers' connections to Redis."""
        while self.goes_on:
            await self.pause(1.5)
            kind = self.rng.choice(KINDS)
            killed = await asyncio.to_thread(self.redis.command, "CLIENT", "KILL", "TYPE", kind)
            self.did[f"{kind} connections killed"] += int(killed.removeprefix(b":"))


async def test_after_random_kills_over_two_processes_nothing_is_lost_doubled_or_out_of_order(
    site: Site, redis: RedisServer
) -> None:
    a, b = await site.pair()
    agent = (await a.agent())["id"]
    threads = await asyncio.gather(*[a.thread(agent) for _ in range(THREADS)])
    views = {
        thread: [Viewer([a, b][:: 1 - 2 * (n % 2)], thread, door) for n, door in enumerate(DOORS)] for thread in threads
    }
    viewers = [viewer for some in views.values() for viewer in some]
    async with viewing(*viewers):
        soak = Soak([a, b], redis)
        async with asyncio.timeout(SECONDS + 30), asyncio.TaskGroup() as group:
            for thread in threads:
                group.create_task(soak.poster(thread))
            group.create_task(soak.cutter(viewers))
            group.create_task(soak.killer())
        await site.quiet(*threads)
        checked = await asyncio.gather(*[site.over(thread, *views[thread]) for thread in threads])
        for message in [message for messages in checked for message in messages if status(message)]:
            soak.did[f"runs {status(message)}"] += 1
    soak.did["events told"] = sum(len(viewer.frames) for viewer in viewers)
    soak.did["connections"] = sum(viewer.connections for viewer in viewers)
    soak.did["snapshots"] = sum(viewer.snapshots for viewer in viewers)
    print(dict(soak.did))  # noqa: T201
    for what in ("viewers cut", *[f"{kind} connections killed" for kind in KINDS]):
        assert soak.did[what] > 0
    assert soak.did["snapshots"] == len(viewers), "the log was never lost: whoever came back was told the rest"
