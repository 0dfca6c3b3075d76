"""The shared Store on MongoDB, for any number of processes. The only module that imports the driver.

It implements `database.Collection` with motor, and puts the operations of the modules beside it together. Of motor only
those calls are used that PyMongo's own asyncio API has too (all but `close` and `aggregate`). Writes are acknowledged
by a majority; reads go to the primary and see only what a majority has; the driver repeats a write whose response was
lost, and the server applies it once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from bson.codec_options import CodecOptions, TypeDecoder, TypeRegistry
from bson.int64 import Int64
from motor.motor_asyncio import AsyncIOMotorClient, AsyncIOMotorCollection
from pymongo import IndexModel, ReadPreference, ReturnDocument
from pymongo.errors import BulkWriteError, ConfigurationError, DuplicateKeyError, OperationFailure, PyMongoError
from pymongo.read_concern import ReadConcern
from pymongo.write_concern import WriteConcern

from agent_chat.stores.contracts import LEASE_SECONDS
from agent_chat.stores.errors import StoreUnavailable
from agent_chat.stores.models import Clock, utcnow
from agent_chat.stores.mongo.database import Collection
from agent_chat.stores.mongo.directory import MongoDirectory
from agent_chat.stores.mongo.documents import Pipeline
from agent_chat.stores.mongo.native import Document
from agent_chat.stores.mongo.runs import MongoRuns
from agent_chat.stores.mongo.schema import migrate
from agent_chat.stores.mongo.transfer import MongoTransfer

DATABASE = "chat"
_PROBE = "probe"
_DUPLICATE_KEY = 11000
OPTIONS: dict[str, Any] = {
    "serverSelectionTimeoutMS": 5000,
    "connectTimeoutMS": 5000,
    "timeoutMS": 5000,
    "retryWrites": True,
    "retryReads": True,
}
"""Options of the client, which the URL may override.

`timeoutMS` bounds a whole call with its retries, so that a MongoDB that hangs is reported within five seconds and not
after one timeout per attempt. Set `timeoutMS=0` for a start that builds an index over many threads.
"""

INDEXES = {
    "threads": [
        IndexModel(
            [("organization_id", 1), ("agent_id", 1), ("archived", 1), ("last_activity_at", -1), ("_id", -1)],
            name="activity",
        ),
        IndexModel([("organization_id", 1), ("_id", 1)], name="id"),
        IndexModel("key_id", name="key", unique=True, sparse=True),
        IndexModel("external_key", name="external_key", unique=True, sparse=True),
        IndexModel([("organization_id", 1), ("agent_id", 1), ("external_id", 1), ("archived", 1)], name="external_id"),
        IndexModel([("organization_id", 1), ("bytes", 1), ("moved_bytes", 1)], name="bytes"),
        IndexModel("sweep_at", name="sweep", sparse=True),
        IndexModel("outbox_at", name="outbox", sparse=True),
    ],
    "older_messages": [
        IndexModel([("thread_id", 1), ("n", 1)], name="place"),
        IndexModel([("thread_id", 1), ("id", 1)], name="id"),
        IndexModel("key.id", name="key", sparse=True),
    ],
    "runs": [IndexModel("lease", name="lease"), IndexModel("thread_id", name="thread")],
    "attachments": [
        IndexModel([("organization_id", 1), ("size", 1), ("text_bytes", 1)], name="stored"),
        IndexModel("thread_id", name="thread"),
    ],
    "organizations": [IndexModel("name", name="name", unique=True)],
    "users": [IndexModel([("organization_id", 1), ("name", 1)], name="name", unique=True)],
    "keys": [
        IndexModel("hash", name="hash", unique=True, partialFilterExpression={"valid": True}),
        IndexModel("order", name="order"),
        IndexModel([("source", 1), ("valid", 1), ("held_at", 1)], name="held"),
    ],
    "sessions": [
        IndexModel("expires_at", name="expiry"),
        IndexModel([("key_id", 1), ("created_at", -1)], name="key"),
    ],
    "agents": [IndexModel([("organization_id", 1), ("deleted", 1), ("order", 1)], name="list")],
    "storage": [IndexModel("measure_at", name="measure")],
    "usage": [
        IndexModel([("organization_id", 1), ("day", 1)], name="day"),
        IndexModel([("rolled_up", 1), ("day", 1)], name="rolled_up"),
    ],
    "removals": [IndexModel("due", name="due"), IndexModel("organization_id", name="organization")],
}
WITHOUT_INDEXES = ("meta", "pages")
UNUSED_INDEXES = {"attachments": ["kept"], "threads": ["page", "stored"]}
"""Indexes that earlier versions created and no query uses any more."""


class _PlainInt(TypeDecoder):
    """Decodes integers of 64 bits as int: the driver's own type for them cannot be encoded as JSON."""

    bson_type = Int64

    def transform_bson(self, value: int) -> int:
        return int(value)


