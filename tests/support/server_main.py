"""`python -m tests.support.server_main`: the server's command line, with the scripted agent and with hooks for tests.

TEST_CONNECTS    connect to the MCP servers at start: the bundled one takes a second of CPU, and few tests need it
TEST_GATES       a folder: `hold NAME` of the scripted agent writes NAME.reached and waits for NAME.released
TEST_HOLDS       a gate where the process waits once its database and log are open
TEST_DIES        "before METHOD" or "after METHOD": `kill -9` at the next call of that method of its store
TEST_LEASE       how long a lease lasts, in seconds; the intervals that depend on it shrink in proportion
TEST_CHECKPOINT  seconds between two checkpoints, regardless of the lease
TEST_PATIENCE    seconds that a request waits for an unreachable database, regardless of the lease
TEST_REFILL      seconds after which a log is read again, whether or not pub/sub announced anything

The last six need CHAT_DATABASE_URL. GET /tasks reports the tasks that did not exist when the server began to listen. On
SIGUSR1 the server releases logs without readers immediately.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

from msgspec.structs import replace
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from agent_chat.agents.mcp import toolbox
from agent_chat.agents.registry import Kind
from agent_chat.server import command_line
from agent_chat.server.app import create_app
from agent_chat.server.serving import Server
from agent_chat.server.settings import Settings
from agent_chat.server.timing import Timing
from agent_chat.stores.contracts import LEASE_SECONDS, EventLog, Store
from agent_chat.stores.open import Where, open_backends
from tests.support.scripted import FolderGates, Gates, Scripted


class Mortal:
    """A store that kills its process before or after the call of one method."""

    def __init__(self, store: Store, dies: str) -> None:
        self._store = store
        self._when, self._method = dies.split(" ")
        assert hasattr(store, self._method), f"no method {self._method}"

    def __getattr__(self, method: str) -> Any:
        call = getattr(self._store, method)
        return self._dying(call) if method == self._method else call

    def _dying(self, call: Any) -> Any:
        async def dying(*args: object, **kwargs: object) -> None:
            if self._when == "after":
                await call(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        return dying


class ExtraTasks:
    """The tasks of this process beside those that every idle server has."""

    def __init__(self) -> None:
        self._idle: Counter[str] = Counter()

    def begin(self) -> None:
        """Count what exists by now as idle, and the two tasks of the log's subscription."""
        self._idle = _tasks() | Counter(["log messages", "log channels"])

    async def respond(self, request: Request) -> JSONResponse:
        """How many tasks there are beside those, by name; one of each connection to an MCP server is not reported."""
        extra = _tasks() - self._idle - Counter(["RequestResponseCycle.run_asgi"])
        return JSONResponse({name: count for name, count in extra.items() if not (_is_mcp(name) and count == 1)})


def _is_mcp(name: str) -> bool:
    """True for the tasks of a connection to an MCP server, which outlives the run that opened it."""
    return name.startswith(("mcp ", "mcp.", "agent_chat.agents.mcp."))


def _tasks() -> Counter[str]:
    return Counter(map(_name, asyncio.all_tasks()))


def _name(task: asyncio.Task[Any]) -> str:
    """The name that the task was given, else its function's."""
    return getattr(task.get_coro(), "__qualname__", "?") if task.get_name().startswith("Task-") else task.get_name()


def preload(environment: Mapping[str, str]) -> None:
    """Import the drivers that a server with this environment needs."""
    if "CHAT_DATABASE_URL" in environment:
        import agent_chat.stores.mongo.store
        import agent_chat.stores.redis.log  # noqa: F401


def _lease() -> float:
    return float(os.environ.get("TEST_LEASE", LEASE_SECONDS))


def _gates() -> Gates | None:
    folder = os.environ.get("TEST_GATES")
    return FolderGates(Path(folder)) if folder else None


@asynccontextmanager
async def _backends(where: Where) -> AsyncIterator[tuple[Store, EventLog]]:
    """MongoDB and Redis, with the lease and the death that the test asked for."""
    from agent_chat.stores.mongo.store import open_mongo
    from agent_chat.stores.redis.log import open_redis_log
    from agent_chat.stores.redis.timing import RedisTiming

    assert where.database_url is not None
    assert where.events_url is not None
    store: Store = await open_mongo(where.database_url, lease=where.lease)
    timing = RedisTiming(tick=0.05, refill=float(os.environ.get("TEST_REFILL", RedisTiming().refill)))
    log = await open_redis_log(where.events_url, timing=timing)

    def release_logs() -> None:
        log.timing = replace(log.timing, linger=0.0)

    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, release_logs)
    if gate := os.environ.get("TEST_HOLDS"):
        await FolderGates(Path(os.environ["TEST_GATES"])).hold(gate)
    try:
        dies = os.environ.get("TEST_DIES")
        yield cast(Store, Mortal(store, dies)) if dies else store, log
    finally:
        await log.close()
        await store.close()


def _timing() -> Timing:
    """The intervals of a server with a shared database, as the environment asks."""
    default, lease = Timing(), _lease()
    shrunk = lease / default.lease
    return Timing(
        lease=lease,
        checkpoint=float(os.environ.get("TEST_CHECKPOINT", default.checkpoint * shrunk)),
        sweep=default.sweep * shrunk,
        poll=default.poll * shrunk,
        answer_patience=float(os.environ.get("TEST_PATIENCE", default.answer_patience * shrunk)),
    )


def serve() -> None:
    """Read the command line and serve until a signal ends it."""
    toolbox.READY_SECONDS = 20.0  # on a busy machine a tool server takes longer than the 2 s that a run waits for it
    is_shared = "CHAT_DATABASE_URL" in os.environ
    extra = ExtraTasks()

    def create(settings: Settings) -> Starlette:
        app = create_app(
            settings,
            kinds={"scripted": Kind(Scripted(_gates()))},
            backends=_backends if is_shared else open_backends,
            timing=_timing() if is_shared else Timing(),
            connect_tools="TEST_CONNECTS" in os.environ,
        )
        app.router.routes.insert(0, Route("/tasks", extra.respond))
        return app

    def make_server(app: Starlette, announce: Callable[[], None], *rest: Any) -> Server:
        def begin() -> None:
            extra.begin()
            announce()

        return Server(app, begin, *rest)

    command_line.create_app = create  # type: ignore[assignment,attr-defined]
    command_line.Server = make_server  # type: ignore[assignment,attr-defined]
    command_line.main(prog_name="serve")


if __name__ == "__main__":
    serve()
