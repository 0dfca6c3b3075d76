"""MongoDB goes and comes back: runs go on, nothing is said that is not stored, and nobody is mistaken for dead.

Leases last two seconds here and the driver waits for one, not twenty and five: the shorter stays the shorter.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Literal

import pytest

from stores.models import new_id
from tests.journeys.shapes import is_problem
from tests.journeys.viewing import status
from tests.processes.site import Nursery, Site, opened_site
from tests.processes.viewers import DOORS, Viewer, viewing
from tests.services_mongo import MongoServer, mongo_process

LEASE_SECONDS = 2.0
OPTIONS = "timeoutMS=1000"

Outage = Literal["killed", "paused"]
OUTAGES: tuple[Outage, ...] = ("killed", "paused")


@pytest.fixture(scope="module")
def mongo() -> Iterator[MongoServer]:
    with mongo_process(durable=True) as server:
        yield server


@pytest.fixture
async def site(tmp_path: Path, nursery: Nursery, mongo: MongoServer, redis_url: str) -> AsyncIterator[Site]:
    """One with a MongoDB that may be broken, if it is mended again."""
    url = f"{mongo.url}/test-{new_id()}?{OPTIONS}"
    async with opened_site(tmp_path, nursery, url, redis_url, CHAT_TEST_LEASE=str(LEASE_SECONDS)) as site:
        yield site


async def go(mongo: MongoServer, outage: Outage) -> None:
    if outage == "killed":
        await asyncio.to_thread(mongo.stop, kill=True)
    else:
        mongo.pause()


async def come(mongo: MongoServer, outage: Outage) -> None:
    if outage == "killed":
        await asyncio.to_thread(mongo.start)
    else:
        mongo.resume()


@pytest.mark.parametrize("outage", OUTAGES)
async def test_a_run_outlives_an_outage_that_outlasts_its_lease(site: Site, mongo: MongoServer, outage: Outage) -> None:
    a, b = await site.pair()
    thread = await a.scripted_thread()
    viewers = [Viewer([server], thread, door) for server in (a, b) for door in DOORS]
    async with viewing(*viewers):
        run = await a.begin(thread, "say begun\nhold on\nsay on\nopen oven\ncount 20 10\nhold off\nsay done")
        for viewer in viewers:
            await viewer.reads(run, "begun")
        await go(mongo, outage)
        try:
            gone = time.monotonic()
            site.release("on")
            for viewer in viewers:
                await viewer.reads(run, "18 19")  # it goes on, and they see it
            refused = await asyncio.gather(
                b.http.get(thread), b.post(thread, "say no"), b.http.post(f"{thread}/messages/{run}/cancel")
            )
            for answer in refused:
                is_problem(answer, 503, "store_unavailable")
                assert answer.headers["retry-after"]
            ready = await a.http.get("/readyz")
            assert (ready.status_code, ready.json()["database"]) == (503, False)
            await asyncio.sleep(gone + LEASE_SECONDS * 1.5 - time.monotonic())
        finally:
            await come(mongo, outage)
        site.release("off")
        for viewer in viewers:
            assert (await viewer.sees("run.completed")).data["message"]["content"].endswith("done")
        messages = await site.over(thread, *viewers)
    assert [status(message) for message in messages] == [None, "completed"]


@pytest.mark.parametrize("outage", OUTAGES)
async def test_an_end_that_can_not_be_stored_yet_is_not_said_yet(
    site: Site, mongo: MongoServer, outage: Outage
) -> None:
    a, b = await site.pair()
    thread = await a.scripted_thread()
    viewers = [Viewer([server], thread, door) for server in (a, b) for door in DOORS]
    script, key = "say begun\nhold on\nsay done", {"Idempotency-Key": "k"}
    async with viewing(*viewers):
        waiting = asyncio.create_task(a.post(thread, script, **key))
        run = (await viewers[0].sees("run.started")).data["message"]["id"]
        for viewer in viewers:
            await viewer.reads(run, "begun")
        await go(mongo, outage)
        try:
            site.release("on")
            for viewer in viewers:
                await viewer.reads(run, "done")
            ended = [asyncio.create_task(viewer.ends(run)) for viewer in viewers]
            done, _ = await asyncio.wait(ended, timeout=LEASE_SECONDS)
            assert not done
        finally:
            await come(mongo, outage)
        await asyncio.gather(*ended)
        messages = await site.over(thread, *viewers)
    assert (messages[-1]["content"], status(messages[-1])) == ("begundone", "completed")
    assert (await waiting).json() == messages[-1]


async def test_a_client_that_waits_is_told_where_to_look_when_the_database_stays_away(
    site: Site, mongo: MongoServer
) -> None:
    a, b = await site.pair()
    thread = await a.scripted_thread()
    script, key = "say begun\nhold on\nsay done", {"Idempotency-Key": "k"}
    waiting = asyncio.create_task(a.post(thread, script, **key))
    await site.reached("on")
    await go(mongo, "killed")
    try:
        site.release("on")
        told = is_problem(await waiting, 503, "store_unavailable", "thread_id", "message_id", "retryable")
        assert told["thread_id"] == thread.rpartition("/")[2]
    finally:
        await come(mongo, "killed")
    kept = await b.finished(thread, told["message_id"])
    assert (kept["content"], status(kept)) == ("begundone", "completed")
    assert (await b.post(thread, script, **key)).json() == kept
    await site.over(thread)


async def test_after_an_outage_the_dead_are_ended_and_the_living_are_not(site: Site, mongo: MongoServer) -> None:
    a, b = await site.pair()
    c = await site.server()
    agent = (await a.agent())["id"]
    dead, living = await a.thread(agent), await a.thread(agent)
    viewers = [Viewer([c], dead, "sse"), Viewer([c], living, "ws")]
    async with viewing(*viewers):
        runs = [await a.begin(dead, "say half\nhold never"), await b.begin(living, "say half\nhold on\nsay whole")]
        for viewer, run in zip(viewers, runs, strict=True):
            await viewer.reads(run, "half")
        await a.kill()
        await go(mongo, "paused")
        try:
            await asyncio.sleep(LEASE_SECONDS * 1.5)
        finally:
            await come(mongo, "paused")
        await viewers[0].sees("run.failed")
        site.release("on")
        await viewers[1].sees("run.completed")
        for viewer, thread in zip(viewers, (dead, living), strict=True):
            await site.over(thread, viewer)
