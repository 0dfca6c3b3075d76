"""Which backends are in use: the only place that knows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from stores.contracts import EventLog, Store
from stores.memory_log import MemoryLog
from stores.sqlite import open_sqlite


async def open_store(data_dir: Path, *, serving: bool = True) -> Store:
    """Open the database; `serving` false beside a running server. Raises: DataFolderInUse."""
    await asyncio.to_thread(data_dir.mkdir, parents=True, exist_ok=True, mode=0o700)
    return await open_sqlite(data_dir / "chat.db", serving=serving)


@asynccontextmanager
async def open_backends(data_dir: Path) -> AsyncIterator[tuple[Store, EventLog]]:
    """The store and the log of a serving process, closed at the end."""
    store = await open_store(data_dir)
    log = MemoryLog()
    try:
        yield store, log
    finally:
        await log.close()
        await store.close()
