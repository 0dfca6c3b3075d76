"""A site: server processes on one MongoDB and one Redis, and what must be so whenever everything is over."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import msgspec
from pymongo import MongoClient
from redis.asyncio import Redis

from agent_chat.stores.events import TERMINAL_TYPES
from agent_chat.stores.models import new_id
from tests.support.live import KEY, Client
from tests.support.services import free_port
from tests.support.viewers import Viewer
from tests.support.viewing import status

START_SECONDS = 20.0
SNAPSHOT_MESSAGES = 50


class Nursery:
    """Forks servers off one process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def fork(self, environment: dict[str, str]) -> int:
        """Begin a server; its process id."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(environment).encode() + b"\n")
            self._process.stdin.flush()
            return int(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def opened_nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    try:
        yield nursery
    finally:
        nursery.close()


class Server(Client):
    """One server process, and a client of it."""

    def __init__(self, nursery: Nursery, port: int, environment: dict[str, str]) -> None:
        # not as Client makes it: that has fewer connections, and reads the certificates of the machine, which is slow
        self.http = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}",
            headers={"Authorization": f"Bearer {KEY}"},
            timeout=60,
            verify=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
        )
        self.url = f"http://127.0.0.1:{port}"
        self.alive = False
        self._nursery = nursery
        self._environment = environment
        self._pid = 0

    async def start(self) -> None:
        """Start it, and wait until it listens."""
        self._pid = await asyncio.to_thread(self._nursery.fork, self._environment)
        self._end = os.pidfd_open(self._pid)
        self.alive = True
        ended = asyncio.create_task(self.ended())
        listening = asyncio.create_task(self._listens())
        try:
            async with asyncio.timeout(START_SECONDS):
                await asyncio.wait({ended, listening}, return_when=asyncio.FIRST_COMPLETED)
            assert listening.done(), self.output()
        finally:
            ended.cancel()
            listening.cancel()

    async def _listens(self) -> None:
        while "Listening" not in self.output():  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    def output(self) -> str:
        """What it has said, on stdout and stderr."""
        file = Path(self._environment["CHAT_TEST_OUTPUT"])
        return file.read_text() if file.exists() else ""

    def signal(self, how: signal.Signals) -> None:
        os.kill(self._pid, how)

    async def ended(self) -> None:
        """Wait for its end."""
        if self.alive:
            loop = asyncio.get_running_loop()
            end = asyncio.Event()
            loop.add_reader(self._end, end.set)
            try:
                await end.wait()
            finally:
                loop.remove_reader(self._end)
            self.alive = False
            os.close(self._end)

    async def kill(self) -> None:
        """`kill -9`."""
        if self.alive:
            self.signal(signal.SIGKILL)
            async with asyncio.timeout(10):
                await self.ended()

    async def number(self, metric: str) -> float:
        """One of its metrics; 0 while nothing was counted."""
        lines = (await self.http.get("/metrics")).text.splitlines()
        return float(next((line.rpartition(" ")[2] for line in lines if line.startswith(f"{metric} ")), 0))

    async def comes_to(self, metric: str, value: float) -> None:
        """Wait until one of its metrics has that value."""
        async with asyncio.timeout(10):
            while await self.number(metric) != value:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def drains(self) -> None:
        """Wait until it says that it is stopping."""
        async with asyncio.timeout(10):
            while not (await self.http.get("/readyz")).json()["draining"]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def left(self) -> dict[str, int]:
        """Its tasks beside those that it always has."""
        return dict(await self.get("/left"))

    async def post(self, thread: str, content: str, *, query: str = "", **headers: str) -> httpx.Response:
        return await self.http.post(f"{thread}/messages{query}", json={"content": content}, headers=headers)

    async def begin(self, thread: str, script: str, **headers: str) -> str:
        """Start a run and don't wait for its answer; its id."""
        answer = await self.post(thread, script, Prefer="respond-async", **headers)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    async def finished(self, thread: str, run: str) -> dict[str, Any]:
        """The run's message once the database has it finished; no log is needed to tell."""
        async with asyncio.timeout(20):
            while status(message := await self.get(f"{thread}/messages/{run}")) == "in_progress":  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        return dict(message)

    async def cancel(self, thread: str, run: str) -> httpx.Response:
        return await self.http.post(f"{thread}/messages/{run}/cancel")


class Told(msgspec.Struct):
    """One entry of a thread's log, as it lies in Redis."""

    position: str
    event: dict[str, Any]


