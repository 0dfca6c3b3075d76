"""Redis breaks in mid-run: viewers get everything, or a snapshot and then everything, and no run waits for it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.proxy import PubSubProxy
from tests.support.services import RedisServer, redis_process
from tests.support.site import Site, opened_site
from tests.support.thread_view import status
from tests.support.viewers import DOORS, Viewer, viewing

SCRIPT = "say begun\ncount 40 5\nhold on\nsay held\nopen oven\ncount 40 5\nsay done"
COUNTED = "".join(f"{n} " for n in range(40))
WHOLE = f"begun{COUNTED}held\n\n{COUNTED}done"


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with redis_process() as server:
        yield server


@pytest.fixture
async def site(tmp_path: Path, mongo_url: str, redis: RedisServer) -> AsyncIterator[Site]:
    """One with a Redis of its own, to break."""
    async with opened_site(tmp_path, mongo_url, redis.url) as site:
        yield site


def _restart(redis: RedisServer) -> None:
    redis.stop()
    redis.start()


FAULTS: dict[str, tuple[Callable[[RedisServer], object], bool]] = {
    "connections_killed": (lambda redis: redis.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"), False),
    "subscriptions_killed": (lambda redis: redis.command("CLIENT", "KILL", "TYPE", "pubsub"), False),
    "emptied": (lambda redis: redis.command("FLUSHALL"), True),
    "restarted_empty": (_restart, True),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_after_a_fault_every_viewer_puts_the_whole_answer_together(
    site: Site, redis: RedisServer, fault: str
) -> None:
    strike, lost = FAULTS[fault]
    a, b = await site.pair()
    thread = await a.scripted_thread()
    viewers = [Viewer([server], thread, door) for server in (a, b) for door in DOORS]
    async with viewing(*viewers):
        run = await a.start_run(thread, SCRIPT)
        for viewer in viewers:
            await viewer.reads(run, "5 6 7")
        strike(redis)  # while it talks
        await site.gates.reached("on")
        strike(redis)  # while it is silent
        site.gates.release("on")
        for viewer in viewers:
            await viewer.shows(lambda view: status(view.messages[run]) == "completed")
        messages = await site.over(thread, *viewers, lost=lost)
    assert (messages[-1]["content"], messages[-1]["tool_calls"][0]["tool_name"]) == (WHOLE, "oven")
    if not lost:
        assert [viewer.snapshots for viewer in viewers] == [1] * len(viewers)


@pytest.mark.parametrize("lost", [True, False], ids=["stopped", "paused"])
async def test_while_redis_is_down_runs_are_answered_and_afterwards_viewers_have_everything(
    site: Site, redis: RedisServer, lost: bool
) -> None:
    a, b = await site.pair()
    agent = (await a.agent())["id"]
    thread, other, third = [await a.thread(agent) for _ in range(3)]
    viewers = [Viewer([server], thread, door) for server in (a, b) for door in DOORS]
    watching = Viewer([b], other, "sse")
    async with viewing(*viewers, watching):
        run = await a.start_run(thread, SCRIPT)
        for viewer in viewers:
            await viewer.reads(run, "5 6 7")
        redis.stop() if lost else redis.pause()
        await site.gates.reached("on")
        site.gates.release("on")
        began = time.monotonic()
        answers = await asyncio.gather(b.post(other, "say 1\ncount 20 1"), a.post(third, "say 2"))
        assert [answer.status_code for answer in answers] == [201, 201]
        assert time.monotonic() - began < 6
        began = time.monotonic()
        assert (await a.post(third, "say again")).status_code == 201
        assert time.monotonic() - began < 4, "a Redis that is known to be away is not waited for"
        await b.finished(thread, run)
        for server in (a, b):
            async with asyncio.timeout(10):
                while (ready := await server.http.get("/readyz")).json()["events"]:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            assert (ready.status_code, ready.json()["ready"]) == (200, True)
        late = Viewer([b], thread, "sse")
        redis.start() if lost else redis.resume()
        async with viewing(late):
            for viewer in (*viewers, late):
                await viewer.shows(lambda view: status(view.messages[run]) == "completed")
            messages = await site.over(thread, *viewers, late, lost=lost)
            await site.over(other, watching, lost=lost)
    assert messages[-1]["content"] == WHOLE
    await site.quiet(thread, other, third)


@pytest.mark.alone
async def test_no_request_waits_for_a_hanging_redis_twice(site: Site, redis: RedisServer) -> None:
    a = await site.server()
    agent = (await a.agent())["id"]
    threads = [await a.thread(agent) for _ in range(3)]

    async def took(posting: Awaitable[httpx.Response]) -> float:
        began = time.monotonic()
        answer = await posting
        assert answer.status_code == 201, answer.text
        return time.monotonic() - began

    running = await a.start_run(threads[2], "hold forever")
    redis.pause()
    assert await took(a.post(threads[0], "say 1")) < 1.5, "an answer of this process needs no log"
    began = time.monotonic()
    cancelled = await a.cancel(threads[2], running)
    assert status(cancelled.json()) == "cancelled"
    assert time.monotonic() - began < 3.5
    began = time.monotonic()
    async with a.http.stream("POST", f"{threads[1]}/messages?stream=true", json={"content": "say 2"}) as stream:
        assert stream.status_code == 200
        assert time.monotonic() - began < 1.5, "it is known to hang by now"
        redis.resume()
        async with asyncio.timeout(20):
            async for line in stream.aiter_lines():
                if line == "event: run.completed":
                    break
    assert [status(await a.finished(threads[2], running))] == ["cancelled"]


async def test_messages_of_pubsub_that_are_dropped_and_doubled_reach_every_viewer_once_and_in_order(
    tmp_path: Path, mongo_url: str, redis: RedisServer
) -> None:
    """No connection breaks: a lost message is detected by its successor, the last one by the next refill."""
    async with PubSubProxy(redis.port, random.Random(1)) as proxy:
        site_of = {"CHAT_EVENTS_URL": proxy.url, "TEST_REFILL": "0.5"}
        async with opened_site(tmp_path, mongo_url, redis.url, **site_of) as site:
            a, b = await site.pair()
            agent = (await a.agent())["id"]
            threads = [await a.thread(agent) for _ in range(3)]
            viewers = {
                thread: [Viewer([server], thread, door) for server in (a, b) for door in DOORS] for thread in threads
            }
            async with viewing(*[viewer for some in viewers.values() for viewer in some]):
                proxy.chance = 0.3
                posts = [server.post(thread, SCRIPT) for server, thread in zip((a, b, a), threads, strict=True)]
                answered = asyncio.gather(*posts)
                await site.gates.reached("on")
                site.gates.release("on")
                assert [answer.json()["content"] for answer in await answered] == [WHOLE] * 3
                for thread, some in viewers.items():
                    messages = await site.over(thread, *some)
                    assert (messages[-1]["content"], status(messages[-1])) == (WHOLE, "completed")
                    assert [viewer.snapshots for viewer in some] == [1] * len(some)
    assert min(proxy.passed, proxy.dropped, proxy.doubled) > 10