@contextmanager
def translated_errors() -> Iterator[None]:
    """Raises StoreUnavailable in place of any error of the driver."""
    try:
        yield
    except PyMongoError as error:
        reason, _, _ = str(error).partition(", Topology Description")
        raise StoreUnavailable(f"{type(error).__name__}: {reason[:200]}") from error


class MotorCollection:
    """A `database.Collection`, implemented with motor.

    Args:
        report: called after each call with whether it failed, and whether it was a write.
    """

    def __init__(self, motor: AsyncIOMotorCollection[Document], report: Callable[[bool, bool], None]) -> None:
        self._motor = motor
        self._report = report

    @contextmanager
    def _calling(self, *, writes: bool) -> Iterator[None]:
        try:
            with translated_errors():
                yield
        except StoreUnavailable:
            self._report(True, writes)
            raise
        self._report(False, writes)

    async def find_one(self, query: Document, fields: Document | None = None) -> Document | None:
        with self._calling(writes=False):
            return await self._motor.find_one(query, fields)

    async def find(
        self,
        query: Document,
        fields: Document | None = None,
        *,
        sort: list[tuple[str, int]] | None = None,
        skip: int = 0,
        limit: int = 0,
    ) -> list[Document]:
        with self._calling(writes=False):
            return await self._motor.find(query, fields, sort=sort, skip=skip, limit=limit).to_list(None)

    async def find_joined(self, query: Document, other: str, field: str) -> list[Document]:
        lookup = {"from": other, "localField": field, "foreignField": "_id", "as": other}
        with self._calling(writes=False):
            return await self._motor.aggregate([{"$match": query}, {"$lookup": lookup}]).to_list(None)

    async def insert(self, document: Document) -> bool:
        with self._calling(writes=True):
            try:
                await self._motor.insert_one(document)
            except DuplicateKeyError:
                return False
            return True

    async def insert_missing(self, documents: list[Document]) -> None:
        with self._calling(writes=True):
            try:
                await self._motor.insert_many(documents, ordered=False)
            except BulkWriteError as error:
                failures = [each for each in error.details["writeErrors"] if each["code"] != _DUPLICATE_KEY]
                if failures:  # the error itself has the documents in its text
                    raise OperationFailure(failures[0]["errmsg"]) from None

    async def update_one(
        self,
        query: Document,
        update: Document | Pipeline,
        fields: Document | None = None,
        *,
        before: bool = False,
        upsert: bool = False,
    ) -> Document | None:
        which = ReturnDocument.BEFORE if before else ReturnDocument.AFTER
        with self._calling(writes=True):
            try:
                return await self._motor.find_one_and_update(
                    query, update, fields, upsert=upsert, return_document=which
                )
            except DuplicateKeyError:
                return None

    async def aggregate(self, pipeline: Pipeline) -> list[Document]:
        with self._calling(writes=False):
            return await self._motor.aggregate(pipeline).to_list(None)

    async def sum_up(self, query: Document, value: Document | str) -> int:
        found = await self.aggregate([{"$match": query}, {"$group": {"_id": None, "total": {"$sum": value}}}])
        return int(found[0]["total"]) if found else 0

    async def delete_one(self, query: Document) -> None:
        with self._calling(writes=True):
            await self._motor.delete_one(query)

    async def delete_many(self, query: Document) -> None:
        with self._calling(writes=True):
            await self._motor.delete_many(query)


