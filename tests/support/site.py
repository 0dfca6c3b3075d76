"""A site: several server processes on one MongoDB and one Redis, and what must hold when everything is over."""

from __future__ import annotations

import asyncio
import json
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
from pymongo import MongoClient
from redis.asyncio import Redis

from agent_chat.stores.events import TERMINAL_TYPES
from agent_chat.stores.models import new_id
from tests.support.scripted import FolderGates
from tests.support.servers import Process
from tests.support.thread_view import status
from tests.support.viewers import Viewer

SNAPSHOT_MESSAGES = 50


class LogEntry(msgspec.Struct):
    """One entry of a thread's log, as Redis stores it."""

    position: str
    event: dict[str, Any]


class Site:
    """Servers on one database and one log. `gates` are those of the scripted agents of all of them."""

    def __init__(self, folder: Path, mongo_url: str, redis_url: str, **environment: str) -> None:
        self.mongo_url = mongo_url
        self.redis_url = redis_url
        self.servers: list[Process] = []
        self._folder = folder
        self._environment = environment
        (folder / "gates").mkdir()
        self.gates = FolderGates(folder / "gates")
        self._mongo = MongoClient[dict[str, Any]](mongo_url)

    async def server(self, *, start: bool = True, **environment: str) -> Process:
        """One more server, with a data folder and a port of its own."""
        shared = {
            "CHAT_DATABASE_URL": self.mongo_url,
            "CHAT_EVENTS_URL": self.redis_url,
            "TEST_GATES": str(self._folder / "gates"),
        }
        folder = self._folder / "ABCDEFG"[len(self.servers)]
        self.servers.append(Process(folder, **{**shared, **self._environment, **environment}))
        if start:
            await self.servers[-1].start()
        return self.servers[-1]

    async def pair(self, **first: str) -> tuple[Process, Process]:
        """Two servers; `first` are further settings of the first."""
        a, b = await self.server(start=False, **first), await self.server(start=False)
        await asyncio.gather(a.start(), b.start())
        return a, b

    async def close(self) -> None:
        for server in self.servers:
            await server.http.aclose()
            await server.kill()
        self._mongo.close()

    async def at_rest(self) -> None:
        """Wait until no living server has a run, a stream, a task or a subscription left."""
        living = [server for server in self.servers if server.alive]
        for server in living:
            server.signal(signal.SIGUSR1)
        for server in living:
            await _comes(server.extra_tasks, {})
            assert await server.metric("chat_streams_open") == 0
            assert await server.metric("chat_runs_in_progress") == 0
        subscribed = {"chat:signals": len(living)} if living else {}
        await _comes(self._subscribers, subscribed)

    async def _subscribers(self) -> dict[str, int]:
        """How many processes have subscribed to each channel."""
        async with Redis.from_url(self.redis_url, decode_responses=True) as client:
            channels = await client.pubsub_channels("chat:*")
            return {str(name): count for name, count in await client.pubsub_numsub(*channels)} if channels else {}

    async def log(self, thread: str) -> list[LogEntry]:
        """All entries of the thread's log."""
        async with Redis.from_url(self.redis_url) as client:
            key = f"chat:{thread.rpartition('/')[2]}"
            rows = cast(list[tuple[bytes, dict[bytes, bytes]]], await client.xrange(key))
        return [LogEntry(position.decode(), json.loads(fields[b"d"])) for position, fields in rows]

    def records(self) -> list[dict[str, Any]]:
        """The records of runs in progress, of every thread."""
        return list(self._mongo.get_default_database().runs.find({}, {"partial": 0}))

    async def over(self, thread: str, *viewers: Viewer, lost: bool = False) -> list[dict[str, Any]]:
        """Check what must hold when everything is over; the stored messages without the last turn, which this posts.

        `lost`: the log was emptied meanwhile, so it has fewer entries than were published.
        """
        living = [server for server in self.servers if server.alive]
        mark = new_id()
        last = await living[-1].post(thread, f"say {mark}")
        assert (last.status_code, last.json()["content"]) == (201, mark), last.text
        run = last.json()["id"]
        for viewer in viewers:
            await viewer.finishes(run)
        stored: list[dict[str, Any]] = (await living[0].get(thread, message_limit=100))["messages"]
        assert not [message for message in stored if status(message) == "in_progress"]
        answers = {message["id"] for message in stored if status(message)}
        told = await self.log(thread)
        if not lost:  # a message is stored before its terminal event is published
            async with asyncio.timeout(20):
                while not answers <= set(_ended(told)):
                    await asyncio.sleep(0.05)
                    told = await self.log(thread)
            for viewer in viewers:
                for answer in answers & viewer.view.messages.keys():
                    await viewer.finishes(answer)
        for viewer in viewers:
            shown = viewer.view.listed()[-len(stored) :]
            assert shown == stored[-len(shown) :]
            assert len(shown) >= min(len(stored), SNAPSHOT_MESSAGES)
            _once_and_in_order(viewer, [entry.position for entry in told], lost)
        assert set(_ended(told).values()) == {1}, "each run has one terminal event"
        await self.quiet(thread)
        return stored[:-2]

    async def quiet(self, *threads: str) -> None:
        """Wait until the database has no record of a run of these threads."""
        ids = {thread.rpartition("/")[2] for thread in threads}
        async with asyncio.timeout(20):
            while [run for run in await asyncio.to_thread(self.records) if run["thread_id"] in ids]:  # noqa: ASYNC110
                await asyncio.sleep(0.05)


async def _comes(ask: Callable[[], Awaitable[dict[str, int]]], what: dict[str, int]) -> None:
    """Poll until the result is as expected, for at most ten seconds."""
    until = asyncio.get_running_loop().time() + 10
    while (answer := await ask()) != what:
        assert asyncio.get_running_loop().time() < until, answer
        await asyncio.sleep(0.02)


def _ended(log: Sequence[LogEntry]) -> Counter[str]:
    """How many terminal events each message has."""
    return Counter(entry.event["message"]["id"] for entry in log if entry.event["type"] in TERMINAL_TYPES)


def _once_and_in_order(viewer: Viewer, log: Sequence[str], lost: bool) -> None:
    """Check that each stretch of the viewer equals the part of the log behind the stretch's beginning."""
    order = {position: n for n, position in enumerate(log)}
    said = [position for stretch in viewer.stretches for position in stretch.positions]
    assert len(set(said)) == len(said), "an event was told twice"
    for stretch in viewer.stretches:
        if (begin := order.get(stretch.after)) is not None:
            assert stretch.positions == list(log[begin + 1 : begin + 1 + len(stretch.positions)])
        else:
            assert lost, f"{stretch.after} is not in the log"


@asynccontextmanager
async def opened_site(folder: Path, mongo_url: str, redis_url: str, **environment: str) -> AsyncIterator[Site]:
    site = Site(folder, mongo_url, redis_url, **environment)
    try:
        yield site
        await site.at_rest()
    finally:
        await site.close()
