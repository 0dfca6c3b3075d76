"""Opens the configured backends: the only module that knows which are in use. Drivers are imported when needed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import msgspec

from agent_chat.stores.budget import LOG_BYTES, LogBudget
from agent_chat.stores.contracts import LEASE_SECONDS, EventLog, Store
from agent_chat.stores.embedded.log import open_embedded_log
from agent_chat.stores.embedded.segments import DISK_BYTES
from agent_chat.stores.folder import make_folder
from agent_chat.stores.sqlite.store import open_sqlite


class Where(msgspec.Struct, frozen=True):
    """The configured backends.

    Args:
        data_dir: contains everything embedded.
        database_url: `mongodb://…`; None for SQLite in the data folder.
        events_url: `redis://…`; None for files in the data folder.
        events_bytes: how much memory all logs of this process may take.
        events_disk_bytes: how much those files may take together.
        lease: how many seconds a run's lease lasts.
    """

    data_dir: Path
    database_url: str | None = None
    events_url: str | None = None
    events_bytes: int = LOG_BYTES
    events_disk_bytes: int = DISK_BYTES
    lease: float = LEASE_SECONDS


async def open_store(where: Where, *, serving: bool = True) -> Store:
    """Open the database. `serving`: False for a process beside a running server.

    Raises:
        DataFolderInUse: another server serves from the data folder.
        DataFolderUnusable: the folder cannot be created or written to.
        SchemaTooNew: a later version of the server wrote the data.
        StoreUnavailable: the database does not respond.
        ValueError: its URL is invalid; the text names the setting.
    """
    await asyncio.to_thread(make_folder, where.data_dir)
    if where.database_url is not None:
        from agent_chat.stores.mongo.store import open_mongo

        with _naming("CHAT_DATABASE_URL"):
            return await open_mongo(where.database_url, lease=where.lease)
    return await open_sqlite(where.data_dir / "chat.db", lease=where.lease, serving=serving)


@asynccontextmanager
async def open_backends(where: Where) -> AsyncIterator[tuple[Store, EventLog]]:
    """Open the store and the log of a serving process, and close them after the block. Raises as `open_store`."""
    store = await open_store(where)
    try:
        log = await _open_log(where)
        try:
            yield store, log
        finally:
            await log.close()
    finally:
        await store.close()


async def _open_log(where: Where) -> EventLog:
    budget = LogBudget(where.events_bytes)
    if where.events_url is None:
        return await open_embedded_log(where.data_dir / "log", disk_bytes=where.events_disk_bytes, budget=budget)
    from agent_chat.stores.redis.log import open_redis_log

    with _naming("CHAT_EVENTS_URL"):
        return await open_redis_log(where.events_url, budget=budget)


@contextmanager
def _naming(setting: str) -> Iterator[None]:
    """Name the setting in the error of an invalid URL."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from error
