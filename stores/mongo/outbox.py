"""The outbox of the ThreadStore contract on MongoDB: facts named by the write that stores them.

A thread with unpublished facts has {outbox: [{type, ref, cut?}], outbox_at}; all others, and documents of earlier
versions, have neither field. `ref` is a message's id, the time of an update, or the thread's id. From `outbox_at` on
any process may publish the facts. A separate collection was refused: it would need a second write, or a transaction.

A deleted thread's document has its organization in `owner`, and is not removed before its last fact is published.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from datetime import datetime

import msgspec

from agent_chat.stores.contracts import OUTBOX_BYTES_READ, OUTBOX_FACTS, OUTBOX_FACTS_READ, OUTBOX_LEASE, Outbox
from agent_chat.stores.errors import NotFound
from agent_chat.stores.events import Fact, MessageCreated, ThreadDeleted, ThreadUpdated, encode
from agent_chat.stores.models import Principal
from agent_chat.stores.mongo.documents import THREAD_FIELDS, Pipeline, build_thread
from agent_chat.stores.mongo.messages import MongoMessages
from agent_chat.stores.mongo.native import Document, to_date, unpack

logger = logging.getLogger(__name__)

_THREADS = 50
"""How many threads' outboxes are taken at once."""
_UNDECODABLE = (msgspec.DecodeError, zlib.error, KeyError, TypeError, ValueError)
_ENTRIES = {"$ifNull": ["$outbox", []]}
NO_FACTS: Document = {"outbox.0": {"$exists": False}}
"""A query for documents without unpublished facts."""


def add_fact_stage(type: str, ref: object, lease: float) -> Document:
    """A stage that puts a fact into the outbox and drops all but the newest OUTBOX_FACTS; `ref` is an expression."""
    entries: Document = _ENTRIES
    if type == ThreadUpdated.__struct_config__.tag:  # an update replaces the earlier ones
        stays = {"$or": [{"$ne": ["$$it.type", type]}, {"$eq": ["$$it.cut", True]}]}
        entries = {"$filter": {"input": entries, "as": "it", "cond": stays}}
    entries = {"$concatArrays": [entries, [{"type": type, "ref": ref}]]}
    newest = {"$slice": ["$$all", -OUTBOX_FACTS]}
    first = {"$mergeObjects": [{"$arrayElemAt": [newest, 0]}, {"cut": True}]}
    cut = {"$concatArrays": [[first], {"$slice": ["$$all", 1 - OUTBOX_FACTS]}]}
    bounded = {"$cond": [{"$gt": [{"$size": "$$all"}, OUTBOX_FACTS]}, cut, "$$all"]}
    due = {"$add": ["$$NOW", round(lease * OUTBOX_LEASE * 1000)]}
    return {
        "$set": {
            "outbox": {"$let": {"vars": {"all": entries}, "in": bounded}},
            "outbox_at": {"$min": ["$outbox_at", due]},
        }
    }


def _remove_pipeline(removed: Sequence[str | datetime]) -> Pipeline:
    """Remove the entries with these refs, and with an update (a date) the earlier ones, which it replaces."""
    refs = [ref for ref in removed if isinstance(ref, str)]
    times = [ref for ref in removed if isinstance(ref, datetime)]
    published: list[Document] = [{"$in": ["$$it.ref", refs]}]
    if times:
        earlier = {"$lte": ["$$it.ref", max(times)]}
        published.append({"$and": [{"$eq": ["$$it.type", ThreadUpdated.__struct_config__.tag]}, earlier]})
    left = {"$filter": {"input": _ENTRIES, "as": "it", "cond": {"$not": [{"$or": published}]}}}
    some = {"$gt": [{"$size": "$outbox"}, 0]}
    fields = {name: {"$cond": [some, f"${name}", "$$REMOVE"]} for name in ("outbox", "outbox_at")}
    return [{"$set": {"outbox": left}}, {"$set": fields}]


def fact_ref(fact: Fact) -> str | datetime:
    """Return what names a fact in the outbox: a message's or thread's id, or the time of an update."""
    match fact:
        case MessageCreated(message=message):
            return message.id
        case ThreadUpdated(thread=thread):
            return to_date(thread.updated_at)
        case ThreadDeleted(thread_id=thread_id):
            return thread_id


class MongoOutbox(MongoMessages):
    """The outboxes of threads in MongoDB."""

    async def take_outboxes(self, thread_id: str | None = None) -> list[Outbox]:
        if thread_id is None:
            waiting: Document = {"outbox_at": {"$lte": await self.db.now()}}
            due = await self.db.threads.find(waiting, {"_id": 1}, limit=_THREADS)
        else:
            waiting = {"outbox_at": {"$exists": True}}
            due = [{"_id": thread_id}]
        until = {"$add": ["$$NOW", round(self.lease * OUTBOX_LEASE * 1000)]}
        documents = [
            await self.db.threads.update_one(
                {"_id": each["_id"], **waiting},
                [{"$set": {"outbox_at": until}}],
                {**THREAD_FIELDS, "owner": 1, "outbox": {"$slice": OUTBOX_FACTS_READ}},
            )
            for each in due
        ]
        return [await self._read_outbox(document) for document in documents if document is not None]

    async def mark_published(self, principal: Principal, thread_id: str, facts: Sequence[Fact]) -> None:
        owners = [{"organization_id": principal.organization_id}, {"owner": principal.organization_id}]
        removing = _remove_pipeline([fact_ref(fact) for fact in facts])
        await self.db.threads.update_one({"_id": thread_id, "$or": owners}, removing, {"_id": 1})

    async def _read_outbox(self, document: Document) -> Outbox:
        """The facts that the document names, up to OUTBOX_BYTES_READ. Entries whose fact cannot be read are removed."""
        entries = document["outbox"]
        principal = Principal(document["organization_id"] or document["owner"], "")
        facts: list[Fact] = []
        removed: list[str | datetime] = []
        size = 0
        for entry in entries:
            try:
                fact = await self._read_fact(principal, document, entry)
            except (NotFound, *_UNDECODABLE) as error:
                if not isinstance(error, NotFound):
                    logger.error("Fact %s of thread %s is not published: %s", entry["ref"], document["_id"], error)
                removed.append(entry["ref"])
                continue
            size += len(encode(fact))
            if facts and size > OUTBOX_BYTES_READ:
                break
            facts.append(fact)
        if removed:
            await self.db.threads.update_one({"_id": document["_id"]}, _remove_pipeline(removed), {"_id": 1})
        return Outbox(document["_id"], principal.organization_id, facts, cut=bool(entries[0].get("cut")))

    async def _read_fact(self, principal: Principal, document: Document, entry: Document) -> Fact:
        """Raises: NotFound, or one of _UNDECODABLE."""
        match entry["type"]:
            case "message.created":
                _, found = await self._find_entry(principal, document["_id"], entry["ref"])
                return MessageCreated((await unpack(document["_id"], [found]))[0])
            case "thread.updated":
                return ThreadUpdated(build_thread(document))
            case _:
                return ThreadDeleted(document["_id"])
