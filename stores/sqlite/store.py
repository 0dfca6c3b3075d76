"""The embedded Store on one SQLite file. It survives `kill -9`: what it acknowledged is there at the next start."""

from __future__ import annotations

import asyncio
from pathlib import Path

from agent_chat.stores.contracts import LEASE_SECONDS
from agent_chat.stores.models import Clock, utcnow
from agent_chat.stores.sqlite.directory import SQLiteDirectory
from agent_chat.stores.sqlite.files import SQLiteFiles
from agent_chat.stores.sqlite.outbox import SQLiteOutbox
from agent_chat.stores.sqlite.runs import SQLiteRuns
from agent_chat.stores.sqlite.storage import SQLiteStorage
from agent_chat.stores.sqlite.threads import SQLiteThreads
from agent_chat.stores.sqlite.transfer import SQLiteTransfer
from agent_chat.stores.sqlite.usage import SQLiteUsage


class SQLiteStore(
    SQLiteThreads, SQLiteTransfer, SQLiteRuns, SQLiteFiles, SQLiteOutbox, SQLiteDirectory, SQLiteStorage, SQLiteUsage
):
    """All contracts; SQLiteRuns brings the messages."""


async def open_sqlite(
    path: Path, *, lease: float = LEASE_SECONDS, clock: Clock = utcnow, serving: bool = True
) -> SQLiteStore:
    """Open the database file, or create it.

    Args:
        path: the file; its folder exists.
        lease: how many seconds a run's lease lasts.
        clock: for times that clients see and for the age of idempotency keys; leases use the database's clock.
        serving: take the folder's lock and end all leases; False for the command line beside a server.

    Raises:
        DataFolderInUse: another server serves from this folder.
        DataFolderUnusable: the files cannot be made private.
        SchemaTooNew: a later version of the server wrote the data.
        StoreDamaged: the file is damaged, or is not a database.
        StoreUnavailable: the file cannot be opened.
    """
    return await asyncio.to_thread(SQLiteStore, path, lease=lease, clock=clock, serving=serving)
