"""What the MongoDB store asks of a driver: seven calls on a collection, and the database's clock.

`mongo` makes them of motor; the verbs in `mongo_pages`, `mongo_threads`, `mongo_runs` and `mongo_directory` know no
driver. So errors are turned into StoreUnavailable in one place, tests can count and break every command, and
PyMongo's own asyncio API can take motor's place. Transactions were refused: every promise is one document write.
"""

from __future__ import annotations

from datetime import datetime
from typing import Protocol

from agent_chat.stores.models import Clock, new_id
from agent_chat.stores.mongo.documents import Document, Limits, Pipeline


class Collection(Protocol):
    """Every call may raise StoreUnavailable; a write that did may have happened all the same."""

    async def one(self, query: Document, fields: Document | None = None) -> Document | None: ...

    async def many(
        self,
        query: Document,
        fields: Document | None = None,
        *,
        sort: list[tuple[str, int]] | None = None,
        skip: int = 0,
        limit: int = 0,
    ) -> list[Document]: ...

    async def insert(self, document: Document) -> bool:
        """False if its `_id` or another unique key is there already."""
        ...

    async def change(
        self,
        query: Document,
        update: Document | Pipeline,
        fields: Document | None = None,
        *,
        before: bool = False,
        upsert: bool = False,
    ) -> Document | None:
        """Change one document and answer with it, as it is now or as it was `before`.

        Null if none matches; with `upsert`, if another has the `_id`.
        """
        ...

    async def total(self, query: Document, value: Document | str) -> int:
        """The sum of an expression over the documents that match."""
        ...

    async def remove(self, query: Document) -> None:
        """Delete one document, if it is there."""
        ...

    async def remove_all(self, query: Document) -> None: ...


class Collections(Protocol):
    """One database."""

    threads: Collection
    pages: Collection
    runs: Collection
    attachments: Collection
    organizations: Collection
    users: Collection
    keys: Collection
    sessions: Collection
    agents: Collection
    storage: Collection
    removals: Collection
    failing: bool
    """The last write failed."""
    failures: int
    """How many calls have failed."""
    """The last write failed."""

    async def now(self) -> datetime:
        """The clock of the server that takes writes."""
        ...

    async def close(self) -> None: ...


class Database:
    """What every verb has at hand.

    Args:
        lease: seconds that a run's lease lasts.
        clock: for times that clients see and for the age of idempotency keys; leases go by the database's clock.
    """

    def __init__(self, db: Collections, *, lease: float, clock: Clock, limits: Limits | None = None) -> None:
        self.db = db
        self.lease = lease
        self.clock = clock
        self.limits = limits or Limits()
        self.id = new_id()

    def now(self) -> int:
        return int(self.clock().timestamp() * 1000)
