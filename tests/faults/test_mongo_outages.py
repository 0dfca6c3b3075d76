"""Outages of MongoDB: runs continue, nothing is published before it is stored, and no living process is taken for dead.

Leases last two seconds here and the driver waits for one, not twenty and five: the shorter stays the shorter. Several
scenes share an outage: each yields when it is begun, and again when it has seen what there is to see in the outage.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Literal

import pytest

from agent_chat.stores.models import new_id
from tests.support.mongo_server import MongoServer, mongo_process
from tests.support.shapes import is_problem
from tests.support.site import Site, opened_site
from tests.support.thread_view import status
from tests.support.viewers import DOORS, Viewer, viewing

LEASE_SECONDS = 2.0
OPTIONS = "timeoutMS=1000"

Outage = Literal["killed", "paused"]
OUTAGES: tuple[Outage, ...] = ("killed", "paused")


@pytest.fixture(scope="module")
def mongo() -> Iterator[MongoServer]:
    with mongo_process(durable=True) as server:
        yield server


@pytest.fixture
async def site(tmp_path: Path, mongo: MongoServer, redis_url: str) -> AsyncIterator[Site]:
    """One with a MongoDB that may be broken, if it is mended again."""
    url = f"{mongo.url}/test-{new_id()}?{OPTIONS}"
    async with opened_site(tmp_path, url, redis_url, TEST_LEASE=str(LEASE_SECONDS)) as site:
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


Scene = AsyncGenerator[None, None]


async def next_act(scenes: list[Scene]) -> None:
    async def act(scene: Scene) -> None:
        await anext(scene, None)

    async with asyncio.TaskGroup() as group:
        for scene in scenes:
            group.create_task(act(scene))


@pytest.mark.parametrize("outage", OUTAGES)
async def test_in_an_outage_longer_than_the_leases_only_runs_of_dead_processes_end_and_all_published_text_is_stored(
    site: Site, mongo: MongoServer, outage: Outage
) -> None:
    servers = [await site.server(start=False, **of) for of in ({}, {"TEST_PATIENCE": "30"}, {})]
    await asyncio.gather(*[server.start() for server in servers])
    agent = (await servers[0].agent())["id"]
    async with AsyncExitStack() as stack:
        scenes: list[Scene] = []
        for scene in (a_run_goes_on, an_end_is_not_said_before_it_is_stored, a_client_is_told_where_to_look, one_dies):
            scenes.append(scene(site, await servers[0].thread(agent)))
            await stack.enter_async_context(aclosing(scenes[-1]))
        await next_act(scenes)
        await go(mongo, outage)
        try:
            gone = time.monotonic()
            await next_act(scenes)
            await asyncio.sleep(gone + LEASE_SECONDS * 1.5 - time.monotonic())
        finally:
            await come(mongo, outage)
        await next_act(scenes)


async def a_run_goes_on(site: Site, thread: str) -> Scene:
    a, b, _ = site.servers
    viewers = [Viewer([server], thread, door) for server in (a, b) for door in DOORS]
    async with viewing(*viewers):
        run = await a.start_run(thread, "say begun\nopen oven\nhold on\nsay on\ncount 20 10\nhold off\nsay done")
        for viewer in viewers:
            await viewer.reads(run, "begun")
        await site.gates.reached("on")  # the call is stored: the run waits for the database with it, with nothing else
        yield
        site.gates.release("on")
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
        yield
        site.gates.release("off")
        for viewer in viewers:
            assert (await viewer.sees("run.completed")).data["message"]["content"].endswith("done")
        messages = await site.over(thread, *viewers)
    assert [status(message) for message in messages] == [None, "completed"]


async def an_end_is_not_said_before_it_is_stored(site: Site, thread: str) -> Scene:
    """The client waits at a server that is patient."""
    a, b, _ = site.servers
    viewers = [Viewer([server], thread, door) for server in (a, b) for door in DOORS]
    async with viewing(*viewers):
        waiting = asyncio.create_task(b.post(thread, "say begun\nhold end\nsay done"))
        run = (await viewers[0].sees("run.started")).data["message"]["id"]
        for viewer in viewers:
            await viewer.reads(run, "begun")
        yield
        site.gates.release("end")
        for viewer in viewers:
            await viewer.reads(run, "done")
        await asyncio.sleep(LEASE_SECONDS)
        for viewer in viewers:
            assert not viewer.terminals()
        yield
        for viewer in viewers:
            await viewer.finishes(run)
        messages = await site.over(thread, *viewers)
    assert (messages[-1]["content"], status(messages[-1])) == ("begundone", "completed")
    assert (await waiting).json() == messages[-1]


async def a_client_is_told_where_to_look(site: Site, thread: str) -> Scene:
    a, b, _ = site.servers
    script, key = "say begun\nhold told\nsay done", {"Idempotency-Key": "k"}
    waiting = asyncio.create_task(a.post(thread, script, **key))
    await site.gates.reached("told")
    yield
    site.gates.release("told")
    told = is_problem(await waiting, 503, "store_unavailable", "thread_id", "message_id", "retryable")
    assert told["thread_id"] == thread.rpartition("/")[2]
    yield
    kept = await b.finished(thread, told["message_id"])
    assert (kept["content"], status(kept)) == ("begundone", "completed")
    assert (await b.post(thread, script, **key)).json() == kept
    await site.over(thread)


async def one_dies(site: Site, thread: str) -> Scene:
    _, b, c = site.servers
    viewer = Viewer([b], thread, "sse")
    async with viewing(viewer):
        run = await c.start_run(thread, "say half\nhold never")
        await viewer.reads(run, "half")
        await c.kill()
        yield
        yield
        ending = await viewer.sees("run.failed")
        assert ending.data["error"]["code"] == "interrupted"
        await site.over(thread, viewer)