class MotorCollections:
    """The `database.Collections`, implemented with motor. The URL names the database."""

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

    def __init__(self, url: str, **options: Any) -> None:
        try:
            given = {name.lower() for name, _ in parse_qsl(urlsplit(url).query)}
            defaults = {name: value for name, value in OPTIONS.items() if name.lower() not in given}
            self._client: AsyncIOMotorClient[Document] = AsyncIOMotorClient(url, **(defaults | options))
        except (ConfigurationError, ValueError) as error:
            raise ValueError(f"this MongoDB URL is not understood: {error}") from error
        self._database = self._client.get_default_database(
            DATABASE,
            read_preference=ReadPreference.PRIMARY,
            write_concern=WriteConcern("majority"),
            read_concern=ReadConcern("majority"),
            codec_options=CodecOptions(type_registry=TypeRegistry([_PlainInt()])),
        )
        self.failing = False
        self.failures = 0
        for name in (*INDEXES, *WITHOUT_INDEXES):
            setattr(self, name, MotorCollection(self._database[name], self._report))

    def _report(self, failed: bool, writes: bool) -> None:
        self.failures += failed
        if writes:
            self.failing = failed

    async def prepare(self) -> None:
        """Migrate the data, create the indexes that are missing, and drop those that no query uses any more."""
        await migrate(self, self._database.name)
        with translated_errors():
            for name, indexes in INDEXES.items():
                await self._database[name].create_indexes(indexes)
            for name, unused in UNUSED_INDEXES.items():
                for index in set(unused).intersection(await self._database[name].index_information()):
                    with suppress(OperationFailure):  # another process has just dropped it
                        await self._database[name].drop_index(index)

    async def drop(self, name: str) -> None:
        with translated_errors():
            await self._database.drop_collection(name)

    async def now(self) -> datetime:
        with translated_errors():
            hello = await self._database.command("hello")
        if not hello["isWritablePrimary"]:
            raise StoreUnavailable("the server accepts no writes now")
        now: datetime = hello["localTime"]
        return now

    async def close(self) -> None:
        self._client.close()


class MongoStore(MongoRuns, MongoTransfer, MongoDirectory):
    """The whole store in MongoDB."""

    @property
    def failures(self) -> int:
        return self.db.failures

    async def ready(self) -> bool:
        try:
            now = await self.db.now()
            if self.db.failing:  # a full disk refuses only writes: a write shows whether there is room again
                await self.db.storage.update_one({"_id": _PROBE}, {"$set": {"probed_at": now}}, {"_id": 1}, upsert=True)
        except StoreUnavailable:
            return False
        return True

    async def close(self) -> None:
        await self.db.close()


async def open_mongo(url: str, *, lease: float = LEASE_SECONDS, clock: Clock = utcnow) -> MongoStore:
    """Open the database that the URL names (`chat` if it names none), migrate its data, and create its indexes.

    Args:
        url: mongodb:// or mongodb+srv://. Its options override OPTIONS. Its concerns and read preference are ignored:
            reads must be exact, so they go to the primary.
        lease: how many seconds a run's lease lasts.
        clock: for times that clients see and for the age of idempotency keys; leases use the database's clock.

    Raises:
        ValueError: the URL is wrong.
        StoreUnavailable: the database does not respond.
        SchemaTooNew: a later version wrote the data.
    """
    db = MotorCollections(url)
    try:
        await db.prepare()
    except BaseException:
        await db.close()
        raise
    return MongoStore(db, lease=lease, clock=clock)
