"""`python -m tests.bench.soak embedded|shared [SECONDS]`: fifty clients, and servers that are killed under them.

Each client has a thread of its own: it posts (JSON, 202, SSE), stores messages, renames, cancels, and repeats what was
not acknowledged with the same Idempotency-Key; a viewer follows the thread over SSE or WebSocket and is cut off now and
then. For two fifths of the time a server is killed by `kill -9` and started again every few seconds; after that nothing
is killed, and once the bound of the events in memory is reached the servers' memory may not grow any more. `embedded`
is one server on SQLite, `shared` two on MongoDB's wire protocol and Redis. BENCH_SEED (1) says which run this is.

Checked at the end: every acknowledged message is stored exactly once, every run has ended, every thread takes another
message, every viewer holds the stored thread. Exit status 1 if not.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.support.client import frames
from tests.support.mongo_server import mongo_process
from tests.support.servers import Process
from tests.support.services import redis_process
from tests.support.thread_view import status
from tests.support.viewers import DOORS, Viewer

CLIENTS = 50
SEED = int(os.environ.get("BENCH_SEED", "1"))
EVENTS_MEGABYTES = 16
_GROWTH = 1.10
_AGAIN_SECONDS = 0.2
_FORMS: tuple[dict[str, str], ...] = ({}, {"Prefer": "respond-async"}, {"Accept": "text/event-stream"})
_REPEAT = {409, 429, 502, 503, 504}


def _megabytes(pid: int) -> float:
    """Resident memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def show(line: str) -> None:
    print(line, flush=True)  # noqa: T201


class SoakProcess(Process):
    """A server, with what a soak asks of it."""

    async def start_again(self) -> None:
        """Start it, however busy the machine is."""
        while True:
            with contextlib.suppress(TimeoutError):
                return await self.start()
            await self.stop()

    async def post_until_free(self, thread: str, content: str) -> str | None:
        """Post, again while a run has the thread, for 60 seconds; the answer's id."""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            answer = await self.post(thread, content)
            if answer.status_code == 201:
                return str(answer.json()["id"])
            await asyncio.sleep(_AGAIN_SECONDS)
        return None

    async def all_messages(self, thread: str) -> list[dict[str, Any]]:
        """Every message, by pages, oldest first."""
        messages: list[dict[str, Any]] = []
        while True:
            before = {"before": messages[0]["id"]} if messages else {}
            page = await self.get(f"{thread}/messages", limit=100, **before)
            if not page:
                return messages
            messages = page + messages


