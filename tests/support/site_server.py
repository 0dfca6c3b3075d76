"""The server of these journeys: settings, application and socket are the real ones, beside them what tests hold.

CHAT_TEST_GATES     a folder: `hold NAME` writes NAME.reached there and waits for NAME.released
CHAT_TEST_LEASE     seconds that a lease lasts; all else that is measured by it shrinks as much
CHAT_TEST_CHECKPOINT    seconds between two checkpoints, whatever a lease lasts
CHAT_TEST_PATIENCE  seconds that a client waits for a database that is away, whatever a lease lasts
CHAT_TEST_REFILL    seconds after which a log is read again, whatever pub/sub brought
CHAT_TEST_HOLDS     a gate where the process holds once its database and log are open
CHAT_TEST_DIES      "before VERB" or "after VERB": the process is killed at that verb of its store, as by `kill -9`

GET /left tells what is at work in it beside what was when it began to listen (`Left`). On SIGUSR1 it lets go at once
of logs that nobody reads.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from agent_chat.agents.registry import Kind
from agent_chat.server import ai_chat_service, facts
from agent_chat.server.app import create_app
from agent_chat.server.runs import runner
from agent_chat.server.serving import Server, listening_socket
from agent_chat.server.settings import load
from agent_chat.stores.contracts import LEASE_SECONDS, EventLog, Store
from agent_chat.stores.mongo.store import open_mongo
from agent_chat.stores.open import Where
from agent_chat.stores.redis import log as redis_log
from agent_chat.stores.redis.log import open_redis_log
from tests.support.scripted import Gates, Scripted


class FolderGates(Gates):
    """Gates that another process can see and open."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    async def hold(self, name: str) -> None:
        (self._folder / f"{name}.reached").touch()
        while not (self._folder / f"{name}.released").exists():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


class Mortal:
    """A store at one of whose verbs the process dies."""

    def __init__(self, store: Store, dies: str) -> None:
        self._store = store
        self._when, self._verb = dies.split(" ")

    def __getattr__(self, verb: str) -> Any:
        call = getattr(self._store, verb)
        return self._dying(call) if verb == self._verb else call

    def _dying(self, call: Any) -> Any:
        async def dying(*args: object, **kwargs: object) -> None:
            if self._when == "after":
                await call(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        return dying


@asynccontextmanager
async def backends(where: Where) -> AsyncIterator[tuple[Store, EventLog]]:
    """MongoDB and Redis as ever, but for the lease and the death that the test asked for."""
    assert where.database_url is not None
    assert where.events_url is not None
    store: Store = await open_mongo(where.database_url, lease=_lease())
    log = await open_redis_log(where.events_url)
    if gate := os.environ.get("CHAT_TEST_HOLDS"):
        await _gates().hold(gate)
    try:
        dies = os.environ.get("CHAT_TEST_DIES")
        yield cast(Store, Mortal(store, dies)) if dies else store, log
    finally:
        await log.close()
        await store.close()


def _lease() -> float:
    return float(os.environ.get("CHAT_TEST_LEASE", LEASE_SECONDS))


def _gates() -> FolderGates:
    return FolderGates(Path(os.environ["CHAT_TEST_GATES"]))


class Left:
    """The tasks of this process that nobody may need any more."""

    def __init__(self) -> None:
        self._always: Counter[str] = Counter()

    def listening(self) -> None:
        """Take what is at work by now for what always is; so are the two of the log's subscription, and connections."""
        self._always = _tasks() | Counter(["log messages", "log channels"])

    async def tell(self, request: Request) -> JSONResponse:
        """How many tasks are left, by name."""
        left = _tasks() - self._always - Counter(["RequestResponseCycle.run_asgi"])
        return JSONResponse({name: count for name, count in left.items() if not (_of_mcp(name) and count == 1)})


def _of_mcp(name: str) -> bool:
    """True for the tasks of a connection to an MCP server: they outlive the run that opened it."""
    return name.startswith(("mcp ", "mcp.", "agent_chat.agents.mcp."))


def _tasks() -> Counter[str]:
    return Counter(map(_name, asyncio.all_tasks()))


def _name(task: asyncio.Task[Any]) -> str:
    """The name that the task was given, else its function's."""
    return getattr(task.get_coro(), "__qualname__", "?") if task.get_name().startswith("Task-") else task.get_name()


def _let_go(*_: object) -> None:
    redis_log._LINGER_SECONDS = 0.0


def serve() -> None:
    """Serve until a signal ends it."""
    shrunk = _lease() / LEASE_SECONDS
    runner.CHECKPOINT_SECONDS *= shrunk
    runner.SWEEP_SECONDS *= shrunk
    facts.SWEEP_SECONDS *= shrunk
    runner.LEASE_SECONDS *= shrunk  # type: ignore[attr-defined]
    ai_chat_service.STORE_SECONDS *= shrunk
    ai_chat_service._POLL_SECONDS *= shrunk
    ai_chat_service.STORE_SECONDS = float(os.environ.get("CHAT_TEST_PATIENCE", ai_chat_service.STORE_SECONDS))
    runner.CHECKPOINT_SECONDS = float(os.environ.get("CHAT_TEST_CHECKPOINT", runner.CHECKPOINT_SECONDS))
    redis_log._REFILL_SECONDS = float(os.environ.get("CHAT_TEST_REFILL", redis_log._REFILL_SECONDS))
    redis_log._TICK_SECONDS = 0.05
    signal.signal(signal.SIGUSR1, _let_go)
    settings = load()
    kinds = {"scripted": Kind(Scripted(_gates()))}
    app = create_app(settings, kinds=kinds, backends=backends, connect_tools=False)
    left = Left()
    app.router.routes.insert(0, Route("/left", left.tell))
    sock = listening_socket(settings.host, settings.port, reuse_port=settings.reuse_port)

    def announce() -> None:
        left.listening()
        print("Listening", flush=True)  # noqa: T201

    Server(app, announce).run(sockets=[sock])
