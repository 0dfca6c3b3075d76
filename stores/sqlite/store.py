"""The embedded Store: both contracts on one SQLite file. Survives `kill -9`; at start every run found is an orphan."""

from __future__ import annotations

import asyncio
from pathlib import Path

from agent_chat.stores.contracts import LEASE_SECONDS
from agent_chat.stores.models import Clock, utcnow
from agent_chat.stores.sqlite.directory import SQLiteDirectory
from agent_chat.stores.sqlite.storage import SQLiteStorage
from agent_chat.stores.sqlite.threads import SQLiteThreads


class SQLiteStore(SQLiteThreads, SQLiteDirectory, SQLiteStorage):
    pass


async def open_sqlite(
    path: Path, *, lease: float = LEASE_SECONDS, clock: Clock = utcnow, serving: bool = True
) -> SQLiteStore:
    """Open or make the database file.

    Args:
        path: the file; its folder exists.
        lease: seconds that a run's lease lasts.
        clock: for times that clients see and for the age of idempotency keys; leases go by the database's clock.
        serving: take the folder's lock and make every run found an orphan; false for the CLI beside a server.

    Raises:
        DataFolderInUse: another server serves from this folder.
        StoreUnavailable: the file can't be opened, or is no database.
    """
    return await asyncio.to_thread(SQLiteStore, path, lease=lease, clock=clock, serving=serving)
