"""Background loops that fail are started again, and readiness reports one that keeps failing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent_chat.server.supervision import Supervisor
from agent_chat.server.timing import Timing
from agent_chat.stores.buffer import Entry
from agent_chat.stores.contracts import EventLog, Store
from agent_chat.stores.embedded.log import EmbeddedLog
from agent_chat.stores.errors import Gap
from agent_chat.stores.open import Where
from agent_chat.stores.sqlite.store import open_sqlite
from tests.support.servers import Live, live_server

QUICK = Timing(restart=0.001)


class Flaky:
    """A loop that raises a number of times, then returns once, then works."""

    def __init__(self, failures: int) -> None:
        self.left = failures
        self.working = asyncio.Event()

    async def __call__(self) -> None:
        self.left -= 1
        if self.left > 0:
            raise KeyError("unexpected")
        if self.left == 0:
            return
        self.working.set()
        await asyncio.Event().wait()


async def test_a_loop_that_raises_or_returns_is_started_again(caplog: pytest.LogCaptureFixture) -> None:
    supervisor, flaky = Supervisor(QUICK), Flaky(3)
    supervisor.start("flaky", flaky)
    async with asyncio.timeout(5):
        await flaky.working.wait()
    assert (supervisor.restarts, supervisor.failing) == (3, ["flaky"])
    await supervisor.close()
    failures = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [record.exc_info is not None for record in failures] == [True, True, False]


async def test_a_loop_is_healthy_again_once_it_has_worked_for_a_while() -> None:
    supervisor, flaky = Supervisor(Timing(restart=0.001, healthy=0.05)), Flaky(3)
    supervisor.start("flaky", flaky)
    async with asyncio.timeout(5):
        await flaky.working.wait()
        while supervisor.failing:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await supervisor.close()


async def ready(live: Live) -> tuple[int, list[str]]:
    response = await live.http.get("/readyz")
    return response.status_code, response.json().get("failing", [])


async def test_readiness_reports_a_loop_that_keeps_failing(tmp_path: Path) -> None:
    async with live_server(tmp_path) as live:
        assert await ready(live) == (200, [])
        live.server.lifespan.state["supervisor"].start("flaky", Flaky(10**9))
        async with asyncio.timeout(5):
            while await ready(live) != (503, ["flaky"]):
                pass


class Lossy(EmbeddedLog):
    """A log that has always just lost what is to be read, as a Redis that evicts."""

    reads = 0

    async def backwards(self, thread_id: str, position: str | None = None) -> AsyncGenerator[Entry]:
        self.reads += 1
        raise Gap(position or "")
        yield


async def test_a_viewer_of_a_log_that_loses_everything_does_not_spin(tmp_path: Path) -> None:
    log = Lossy()

    @asynccontextmanager
    async def backends(where: Where) -> AsyncIterator[tuple[Store, EventLog]]:
        store = await open_sqlite(where.data_dir / "chat.db")
        try:
            yield store, log
        finally:
            await store.close()

    async with live_server(tmp_path, backends) as live:
        thread = await live.scripted_thread()
        running = asyncio.create_task(live.post(thread, "hold it"))
        await live.gates.reached("it")
        async with live.watching(thread):
            async with asyncio.timeout(5):
                while not log.reads:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)  # in which a viewer that spins reads hundreds of times
            assert log.reads < 10
        live.gates.release("it")
        await running