class Soak:
    """The servers, the time, and what was counted."""

    def __init__(self, servers: list[SoakProcess], seconds: float) -> None:
        self.servers = servers
        self.rng = random.Random(SEED)
        self.did: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.began = time.monotonic()
        self.seconds = seconds
        self.memory: dict[str, list[tuple[float, float]]] = {server.url: [] for server in servers}

    @property
    def share(self) -> float:
        """How much of the time is over."""
        return (time.monotonic() - self.began) / self.seconds

    async def pause(self, seconds: float) -> None:
        await asyncio.sleep(self.rng.random() * seconds)

    async def kill(self) -> None:
        while self.share < 0.4:
            await self.pause(self.seconds / 10)
            server = self.rng.choice(self.servers)
            await server.stop()
            await server.start_again()
            self.did["kills"] += 1

    async def watch_memory(self) -> None:
        while self.share < 1:
            for server in self.servers:
                with contextlib.suppress(OSError, IndexError):
                    self.memory[server.url].append((self.share, _megabytes(server.pid)))
            await asyncio.sleep(1)

    def judge_memory(self) -> None:
        """Compare the last two of three parts: nothing was killed in them for long."""
        for url, samples in self.memory.items():
            for low, high in ((0.2, 0.4), (0.7, 0.85), (0.85, 1.0)):
                values = sorted(value for share, value in samples if low <= share < high) or [0.0]
                self.did[f"MB median at {high:.0%} of {url[-5:]}"] = round(values[len(values) // 2])
            before, after = (self.did[f"MB median at {high} of {url[-5:]}"] for high in ("85%", "100%"))
            if after > before * _GROWTH:
                self.wrong.append(f"memory of {url} grows: {before} MB, then {after} MB")


class Client:
    """One client and its thread; `acknowledged` is what must be stored, once each."""

    def __init__(self, soak: Soak, number: int) -> None:
        self.soak = soak
        self.number = number
        self.rng = random.Random(soak.rng.random())
        self.acknowledged: list[str] = []
        self.thread = ""
        self.title = ""
        self.viewer: Viewer | None = None

    async def open(self, agent: str) -> None:
        self.thread = await self.soak.servers[0].thread(agent)
        servers = self.soak.servers[:: 1 - 2 * (self.number % 2)]
        self.viewer = Viewer(servers, self.thread, DOORS[self.number % len(DOORS)])

    async def work(self) -> None:
        while self.soak.share < 1:
            number = f"m{self.number}-{len(self.acknowledged)}-{self.rng.randrange(10**9)}"
            match self.rng.randrange(6):
                case 0:
                    await self.post({"role": "system", "content": number})
                case 1:
                    await self.rename(number)
                case _:
                    count, pace = self.rng.randrange(1, 60), self.rng.choice([1, 5, 20])
                    call = self.rng.choice(["open tool\n", ""])  # after that call a failed answer is final
                    await self.post({"content": f"say {number} 🎈\ncount {count} {pace}\n{call}count {count} {pace}"})
            assert self.viewer is not None
            if self.rng.random() < 0.3:
                self.viewer.cut()
            await self.soak.pause(0.5)

    async def post(self, body: dict[str, str]) -> None:
        """Post until it is acknowledged, whatever happens to the servers."""
        key = f"key-{self.rng.randrange(10**12)}"
        headers = {"Idempotency-Key": key, **(self.rng.choice(_FORMS) if "role" not in body else {})}
        while True:
            try:
                code, run = await self._attempt(body, headers)
            except (httpx.HTTPError, OSError, TimeoutError):
                code, run = 0, None
            self.soak.did[f"answers {code or 'cut'}"] += 1
            if code and code not in _REPEAT:
                break
            await asyncio.sleep(_AGAIN_SECONDS)
        if code not in (200, 201, 202):
            self.soak.wrong.append(f"{self.thread}: {code} for a message")
        self.acknowledged.append(body["content"])
        if run and code == 202 and self.rng.random() < 0.5:
            with contextlib.suppress(httpx.HTTPError, OSError):
                await self.rng.choice(self.soak.servers).http.post(f"{self.thread}/messages/{run}/cancel")
                self.soak.did["cancels"] += 1

    async def _attempt(self, body: dict[str, str], headers: dict[str, str]) -> tuple[int, str | None]:
        http = self.rng.choice(self.soak.servers).http
        path = f"{self.thread}/messages{self.rng.choice(['', '', '?if_busy=interrupt'])}"
        if "Accept" not in headers:
            answer = await http.post(path, json=body, headers=headers)
            found = answer.json()
            if found.get("code") == "interrupted" and found["retryable"] is False:
                return 200, None  # stored, and answered as far as it will be
            return answer.status_code, found.get("id")
        async with http.stream("POST", path, json=body, headers=headers) as response:
            created = False
            async for frame in frames(response):
                created = created or frame.event in ("message.created", "thread.snapshot")
                if created and self.rng.random() < 0.02:
                    break
            return (response.status_code if created or response.status_code != 200 else 0), None

    async def rename(self, title: str) -> None:
        while True:
            try:
                answer = await self.rng.choice(self.soak.servers).http.patch(self.thread, json={"title": title})
            except (httpx.HTTPError, OSError):
                answer = None
            if answer is not None and answer.status_code == 200:
                self.title = title
                self.soak.did["renames"] += 1
                return
            await asyncio.sleep(_AGAIN_SECONDS)

    async def judge(self) -> None:
        """Compare with what is stored, once all is quiet."""
        wrong, server = self.soak.wrong, self.soak.servers[-1]
        assert self.viewer is not None
        last = await server.post_until_free(self.thread, f"say last-{self.number}")
        if last is None:
            wrong.append(f"{self.thread} takes no further message")
            return
        try:
            await self.viewer.finishes(last)
        except (TimeoutError, AssertionError, httpx.HTTPError) as error:
            wrong.append(f"the viewer of {self.thread} did not see the end: {error!r}")
            return
        stored = await server.all_messages(self.thread)
        counted = Counter(message["content"] for message in stored if message["role"] != "assistant")
        for content in self.acknowledged:
            if counted[content] != 1:
                wrong.append(f"{self.thread}: {content.splitlines()[0]} is stored {counted[content]} times")
        wrong += [f"{m['id']} is in progress" for m in stored if status(m) == "in_progress"]
        if (await server.get(self.thread, message_limit=1))["title"] != self.title:
            wrong.append(f"{self.thread} has another title")
        if self.viewer.view.thread["title"] != self.title:
            wrong.append(f"the viewer of {self.thread} sees another title")
        shown = self.viewer.view.listed()
        if shown[-50:] != stored[-len(shown[-50:]) :]:
            wrong.append(f"the viewer of {self.thread} holds something else than what is stored")
        for message in stored:
            self.soak.did[f"stored {status(message) or message['role']}"] += 1


@asynccontextmanager
async def _servers(stores: str, folder: Path) -> AsyncIterator[list[SoakProcess]]:
    environment = {"CHAT_EVENTS_MEGABYTES": str(EVENTS_MEGABYTES)}
    async with AsyncExitStack() as stack:
        if stores == "shared":
            mongo = stack.enter_context(mongo_process(durable=True))
            redis = stack.enter_context(redis_process())
            environment |= {"CHAT_DATABASE_URL": f"{mongo.url}/soak", "CHAT_EVENTS_URL": redis.url}
        servers: list[SoakProcess] = []
        for name in "ab" if stores == "shared" else "a":
            server = SoakProcess(folder / name, **environment)
            await server.start()
            stack.push_async_callback(server.stop)
            stack.push_async_callback(server.http.aclose)
            servers.append(server)
        yield servers


async def main(stores: str, seconds: float) -> int:
    with tempfile.TemporaryDirectory() as folder:
        async with _servers(stores, Path(folder)) as servers:
            agent = (await servers[0].agent())["id"]
            soak = Soak(servers, seconds)
            clients = [Client(soak, number) for number in range(CLIENTS)]
            for client in clients:
                await client.open(agent)
            soak.began = time.monotonic()
            viewers = [client.viewer for client in clients if client.viewer]
            following = [asyncio.create_task(viewer.follow()) for viewer in viewers]
            async with asyncio.TaskGroup() as group:
                for client in clients:
                    group.create_task(client.work())
                group.create_task(soak.kill())
                group.create_task(soak.watch_memory())
            await asyncio.gather(*(client.judge() for client in clients))
            soak.judge_memory()
            soak.did["events read by viewers"] = sum(len(viewer.frames) for viewer in viewers)
            soak.did["viewers' connections"] = sum(viewer.connections for viewer in viewers)
            for viewer, task in zip(viewers, following, strict=True):
                task.cancel()
                viewer.cut()
                if viewer.failure:
                    soak.wrong.append("a viewer met " + "".join(traceback.format_exception(viewer.failure)[-2:]))
            for what, count in sorted(soak.did.items()):
                show(f"{count:8} {what}")
            show(f"{len(soak.wrong):8} wrong")
            for line in soak.wrong[:20]:
                show(f"  {line}")
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    match sys.argv[1:]:
        case [("embedded" | "shared") as stores, *rest]:
            sys.exit(asyncio.run(main(stores, float(rest[0]) if rest else 300.0)))
        case _:
            sys.exit(__doc__)
