"""The embedded Store: both contracts on one SQLite file. Survives `kill -9`; at start every run found is an orphan."""

from __future__ import annotations

import asyncio
from pathlib import Path

from stores.contracts import LEASE_SECONDS
from stores.models import Clock, utcnow
from stores.sqlite_directory import SQLiteDirectory
from stores.sqlite_storage import SQLiteStorage
from stores.sqlite_threads import SQLiteThreads


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
