"""The worst that one organization, or a client without a key, can cheaply do to a process that it shares.

Each attack is an async generator: it prepares itself, yields once, and goes on until it is cancelled. Those with a key
stay below the rate limit (6,000 requests a minute); a refusal counts as a request, and is counted.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import aiohttp

REQUESTS_A_SECOND = 95
_EMPHASIS = "_*" * 8_000
_TITLE = "\n" * 2_000
_HEAD = "<head" * 40_000
_STYLED = "**bold** [x](y) `c` " * 50_000


class Neighbour:
    """A client that keeps to a rate; `seen` counts the statuses of its answers."""

    def __init__(self, http: aiohttp.ClientSession, url: str, key: str) -> None:
        self.http = http
        self.url = url
        self.key = key
        self.seen: Counter[str] = Counter()
        self._due = time.monotonic()

    async def ask(self, method: str, path: str, **kwargs: object) -> bytes:
        """One request, when it is its turn; its body."""
        self._due = max(time.monotonic(), self._due + 1 / REQUESTS_A_SECOND)
        await asyncio.sleep(max(0.0, self._due - time.monotonic()))
        try:
            async with self.http.request(method, path, **kwargs) as response:  # type: ignore[arg-type]
                body = await response.read()
                self.seen[str(response.status)] += 1
                return body
        except (aiohttp.ClientError, TimeoutError) as error:
            self.seen[type(error).__name__] += 1
            return b""

    async def threads(self, count: int, agent: str = "default") -> list[str]:
        path = f"/api/v1/chat/{agent}/threads"
        return [f"{path}/{await self._made(path)}" for _ in range(count)]

    async def agent(self, **fields: str) -> str:
        return await self._made("/api/v1/agents", json={"name": "x", "kind": "demo", **fields})

    async def _made(self, path: str, **kwargs: object) -> str:
        """The id of what a POST makes; refused for the rate limit, it is asked again."""
        while True:
            made = json.loads(await self.ask("POST", path, **kwargs) or b"{}")
            if "id" in made:
                return str(made["id"])
            await asyncio.sleep(0.5)

    async def store(self, thread: str, content: str) -> bytes:
        return await self.ask("POST", f"{thread}/messages", json={"role": "system", "content": content})


async def _forever(clients: int, step: Callable[[int], object]) -> None:
    """That many clients, each doing the step again and again; the step is told which one."""

    async def loop(number: int) -> None:
        while True:
            await step(number)  # type: ignore[misc]

    async with asyncio.TaskGroup() as group:
        for number in range(clients):
            group.create_task(loop(number))


async def html_files(us: Neighbour) -> AsyncIterator[None]:
    """HTML files of 200 KB whose scanner was quadratic, four at a time."""
    threads = await us.threads(4)
    yield

    async def upload(number: int) -> None:
        form = aiohttp.FormData()
        form.add_field("files", _HEAD.encode(), filename="a.html", content_type="text/html")
        await us.ask("POST", f"{threads[number]}/attachments", data=form)

    await _forever(4, upload)


async def emphasis(us: Neighbour) -> AsyncIterator[None]:
    """Messages of 16 KB whose Markdown is all emphasis marks."""
    threads = await us.threads(8)
    yield
    await _forever(8, lambda number: us.store(threads[number], _EMPHASIS))


async def large_markdown(us: Neighbour) -> AsyncIterator[None]:
    """Messages of 1 MB of Markdown, sixteen at a time."""
    threads = await us.threads(16)
    yield
    await _forever(16, lambda number: us.store(threads[number], _STYLED))


async def titles(us: Neighbour) -> AsyncIterator[None]:
    """Titles of an agent without a model, for threads whose messages are mostly line ends."""
    threads = await us.threads(20, await us.agent())
    await asyncio.gather(
        *(us.ask("POST", f"{thread}/messages", json={"role": "user", "content": f"x{_TITLE}x"}) for thread in threads)
    )
    yield
    await _forever(20, lambda number: us.ask("POST", f"{threads[number]}/generate_title"))


def _frame(opcode: int, payload: bytes) -> bytes:
    """One masked WebSocket frame; the mask is zero."""
    return bytes([0x80 | opcode, 0x80 | len(payload), 0, 0, 0, 0]) + payload


async def _read(reader: asyncio.StreamReader) -> None:
    while await reader.read(2**16):
        pass


async def _flood(us: Neighbour, thread: str, frames: bytes, *, reads: bool) -> None:
    """Send these frames over one WebSocket again and again; connect anew when it is closed."""
    host, port = us.url.removeprefix("http://").split(":")
    head = f"GET {thread}/ws HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {us.key}\r\n"
    head += "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    head += "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    while True:
        answer, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(head.encode())
            us.seen[(await answer.readline()).split()[1].decode()] += 1
            reading = asyncio.create_task(_read(answer)) if reads else None
            while not (reading and reading.done()):
                writer.write(frames)
                await writer.drain()
                us.seen["kilobytes"] += len(frames) // 1024
        except (OSError, IndexError):
            await asyncio.sleep(0.05)
        finally:
            writer.close()


async def small_frames(us: Neighbour) -> AsyncIterator[None]:
    """A WebSocket that sends frames of one byte as fast as it can."""
    thread = (await us.threads(1))[0]
    yield
    await _flood(us, thread, _frame(1, b"x") * 10_000, reads=True)


async def pings(us: Neighbour) -> AsyncIterator[None]:
    """A WebSocket that sends protocol pings and never reads the pongs."""
    thread = (await us.threads(1))[0]
    yield
    await _flood(us, thread, _frame(9, b"x" * 100) * 1_000, reads=False)


async def large_pages(us: Neighbour) -> AsyncIterator[None]:
    """Three readers of a thread with 60 messages of 1 MB."""
    thread = (await us.threads(1))[0]
    for _ in range(60):
        await us.store(thread, "x" * 1_000_000)
    yield
    await _forever(3, lambda number: us.ask("GET", f"{thread}/messages?limit=100"))


async def agent_list(us: Neighbour) -> AsyncIterator[None]:
    """Readers of a list of 150 agents with long instructions."""
    for _ in range(150):
        await us.agent(instructions="x" * 180_000)
    yield
    await _forever(3, lambda number: us.ask("GET", "/api/v1/agents"))


async def large_facts(us: Neighbour) -> AsyncIterator[None]:
    """Messages of 1 MB in ever new threads: memory for the events of each."""
    yield

    async def post(number: int) -> None:
        await us.store((await us.threads(1))[0], "x" * 1_000_000)

    await _forever(4, post)


async def short_answers(us: Neighbour) -> AsyncIterator[None]:
    """Answers of one token, as many as the rate limit allows."""
    threads = await us.threads(16)
    yield
    await _forever(16, lambda number: us.ask("POST", f"{threads[number]}/messages", json={"content": "Hi"}))


async def wrong_keys(us: Neighbour) -> AsyncIterator[None]:
    """A client without a key, trying some on 64 connections."""
    yield
    numbers = itertools.count()

    async def guess(_: int) -> None:
        try:
            headers = {"Authorization": f"Bearer chat_{next(numbers):043d}"}
            async with us.http.get("/api/v1/agents", headers=headers) as response:
                us.seen[str(response.status)] += 1
        except aiohttp.ClientError as error:
            us.seen[type(error).__name__] += 1

    await _forever(64, guess)


async def long_heads(us: Neighbour) -> AsyncIterator[None]:
    """A client without a key that sends headers without an end, on four connections."""
    yield
    host, port = us.url.removeprefix("http://").split(":")

    async def head(connection: int) -> None:
        try:
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n")
            for line in range(20_000):
                writer.write(b"X-%d: %s\r\n" % (line, b"x" * 4_000))
                await writer.drain()
        except OSError as error:
            us.seen[type(error).__name__] += 1
            await asyncio.sleep(0.05)

    await _forever(4, head)


async def idle_sockets(us: Neighbour) -> AsyncIterator[None]:
    """A client without a key that opens connections and says nothing."""
    yield
    host, port = us.url.removeprefix("http://").split(":")
    async with AsyncExitStack() as stack:
        while True:
            try:
                _, opened = await asyncio.open_connection(host, int(port))
                stack.callback(opened.close)
                us.seen["opened"] += 1
            except OSError as error:
                us.seen[type(error).__name__] += 1
                await asyncio.sleep(0.1)
            if us.seen["opened"] > 3_000:
                await asyncio.sleep(60)


ATTACKS = {
    attack.__name__: attack
    for attack in (
        html_files,
        emphasis,
        large_markdown,
        titles,
        small_frames,
        pings,
        large_pages,
        agent_list,
        large_facts,
        short_answers,
        wrong_keys,
        long_heads,
        idle_sockets,
    )
}
