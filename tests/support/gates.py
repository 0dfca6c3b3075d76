"""Forced races: gates before and after the methods of the real store and log, at which a test holds their callers.

Nothing is mocked: a gate only makes its caller wait, or raise, at the critical point; the real store does the work.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal, cast

from agent_chat.agents.registry import Registry
from agent_chat.server.ai_chat_service import AIChatService
from agent_chat.server.reading.streams import Streams
from agent_chat.server.runs.runner import Runner
from agent_chat.stores.budget import LOG_BYTES, LogBudget
from agent_chat.stores.buffer import Buffer
from agent_chat.stores.contracts import EventLog, Store
from agent_chat.stores.embedded.log import EmbeddedLog, open_embedded_log
from agent_chat.stores.models import Principal, RunRecord, new_id
from agent_chat.stores.open import Where
from agent_chat.stores.redis.log import open_redis_log
from agent_chat.stores.sqlite.store import open_sqlite
from tests.support.servers import Live, live_server
from tests.support.viewers import Watcher

When = Literal["before", "after"]


class Died(Exception):
    """Raised to a caller whose process "dies" at a gate."""


class Gate:
    """Holds one call of a method."""

    def __init__(self) -> None:
        self._reached = asyncio.Event()
        self._released = asyncio.Event()
        self._deadly = False

    async def reached(self) -> None:
        async with asyncio.timeout(10):
            await self._reached.wait()

    def release(self) -> None:
        self._released.set()

    def kill(self) -> None:
        """Raise Died to the caller, as if its process had ended here."""
        self._deadly = True
        self._released.set()

    async def passed(self) -> None:
        """Wait until a call has arrived, and release it."""
        await self.reached()
        self.release()

    async def hold(self) -> None:
        self._reached.set()
        await self._released.wait()
        if self._deadly:
            raise Died


class Gated:
    """A store or a log whose calls a test can hold."""

    def __init__(self, real: object) -> None:
        self.real = real
        self._coming: defaultdict[tuple[str, When], list[Gate | None]] = defaultdict(list)
        self._gates: list[Gate] = []

    def hold(self, verb: str, when: When, *, skip: int = 0) -> Gate:
        """Hold the next call of that method, after `skip` that pass."""
        assert hasattr(self.real, verb), f"no method {verb}"
        gate = Gate()
        self._gates.append(gate)
        self._coming[verb, when] += [None] * skip + [gate]
        return gate

    def release(self) -> None:
        """Release all calls, held and future ones."""
        self._coming.clear()
        for gate in self._gates:
            gate.release()

    def __getattr__(self, verb: str) -> Any:
        call = getattr(self.real, verb)
        if not inspect.iscoroutinefunction(call):
            return call

        async def gated(*args: object, **kwargs: object) -> object:
            await self._pass(verb, "before")
            result = await call(*args, **kwargs)
            await self._pass(verb, "after")
            return result

        return gated

    async def _pass(self, verb: str, when: When) -> None:
        coming = self._coming[verb, when]
        if gate := coming.pop(0) if coming else None:
            await gate.hold()


class Race:
    """A live server whose store and log have gates."""

    def __init__(self, live: Live, store: Gated, log: Gated) -> None:
        self.live = live
        self.store = store
        self.log = log

    @property
    def service(self) -> AIChatService:
        return cast(AIChatService, self.live.server.lifespan.state["service"])

    @property
    def runner(self) -> Runner:
        return self.service.runner

    @property
    def streams(self) -> Streams:
        return cast(Streams, self.live.server.lifespan.state["streams"])

    @property
    def embedded_log(self) -> EmbeddedLog:
        assert isinstance(self.log.real, EmbeddedLog)
        return self.log.real

    def buffer(self, thread: str) -> Buffer:
        """What is in memory of the thread's log, which somebody reads."""
        self.embedded_log.flush()
        buffer = self.embedded_log._logs[id_of(thread)].buffer
        assert buffer is not None
        return buffer

    def has_cursors(self, thread: str) -> bool:
        log = self.embedded_log._logs.get(id_of(thread))
        return log is not None and log.buffer is not None and bool(log.buffer.cursors)

    async def principal(self) -> Principal:
        principal = await cast(Store, self.store).find_principal(
            self.live.http.headers["Authorization"][len("Bearer ") :]
        )
        assert principal is not None
        return principal

    async def record(self, run_id: str) -> RunRecord | None:
        return await cast(Store, self.store).find_record(await self.principal(), run_id)

    def other_process(self) -> Runner:
        """A runner such as another process on the same store and log would have."""

        def no_tools(*of: object) -> Any:
            raise NotImplementedError

        async def plain(organization_id: str, text: str) -> str:
            return text

        return Runner(cast(Store, self.store), cast(EventLog, self.log), Registry({}), no_tools, plain)

    async def settled(self, thread: str, *watchers: Watcher) -> None:
        """Wait until no run is in progress and the watchers have received everything that was published."""
        await no_runs()
        mark = new_id()
        await self.live.http.patch(thread, json={"title": mark})
        for watching in watchers:
            await watching.sees("thread.updated", lambda data: bool(data["thread"]["title"] == mark))


def id_of(thread: str) -> str:
    return thread.rpartition("/")[2]


def run_tasks() -> list[asyncio.Task[object]]:
    """The tasks of the runs of this process: the runs themselves, their agents and their checkpoints."""
    parts = {"Runner._run", "Runner._generate", "Runner._checkpoint"}
    return [task for task in asyncio.all_tasks() if getattr(task.get_coro(), "__qualname__", "") in parts]


async def no_runs() -> None:
    """Wait until no task of a run is left in this process."""
    async with asyncio.timeout(15):
        while tasks := run_tasks():
            await asyncio.wait(tasks)


@asynccontextmanager
async def critical(
    data_dir: Path,
    *,
    lease: float = 20.0,
    events_bytes: int = LOG_BYTES,
    redis_url: str | None = None,
    in_memory: bool = False,
    **settings: Any,
) -> AsyncIterator[Race]:
    """A live server with gates; calls still held are released at the end.

    `redis_url`: None for an embedded log, in the data folder or `in_memory`.
    """
    gated: list[Gated] = []

    @asynccontextmanager
    async def backends(where: Where) -> AsyncIterator[tuple[Store, EventLog]]:
        store = await open_sqlite(where.data_dir / "chat.db", lease=lease)
        budget = LogBudget(events_bytes)
        log: EventLog
        if redis_url:
            log = await open_redis_log(redis_url, prefix=new_id(), budget=budget)
        elif in_memory:
            log = EmbeddedLog(budget=budget)
        else:
            log = await open_embedded_log(where.data_dir / "log", budget=budget)
        gated[:] = [Gated(store), Gated(log)]
        try:
            yield cast(Store, gated[0]), cast(EventLog, gated[1])
        finally:
            await log.close()
            await store.close()

    async with live_server(data_dir, backends, **settings) as live:
        try:
            yield Race(live, *gated)
        finally:
            for each in gated:
                each.release()


async def eventually(so: Callable[[], bool]) -> None:
    """Poll until it is true: for what no event announces."""
    async with asyncio.timeout(10):
        while not so():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def all_left(race: Race, *threads: str) -> None:
    """Wait until runs and readers have left no task, no stream and no cursor."""
    await no_runs()
    await eventually(lambda: len(race.streams) == 0 and not any(map(race.has_cursors, threads)))
    assert race.runner.count == 0