class Site:
    """Servers on one database and one log."""

    def __init__(self, folder: Path, nursery: Nursery, mongo_url: str, redis_url: str, **environment: str) -> None:
        self.mongo_url = mongo_url
        self.redis_url = redis_url
        self.servers: list[Server] = []
        self._folder = folder
        self._nursery = nursery
        self._environment = environment
        self.gates = folder / "gates"
        self.gates.mkdir()
        self._mongo = MongoClient[dict[str, Any]](mongo_url)

    async def server(self, *, start: bool = True, **environment: str) -> Server:
        """One more server, with a data folder and a port of its own."""
        name = "ABCDEFG"[len(self.servers)]
        port = int(environment.get("PORT") or free_port())
        server = Server(
            self._nursery,
            port,
            {
                "CHAT_DATA_DIR": str(self._folder / name),
                "CHAT_API_KEY": KEY,
                "CHAT_METRICS_TOKEN": KEY,  # so that one client reads both
                "PORT": str(port),
                "CHAT_DATABASE_URL": self.mongo_url,
                "CHAT_EVENTS_URL": self.redis_url,
                "CHAT_TEST_GATES": str(self.gates),
                "CHAT_TEST_OUTPUT": str(self._folder / f"{name}.output"),
                **self._environment,
                **environment,
            },
        )
        self.servers.append(server)
        if start:
            await server.start()
        return server

    async def pair(self, **first: str) -> tuple[Server, Server]:
        """A, with settings of its own, and B."""
        a, b = await self.server(start=False, **first), await self.server(start=False)
        await asyncio.gather(a.start(), b.start())
        return a, b

    async def close(self) -> None:
        for server in self.servers:
            await server.http.aclose()
            await server.kill()
        self._mongo.close()

    async def at_rest(self) -> None:
        """Wait until no living server has a run, a stream, a task or a subscription of anybody left."""
        living = [server for server in self.servers if server.alive]
        for server in living:
            server.signal(signal.SIGUSR1)
        for server in living:
            await _comes(server.left, {})
            assert await server.number("chat_streams_open") == 0
            assert await server.number("chat_runs_in_progress") == 0
        subscribed = {"chat:signals": len(living)} if living else {}
        await _comes(self._subscribers, subscribed)

    async def _subscribers(self) -> dict[str, int]:
        """How many processes have subscribed to each channel."""
        async with Redis.from_url(self.redis_url, decode_responses=True) as client:
            channels = await client.pubsub_channels("chat:*")
            return {str(name): count for name, count in await client.pubsub_numsub(*channels)} if channels else {}

    async def reached(self, gate: str) -> None:
        """Wait until a script holds there."""
        async with asyncio.timeout(20):
            while not (self.gates / f"{gate}.reached").exists():  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    def release(self, gate: str) -> None:
        (self.gates / f"{gate}.released").touch()

    async def log(self, thread: str) -> list[Told]:
        """All that the thread's log holds."""
        async with Redis.from_url(self.redis_url) as client:
            key = f"chat:{thread.rpartition('/')[2]}"
            rows = cast(list[tuple[bytes, dict[bytes, bytes]]], await client.xrange(key))
        return [Told(position.decode(), json.loads(fields[b"d"])) for position, fields in rows]

    def records(self) -> list[dict[str, Any]]:
        """The records of runs in progress, of every thread."""
        return list(self._mongo.get_default_database().runs.find({}, {"partial": 0}))

    async def over(self, thread: str, *viewers: Viewer, lost: bool = False) -> list[dict[str, Any]]:
        """Check all that must be so when everything is over; the stored messages before the last, which this posts.

        `lost`: the log was emptied meanwhile, so that it tells less than was said.
        """
        living = [server for server in self.servers if server.alive]
        mark = new_id()
        last = await living[-1].post(thread, f"say {mark}")
        assert (last.status_code, last.json()["content"]) == (201, mark), last.text
        run = last.json()["id"]
        for viewer in viewers:
            await viewer.ends(run)
        stored: list[dict[str, Any]] = (await living[0].get(thread, message_limit=100))["messages"]
        assert not [message for message in stored if status(message) == "in_progress"]
        told = await self.log(thread)
        for viewer in viewers:
            shown = viewer.view.listed()[-len(stored) :]
            assert shown == stored[-len(shown) :]
            assert len(shown) >= min(len(stored), SNAPSHOT_MESSAGES)
            _once_and_in_order(viewer, [entry.position for entry in told], lost)
        ends = Counter(entry.event["message"]["id"] for entry in told if entry.event["type"] in TERMINAL_TYPES)
        answers = {message["id"] for message in stored if status(message)}
        assert set(ends.values()) == {1}, "each run has one terminal event"
        assert lost or answers <= set(ends)
        await self.quiet(thread)
        return stored[:-2]

    async def quiet(self, *threads: str) -> None:
        """Wait until no run is left of these threads, in no process and not in the database."""
        ids = {thread.rpartition("/")[2] for thread in threads}
        async with asyncio.timeout(20):
            while [run for run in await asyncio.to_thread(self.records) if run["thread_id"] in ids]:  # noqa: ASYNC110
                await asyncio.sleep(0.05)


async def _comes(ask: Callable[[], Awaitable[dict[str, int]]], what: dict[str, int]) -> None:
    """Ask until that is the answer, ten seconds long."""
    until = asyncio.get_running_loop().time() + 10
    while (answer := await ask()) != what:
        assert asyncio.get_running_loop().time() < until, answer
        await asyncio.sleep(0.02)


def _once_and_in_order(viewer: Viewer, log: Sequence[str], lost: bool) -> None:
    """Every stretch that the viewer was told is what the log holds behind the stretch's beginning."""
    order = {position: n for n, position in enumerate(log)}
    said = [position for stretch in viewer.stretches for position in stretch.positions]
    assert len(set(said)) == len(said), "an event was told twice"
    for stretch in viewer.stretches:
        if (begin := order.get(stretch.after)) is not None:
            assert stretch.positions == list(log[begin + 1 : begin + 1 + len(stretch.positions)])
        else:
            assert lost, f"{stretch.after} is not in the log"


@asynccontextmanager
async def opened_site(
    folder: Path, nursery: Nursery, mongo_url: str, redis_url: str, **environment: str
) -> AsyncIterator[Site]:
    site = Site(folder, nursery, mongo_url, redis_url, **environment)
    try:
        yield site
        await site.at_rest()
    finally:
        await site.close()
