"""`python -m tests.bench.load JOB`: the clients of a bench, in a process of their own; JOB and the result are JSON.

Everything that arrives is checked: each token once and in order, and of the server also the stored message.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import urlsplit

import aiohttp
import msgspec
import uvloop

from tests.bench.http import post
from tests.bench.upstream import TOKEN

_STEADY_SECONDS = 2.0
"""Tokens that arrive later than this after the first post count for the steady percentiles."""


class Job(msgspec.Struct):
    """What to do.

    Attributes:
        url: where the server or the relay listens.
        pid: the process whose CPU time is measured.
        key: the API key; "" for a relay.
        what: `streams`, `viewers` or the name of a request.
        count: how many streams, viewers or requests.
        tokens: of each answer.
        every: milliseconds between two of them; 0 for all at once.
        within: the streams begin evenly within so many seconds.
        socket: viewers use WebSockets.
    """

    url: str
    pid: int
    key: str
    what: str
    count: int
    tokens: int = 200
    every: int = 20
    within: float = 0.0
    socket: bool = False


class Result(msgspec.Struct):
    """What it took. Times in milliseconds; `cpu` is CPU seconds of the measured process, `seconds` the wall clock."""

    cpu: float
    seconds: float
    done: int
    wrong: int = 0
    p50: float = 0.0
    p99: float = 0.0
    steady_p99: float = 0.0
    first_token: float = 0.0


def cpu_seconds(pid: int) -> float:
    """CPU time of a process, without its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class _Stream(asyncio.Protocol):
    """One answer: its tokens, and when each arrived."""

    def __init__(self, request: bytes, sign: bytes) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.times: list[tuple[int, int]] = []
        self.text = bytearray()
        self.wrong = 0
        self.posted = 0
        self._request, self._sign = request, sign
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.posted = time.time_ns() // 1000
        cast(asyncio.Transport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.time_ns() // 1000
        *frames, self._rest = (self._rest + data).split(b"\n\n")
        for frame in frames:
            if self._sign in frame:
                for index, sent in TOKEN.findall(frame):
                    self.wrong += int(index) != len(self.times)
                    self.times.append((int(sent), now))
                    self.text += b"%s:%s " % (index, sent)
        if data.endswith(b"0\r\n\r\n") and not self.ended.done():  # the last chunk
            self.ended.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.wrong += 1
            self.ended.set_result(None)


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else 0.0


class Clients:
    def __init__(self, job: Job) -> None:
        self._job = job
        self._netloc = urlsplit(job.url).netloc
        headers = {"Authorization": f"Bearer {job.key}"} if job.key else {}
        self._http = aiohttp.ClientSession(job.url, connector=aiohttp.TCPConnector(limit=0), headers=headers)

    async def run(self) -> Result:
        async with self._http:
            match self._job.what:
                case "streams":
                    return await self._streams()
                case "viewers":
                    return await self._viewers()
                case name:
                    return await self._requests(name)

    async def _thread(self) -> str:
        async with self._http.post("/api/v1/chat/default/threads") as response:
            assert response.status == 201, await response.text()
            return f"/api/v1/chat/default/threads/{(await response.json())['id']}"

    async def _stored(self, thread: str) -> dict[str, Any]:
        async with self._http.get(f"{thread}/messages", params={"limit": 1}) as response:
            return cast(dict[str, Any], (await response.json())[0])

    def _post(self, path: str) -> _Stream:
        job = self._job
        body = b'{"content": "tokens %d every %d"}' % (job.tokens, job.every)
        if not job.key:
            return _Stream(post(self._netloc, "/", body), b'data: {"text"')
        headers = {"authorization": f"Bearer {job.key}", "accept": "text/event-stream"}
        request = post(self._netloc, f"{path}/messages", body, **headers)
        return _Stream(request, b"event: message.delta")

    async def _streams(self) -> Result:
        """Post `count` messages in threads of their own and read the answers."""
        job = self._job
        paths = [await self._thread() if job.key else "/" for _ in range(job.count)]
        loop, streams = asyncio.get_running_loop(), list[_Stream]()
        address = ("127.0.0.1", int(self._netloc.rpartition(":")[2]))
        cpu, began, due = cpu_seconds(job.pid), time.time_ns() // 1000, loop.time()
        for path in paths:
            stream = self._post(path)
            streams.append(stream)
            await loop.create_connection(partial(lambda stream: stream, stream), *address)
            due += job.within / job.count
            await asyncio.sleep(max(0.0, due - loop.time()))
        async with asyncio.timeout(300):
            await asyncio.gather(*(stream.ended for stream in streams))
        seconds = time.time_ns() / 1e9 - began / 1e6
        cpu = cpu_seconds(job.pid) - cpu
        wrong = sum(stream.wrong > 0 or len(stream.times) != job.tokens for stream in streams)
        if job.key:
            for path, stream in zip(paths, streams, strict=True):
                wrong += (await self._stored(path))["content"].encode() != bytes(stream.text)
        delays = [(now - sent) / 1000 for stream in streams for sent, now in stream.times]
        steady = [
            (now - sent) / 1000
            for stream in streams
            for sent, now in stream.times
            if now > began + _STEADY_SECONDS * 1e6
        ]
        firsts = [(stream.times[0][1] - stream.posted) / 1000 for stream in streams if stream.times]
        return Result(
            cpu,
            seconds,
            len(delays),
            wrong,
            statistics.median(delays or [0.0]),
            _percentile(delays, 0.99),
            _percentile(steady, 0.99),
            statistics.median(firsts or [0.0]),
        )

    async def _viewers(self) -> Result:
        """One answer that `count` viewers follow; `done` counts the events that they received."""
        job, thread = self._job, await self._thread()
        follow = self._follow_socket if job.socket else self._follow
        ready = asyncio.Semaphore(0)
        followers = [asyncio.create_task(follow(thread, ready)) for _ in range(job.count)]
        for _ in followers:
            await ready.acquire()
        cpu, began = cpu_seconds(job.pid), time.monotonic()
        body = {"content": f"tokens {job.tokens} every {job.every}"}
        async with self._http.post(f"{thread}/messages", json=body) as response:
            assert response.status == 201, await response.text()
            content = (await response.json())["content"].encode()
        async with asyncio.timeout(120):
            seen = await asyncio.gather(*followers)
        seconds, cpu = time.monotonic() - began, cpu_seconds(job.pid) - cpu
        wrong = sum(text != content for text, _ in seen)
        return Result(cpu, seconds, sum(events for _, events in seen), wrong)

    async def _follow(self, thread: str, ready: asyncio.Semaphore) -> tuple[bytes, int]:
        text, events = b"", 0
        async with self._http.get(f"{thread}/events", headers={"accept": "text/event-stream"}) as response:
            async for line in response.content:
                if line.startswith(b"data:"):
                    event = msgspec.json.decode(line[5:])
                    if event["type"] == "thread.snapshot":
                        ready.release()
                        continue
                    events += 1
                    if event["type"] == "message.delta":
                        text += event["text"].encode()
                    elif event["type"].startswith("run.") and event["type"] != "run.started":
                        return text, events
        return text, events

    async def _follow_socket(self, thread: str, ready: asyncio.Semaphore) -> tuple[bytes, int]:
        text, events = b"", 0
        async with self._http.ws_connect(f"{thread}/ws", max_msg_size=0) as socket:
            async for frame in socket:
                event = msgspec.json.decode(frame.data)
                if event["type"] == "thread.snapshot":
                    ready.release()
                    continue
                events += 1
                if event["type"] == "message.delta":
                    text += event["text"].encode()
                elif event["type"].startswith("run.") and event["type"] != "run.started":
                    return text, events
        return text, events

    async def _requests(self, name: str) -> Result:
        """`count` requests, 16 at a time."""
        job, threads = self._job, [await self._thread() for _ in range(20)]
        if name == "read 50":
            for number in range(50):
                async with self._http.post(f"{threads[0]}/messages", json={"role": "system", "content": f"{number}"}):
                    pass
        asks: dict[str, tuple[Literal["GET", "POST"], str, object]] = {
            "create": ("POST", "/api/v1/chat/default/threads", {}),
            "list 20": ("GET", "/api/v1/chat/default/threads?limit=20", None),
            "read 50": ("GET", f"{threads[0]}?message_limit=50", None),
        }
        left, wrong = iter(range(job.count)), 0

        async def client(number: int) -> None:
            nonlocal wrong
            own = ("POST", f"{threads[number]}/messages", {"content": "tokens 1 every 0"})
            method, path, body = asks.get(name, own)
            for _ in left:
                async with self._http.request(method, path, json=body) as response:
                    await response.read()
                    wrong += response.status not in (200, 201)

        cpu, began = cpu_seconds(job.pid), time.monotonic()
        await asyncio.gather(*(client(number) for number in range(16)))
        return Result(cpu_seconds(job.pid) - cpu, time.monotonic() - began, job.count, wrong)


async def _main() -> None:
    job = msgspec.json.decode(sys.argv[1], type=Job)
    print(msgspec.json.encode(await Clients(job).run()).decode(), flush=True)  # noqa: T201


if __name__ == "__main__":
    uvloop.run(_main())
