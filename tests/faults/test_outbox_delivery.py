"""Facts that start no run reach the watchers of other processes, even if a process dies or Redis is unreachable."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.servers import Process
from tests.support.services import RedisServer, redis_process
from tests.support.site import Site, opened_site
from tests.support.viewers import Viewer, viewing


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with redis_process() as server:
        yield server


@pytest.fixture
async def site(tmp_path: Path, mongo_url: str, redis: RedisServer) -> AsyncIterator[Site]:
    """One with a Redis of its own, to break, and with leases of two seconds."""
    async with opened_site(tmp_path, mongo_url, redis.url, TEST_LEASE="2") as site:
        yield site


async def _note(server: Process, thread: str, content: str, **headers: str) -> httpx.Response:
    """Store a system message, which starts no run."""
    body = {"role": "system", "content": content}
    return await server.http.post(f"{thread}/messages", json=body, headers=headers)


async def test_facts_acknowledged_while_redis_hangs_reach_watchers_though_their_process_is_killed(
    site: Site, redis: RedisServer
) -> None:
    a, b = await site.pair()
    agent = (await a.agent())["id"]
    noted, renamed, deleted = [await a.thread(agent) for _ in range(3)]
    watchers = {thread: Viewer([b], thread, "sse") for thread in (noted, renamed, deleted)}
    async with viewing(*watchers.values()):
        redis.pause()
        for number in range(3):
            assert (await _note(a, noted, f"note {number}")).status_code == 201
        assert (await a.http.patch(renamed, json={"title": "first"})).status_code == 200
        assert (await a.http.patch(renamed, json={"title": "second", "archived": True})).status_code == 200
        assert (await a.http.delete(deleted)).status_code == 204
        await a.kill()
        redis.resume()
        resumed = time.monotonic()
        await watchers[noted].shows(lambda view: len(view.messages) == 3)
        await watchers[renamed].shows(lambda view: view.thread["title"] == "second" and view.thread["archived"])
        await watchers[deleted].shows(lambda view: view.deleted)
        assert time.monotonic() - resumed < 10
        created = [frame.data["message"] for frame in watchers[noted].frames if frame.event == "message.created"]
        order = dict.fromkeys(message["content"] for message in created)  # A may have sent the first before it died
        assert list(order) == ["note 0", "note 1", "note 2"]
        assert [viewer.snapshots for viewer in watchers.values()] == [1, 1, 1]


async def test_a_replay_publishes_what_the_first_attempt_could_not(site: Site, redis: RedisServer) -> None:
    """B is the only living process, and its sweeper would publish it too: the replay must not wait for that."""
    a, b = await site.pair()
    thread = await a.thread((await a.agent())["id"])
    watcher = Viewer([b], thread, "sse")
    async with viewing(watcher):
        redis.pause()
        key = {"Idempotency-Key": "k"}
        first = await _note(a, thread, "once", **key)
        await a.kill()
        again = await _note(b, thread, "once", **key)
        redis.resume()
        assert (again.status_code, again.headers["Idempotency-Replayed"]) == (201, "true")
        assert again.json() == first.json()
        await watcher.sees("message.created", lambda data: bool(data["message"]["content"] == "once"))
