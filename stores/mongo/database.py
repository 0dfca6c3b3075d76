"""What the MongoDB store needs of a driver: nine calls on a collection, and the database's clock.

`store` implements them with motor; the operations in `threads`, `messages`, `runs`, `outbox`, `storage` and `directory`
know no driver. So errors become StoreUnavailable in one place, tests can count and break every command, and PyMongo's
own asyncio API can replace motor. Transactions were refused: every promise of the contracts is one document write.
"""

from __future__ import annotations

from datetime import datetime
from typing import Protocol

from agent_chat.stores.models import Clock, new_id, timestamp
from agent_chat.stores.mongo.documents import EmbeddingLimits, Pipeline
from agent_chat.stores.mongo.native import Document, to_date


class Collection(Protocol):
    """Each method is one command, but for long results. All may raise StoreUnavailable.

    A write that raised may have been done all the same.
    """

    async def find_one(self, query: Document, fields: Document | None = None) -> Document | None: ...

    async def find(
        self,
        query: Document,
        fields: Document | None = None,
        *,
        sort: list[tuple[str, int]] | None = None,
        skip: int = 0,
        limit: int = 0,
    ) -> list[Document]: ...

    async def find_joined(self, query: Document, other: str, field: str) -> list[Document]:
        """The documents that match, each with the list of those of the collection `other` whose `_id` is in `field`.

        That list is under the name of the other collection.
        """
        ...

    async def insert(self, document: Document) -> bool:
        """Insert it; False if its `_id` or another unique key exists."""
        ...

    async def insert_missing(self, documents: list[Document]) -> None:
        """Insert those whose `_id` does not exist yet, in any order."""
        ...

    async def update_one(
        self,
        query: Document,
        update: Document | Pipeline,
        fields: Document | None = None,
        *,
        before: bool = False,
        upsert: bool = False,
    ) -> Document | None:
        """Update one document and return it, as it is after the update or, with `before`, as it was.

        None if no document matches; with `upsert`, None if another document has the `_id`.
        """
        ...

    async def aggregate(self, pipeline: Pipeline) -> list[Document]: ...

    async def sum_up(self, query: Document, value: Document | str) -> int:
        """The sum of an expression over the documents that match."""
        ...

    async def delete_one(self, query: Document) -> None:
        """Delete one document, if it exists."""
        ...

    async def delete_many(self, query: Document) -> None: ...


class Collections(Protocol):
    """One database.

    Attributes:
        pages: exists in databases of versions before the first schema version only.
        failing: the last write failed.
        failures: how many calls have failed.
    """

    threads: Collection
    older_messages: Collection
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
    usage: Collection
    meta: Collection
    failing: bool
    failures: int

    async def now(self) -> datetime:
        """The clock of the server that takes writes."""
        ...

    async def drop(self, name: str) -> None:
        """Drop a collection, if it exists."""
        ...

    async def close(self) -> None: ...


class MongoBase:
    """The base of the operations.

    Args:
        lease: how many seconds a run's lease lasts.
        clock: for times that clients see and for the age of idempotency keys; leases use the database's clock.
        limits: how much of a thread stays in its document.

    Attributes:
        id: tells this process' writes from those of others.
    """

    def __init__(self, db: Collections, *, lease: float, clock: Clock, limits: EmbeddingLimits | None = None) -> None:
        self.db = db
        self.lease = lease
        self.clock = clock
        self.limits = limits or EmbeddingLimits()
        self.id = new_id()

    def now(self) -> datetime:
        """The process' clock, as BSON stores it."""
        return to_date(timestamp(self.clock()))
