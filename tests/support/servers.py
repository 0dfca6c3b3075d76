"""A live server: in the tests' own process (`live_server`), or a process that can be killed (`server_process`)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from signal import SIGKILL, Signals
from typing import Any

from agent_chat.agents.registry import Kind, OpenKind
from agent_chat.server.app import Backends, create_app
from agent_chat.server.http.connections import ConnectionLimits
from agent_chat.server.limits import Limits
from agent_chat.server.serving import Server, listening_socket
from agent_chat.server.settings import Settings
from agent_chat.server.timing import Timing
from agent_chat.stores.open import open_backends
from tests.support.client import KEY, Client
from tests.support.nursery import Fork, fork
from tests.support.scripted import Scripted
from tests.support.services import free_port

_START_SECONDS = 20
_END_SECONDS = 40


class Live(Client):
    """A server in this process, its scripted agent, and a client of its first organization."""

    def __init__(self, url: str, server: Server, app: Any, scripted: Scripted) -> None:
        super().__init__(url, KEY)
        self.server = server
        self.app = app
        self.gates = scripted.gates
        self.data_dir = Path()


@asynccontextmanager
async def live_server(
    data_dir: Path,
    backends: Backends = open_backends,
    limits: Limits | None = None,
    kinds: Mapping[str, Kind | OpenKind] | None = None,
    connections: ConnectionLimits | None = None,
    timing: Timing = Timing(),
    connect_tools: bool = False,
    **settings: Any,
) -> AsyncIterator[Live]:
    """A uvicorn on port 0 in this event loop. `kinds` are further ones, beside `scripted`.

    `connect_tools`: most tests call no tool, and the bundled server takes a second of CPU to start.
    """
    scripted = Scripted()
    wanted = Settings(data_dir=data_dir, api_key=KEY, drain_seconds=0.0, **settings)
    all_kinds: dict[str, Kind | OpenKind] = {"scripted": Kind(scripted), **(kinds or {})}
    app = create_app(
        wanted,
        kinds=all_kinds,
        backends=backends,
        limits=limits or Limits(),
        timing=timing,
        connect_tools=connect_tools,
    )
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
    """A server in a process of its own, which starts again on the same port with the same settings.

    `alive` is True from a start until `ended`, `stop` or `kill` have seen the process end.
    """

    def __init__(self, data_dir: Path, **environment: str) -> None:
        super().__init__(f"http://127.0.0.1:{environment.get('PORT') or free_port()}", KEY)
        self.environment = {
            "CHAT_DATA_DIR": str(data_dir),
            "CHAT_API_KEY": KEY,
            "CHAT_METRICS_TOKEN": KEY,
            "PORT": str(self.port),
            **environment,
        }
        self._fork: Fork | None = None

    @property
    def pid(self) -> int:
        assert self._fork is not None
        return self._fork.pid

    @property
    def alive(self) -> bool:
        return self._fork is not None and self._fork.returncode is None

    async def start(self) -> None:
        """Start it, and wait until it listens."""
        async with asyncio.timeout(_START_SECONDS):
            self._fork = await fork({**os.environ, **self.environment})
            assert b"Listening" in await self._fork.stdout.readline()

    def signal(self, how: Signals) -> None:
        os.kill(self.pid, how)

    async def stop(self, how: Signals = SIGKILL) -> int:
        """Signal it and wait for its end; the exit code."""
        if self.alive:
            self.signal(how)
        return await self.ended()

    async def kill(self) -> None:
        """`kill -9`, unless it has ended already."""
        if self.alive:
            await self.stop()

    async def ended(self) -> int:
        """Wait for its end; the exit code."""
        assert self._fork is not None
        async with asyncio.timeout(_END_SECONDS):
            return await self._fork.wait()

    async def metric(self, name: str) -> float:
        """The value of one of its metrics; 0 while nothing was counted."""
        lines = (await self.http.get("/metrics")).text.splitlines()
        return float(next((line.rpartition(" ")[2] for line in lines if line.startswith(f"{name} ")), 0))

    async def metric_becomes(self, name: str, value: float) -> None:
        async with asyncio.timeout(10):
            while await self.metric(name) != value:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def draining(self) -> None:
        """Wait until it reports that it is stopping."""
        async with asyncio.timeout(10):
            while not (await self.http.get("/readyz")).json()["draining"]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def extra_tasks(self) -> dict[str, int]:
        """Its tasks by name, without those that it always has."""
        return dict(await self.get("/tasks"))


@asynccontextmanager
async def server_process(data_dir: Path, **environment: str) -> AsyncIterator[Process]:
    process = Process(data_dir, **environment)
    await process.start()
    try:
        yield process
    finally:
        await process.http.aclose()
        await process.kill()
