"""A live server for journeys: in this process on port 0, or a process of its own that can be killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec

from agent_chat.agents.registry import Kind
from agent_chat.server.app import Backends, create_app
from agent_chat.server.http.connections import ConnectionLimits
from agent_chat.server.limits import Limits
from agent_chat.server.serving import Server, listening_socket
from agent_chat.server.settings import Settings
from agent_chat.stores.open import open_backends
from tests.support.forks import Fork, fork
from tests.support.scripted import Scripted

KEY = "test-key-of-the-first-organization"


class Frame(msgspec.Struct, frozen=True):
    """One server-sent event as it came: the raw bytes too."""

    raw: bytes
    event: str
    data: dict[str, Any]
    id: str


def parse(raw: bytes) -> Frame:
    """Read a frame strictly: event, data and id in this order, LF line ends, nothing else."""
    event, data, position, *rest = raw.decode().split("\n")
    assert rest == ["", ""], raw
    assert event.startswith("event: ")
    assert data.startswith("data: ")
    assert position.startswith("id: ")
    body = json.loads(data.removeprefix("data: "))
    assert body["type"] == event.removeprefix("event: ")
    return Frame(raw, body["type"], body, position.removeprefix("id: "))


async def frames(response: httpx.Response, *, seconds: float = 40) -> AsyncIterator[Frame]:
    """The frames of an event stream, comments and `retry:` lines left out."""
    pending = b""
    async with asyncio.timeout(seconds):
        async for data in response.aiter_raw():
            pending += data
            while b"\n\n" in pending:
                raw, _, pending = pending.partition(b"\n\n")
                while raw.startswith(b":\n"):
                    raw = raw[2:]
                if raw and not raw.startswith(b"retry:"):
                    yield parse(raw + b"\n\n")


class Client:
    """An API client of one organization."""

    def __init__(self, url: str, key: str) -> None:
        self.http = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"},
            timeout=30,
            verify=False,  # no TLS here, and reading the certificates takes each client 40 ms
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
        )

    async def agent(self, **fields: object) -> dict[str, Any]:
        answer = await self.http.post("/api/v1/agents", json={"name": "Scripted", "kind": "scripted", **fields})
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    async def thread(self, agent_id: str = "default", **fields: object) -> str:
        """Make a thread; its path."""
        answer = await self.http.post(f"/api/v1/chat/{agent_id}/threads", json=fields)
        assert answer.status_code == 201, answer.text
        return f"/api/v1/chat/{agent_id}/threads/{answer.json()['id']}"

    async def scripted_thread(self, **fields: object) -> str:
        """Make a scripted agent and a thread with it; the thread's path."""
        return await self.thread((await self.agent(**fields))["id"])

    async def get(self, path: str, **query: object) -> Any:
        answer = await self.http.get(path, params={name: str(value) for name, value in query.items()})
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def say(self, thread: str, content: str, **headers: str) -> httpx.Response:
        """Post a user's message and wait for the JSON answer."""
        return await self.http.post(f"{thread}/messages", json={"content": content}, headers=headers)

    @asynccontextmanager
    async def posting(
        self, thread: str, content: str, *, query: str = "", **headers: str
    ) -> AsyncIterator[httpx.Response]:
        """Post a user's message and read the answer as an event stream."""
        headers = {"Accept": "text/event-stream", **headers}
        path = f"{thread}/messages{query}"
        async with self.http.stream("POST", path, json={"content": content}, headers=headers) as response:
            yield response

    async def streamed(self, thread: str, content: str, **headers: str) -> list[Frame]:
        """All frames of a post's event stream."""
        async with self.posting(thread, content, **headers) as response:
            assert response.status_code == 200
            return [frame async for frame in frames(response)]

    @asynccontextmanager
    async def watching(self, thread: str, after: str | None = None) -> AsyncIterator[AsyncIterator[Frame]]:
        """Watch a thread; `after` goes as Last-Event-ID."""
        headers = {"Last-Event-ID": after} if after else {}
        async with self.http.stream("GET", f"{thread}/events", headers=headers) as response:
            assert response.status_code == 200, await response.aread()
            yield frames(response)


class Live(Client):
    """A server in this process, its scripted agent, and a client of its first organization."""

    def __init__(self, url: str, server: Server, app: Any, scripted: Scripted) -> None:
        super().__init__(url, KEY)
        self.url = url
        self.server = server
        self.app = app
        self.gates = scripted.gates
        self.data_dir = Path()


@asynccontextmanager
async def live_server(
    data_dir: Path,
    backends: Backends = open_backends,
    limits: Limits | None = None,
    kinds: Mapping[str, Kind] | None = None,
    connections: ConnectionLimits | None = None,
    connect_tools: bool = False,
    **settings: Any,
) -> AsyncIterator[Live]:
    """A uvicorn on port 0 in this event loop. `kinds` are further ones, beside `scripted`.

    `connect_tools`: most tests call no tool, and the bundled server takes a second of CPU to start.
    """
    scripted = Scripted()
    wanted = Settings(data_dir=data_dir, api_key=KEY, drain_seconds=0.0, **settings)
    all_kinds = {"scripted": Kind(scripted), **(kinds or {})}
    app = create_app(wanted, kinds=all_kinds, backends=backends, limits=limits or Limits(), connect_tools=connect_tools)
    sock = listening_socket("127.0.0.1", 0)
    server = Server(app, limits=connections or ConnectionLimits())
    serving = asyncio.create_task(server._serve([sock]))
    live = Live(f"http://127.0.0.1:{sock.getsockname()[1]}", server, app, scripted)
    live.data_dir = data_dir
    try:
        async with asyncio.timeout(10):
            await server.listening.wait()
        yield live
    finally:
        await live.http.aclose()
        server.drain()
        async with asyncio.timeout(20):
            await serving


class Process(Client):
    """A server in a process of its own, on a port and a data folder that it keeps when it is started again."""

    def __init__(self, data_dir: Path, **environment: str) -> None:
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        super().__init__(self.url, KEY)
        self.environment = {"CHAT_DATA_DIR": str(data_dir), "CHAT_API_KEY": KEY, "PORT": str(self.port), **environment}
        self.process: Fork | None = None

    async def start(self) -> None:
        """Start it, and wait until it says that it listens."""
        async with asyncio.timeout(20):
            self.process = await fork({**os.environ, **self.environment})
            assert b"Listening" in await self.process.stdout.readline()

    async def stop(self, how: signal.Signals = signal.SIGKILL) -> int:
        """Signal it and wait for its end; the exit code."""
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(how)
        return await self.ended()

    async def ended(self) -> int:
        """Wait for its end; the exit code."""
        assert self.process is not None
        async with asyncio.timeout(40):
            return await self.process.wait()


@asynccontextmanager
async def server_process(data_dir: Path, **environment: str) -> AsyncIterator[Process]:
    process = Process(data_dir, **environment)
    await process.start()
    try:
        yield process
    finally:
        await process.http.aclose()
        await process.stop()


async def upload(live: Live, thread: str, *files: tuple[str, bytes]) -> list[dict[str, Any]]:
    answer = await live.http.post(f"{thread}/attachments", files=[("files", file) for file in files])
    assert answer.status_code == 201, answer.text
    return list(answer.json())
