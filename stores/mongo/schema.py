"""The version of the data in the database, and the lock under which migrations change it.

The collection `meta` has {_id: "schema", version}: how many migrations the data have had. Databases written before
versions existed have no such document, like a new one: both have version 0 and run every migration.

The lock is {_id: "migration", holder, until} beside it. Of several processes that start, one migrates and the others
wait until the version is right. The lock of a process that died expires by the database's clock. So a process that was
only slow may find that another has taken over: each migration is a series of writes that may be repeated, by two
processes at the same time too. A migration in one transaction was refused: it would not fit MongoDB's limits.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from agent_chat.stores.errors import SchemaTooNew, StoreUnavailable
from agent_chat.stores.models import new_id
from agent_chat.stores.mongo.database import Collections
from agent_chat.stores.mongo.native import Document
from agent_chat.stores.mongo.native_migration import store_natively

logger = logging.getLogger(__name__)

LOCK_SECONDS = 60.0
"""How long the lock of a process that died stops the others."""
_POLL_SECONDS = 0.2

Renew = Callable[[], Awaitable[None]]

MIGRATIONS: tuple[Callable[[Collections, Renew], Awaitable[None]], ...] = (store_natively,)
"""The migration at index n brings data of version n to version n + 1. Those that were released never change.

Each calls its second argument between steps of less than a few seconds, which keeps the lock.
"""


async def migrate(db: Collections, name: str) -> None:
    """Bring the data to this code's version, or wait until another process has. `name`: of the database, for people.

    Raises: SchemaTooNew, StoreUnavailable.
    """
    lock = _Lock(db)
    waiting = False
    while (version := await _read_version(db, name)) < len(MIGRATIONS):
        if await lock.take():
            try:
                if await _read_version(db, name) == version:
                    await _run(db, version, lock.renew)
            finally:
                await lock.release()
        else:
            if not waiting:
                logger.info("Waiting for another process that migrates the database")
            waiting = True
            await asyncio.sleep(_POLL_SECONDS)


async def _run(db: Collections, version: int, renew: Renew) -> None:
    if await db.organizations.find_one({}, {"_id": 1}) is not None:
        logger.info("Migrating the database from schema version %d to %d", version, version + 1)
    await MIGRATIONS[version](db, renew)
    await db.meta.update_one({"_id": "schema"}, {"$max": {"version": version + 1}}, upsert=True)


async def _read_version(db: Collections, name: str) -> int:
    schema = await db.meta.find_one({"_id": "schema"})
    version = int(schema["version"]) if schema else 0
    if version > len(MIGRATIONS):
        raise SchemaTooNew(f"database {name}", version, len(MIGRATIONS))
    return version


class _Lock:
    def __init__(self, db: Collections) -> None:
        self._db = db
        self._holder = new_id()
        self._renewed_at = 0.0

    async def take(self) -> bool:
        """Take the lock if no other process has it."""
        free = {"_id": "migration", "until": {"$lte": await self._db.now()}}
        return await self._write(free, upsert=True)

    async def renew(self) -> None:
        """Renew the lock if that is due. Raises: StoreUnavailable if another process has taken it."""
        if time.monotonic() < self._renewed_at + LOCK_SECONDS / 4:
            return
        if not await self._write({"_id": "migration", "holder": self._holder}):
            raise StoreUnavailable("another process has taken over the migration")

    async def release(self) -> None:
        with suppress(StoreUnavailable):  # it expires
            await self._db.meta.delete_one({"_id": "migration", "holder": self._holder})

    async def _write(self, query: Document, *, upsert: bool = False) -> bool:
        self._renewed_at = time.monotonic()
        until = {"$add": ["$$NOW", round(LOCK_SECONDS * 1000)]}
        changes = [{"$set": {"holder": self._holder, "until": until}}]
        return await self._db.meta.update_one(query, changes, {"_id": 1}, upsert=upsert) is not None
