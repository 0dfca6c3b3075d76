"""The outbox on MongoDB: facts named in the thread's own document, by the write that stores them.

A thread with unpublished facts has {outbox: [{type, ref, cut?}], outbox_at}; all others, and documents of earlier
versions, have neither field. `ref` is a message's id, the time of an update, or the thread's id. From `outbox_at` on
the facts are anybody's to publish. A separate collection was refused: it would need a second write, or a transaction.

A deleted thread's document keeps its owner as `owner` and its last fact, and is not removed before that is published.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence

import msgspec

from agent_chat.stores.contracts import OUTBOX_BYTES_READ, OUTBOX_FACTS, OUTBOX_FACTS_READ, OUTBOX_LEASE, Outbox
from agent_chat.stores.errors import NotFound
from agent_chat.stores.events import Fact, MessageCreated, ThreadDeleted, ThreadUpdated, encode
from agent_chat.stores.models import Principal
from agent_chat.stores.mongo.documents import SHOWN, Document, Pipeline, millis, thread_of, unpack
from agent_chat.stores.mongo.pages import MongoPages

logger = logging.getLogger(__name__)

_THREADS = 50
_UNDECODABLE = (msgspec.DecodeError, zlib.error, KeyError, TypeError, ValueError)
_ENTRIES = {"$ifNull": ["$outbox", []]}
PUBLISHED: Document = {"outbox.0": {"$exists": False}}
"""What holds of a document without unpublished facts."""


def adding(type: str, ref: object, lease: float) -> Document:
    """A stage that puts a fact into the outbox; `ref` is an expression. Its newest OUTBOX_FACTS are kept."""
    entries: Document = _ENTRIES
    if type == ThreadUpdated.__struct_config__.tag:
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


def _removing(removed: Sequence[str | int]) -> Pipeline:
    """Remove the entries with these refs; with a thread.updated the earlier ones, which it replaces."""
    refs = [ref for ref in removed if isinstance(ref, str)]
    stamps = [ref for ref in removed if isinstance(ref, int)]
    published: list[Document] = [{"$in": ["$$it.ref", refs]}]
    if stamps:
        earlier = {"$lte": ["$$it.ref", max(stamps)]}
        published.append({"$and": [{"$eq": ["$$it.type", ThreadUpdated.__struct_config__.tag]}, earlier]})
    left = {"$filter": {"input": _ENTRIES, "as": "it", "cond": {"$not": [{"$or": published}]}}}
    some = {"$gt": [{"$size": "$outbox"}, 0]}
    fields = {name: {"$cond": [some, f"${name}", "$$REMOVE"]} for name in ("outbox", "outbox_at")}
    return [{"$set": {"outbox": left}}, {"$set": fields}]


def ref_of(fact: Fact) -> str | int:
    match fact:
        case MessageCreated(message=message):
            return message.id
        case ThreadUpdated(thread=thread):
            return millis(thread.updated_at)
        case ThreadDeleted(thread_id=thread_id):
            return thread_id


class MongoOutbox(MongoPages):
    async def take_outboxes(self, thread_id: str | None = None) -> list[Outbox]:
        if thread_id is None:
            waiting: Document = {"outbox_at": {"$lte": await self.db.now()}}
            due = await self.db.threads.many(waiting, {"_id": 1}, limit=_THREADS)
        else:
            waiting = {"outbox_at": {"$exists": True}}
            due = [{"_id": thread_id}]
        lease = {"$add": ["$$NOW", round(self.lease * OUTBOX_LEASE * 1000)]}
        taken = [
            await self.db.threads.change(
                {"_id": each["_id"], **waiting},
                [{"$set": {"outbox_at": lease}}],
                {**SHOWN, "owner": 1, "outbox": {"$slice": OUTBOX_FACTS_READ}},
            )
            for each in due
        ]
        return [await self._outbox(document) for document in taken if document is not None]

    async def mark_published(self, who: Principal, thread_id: str, facts: Sequence[Fact]) -> None:
        mine = [{"organization_id": who.organization_id}, {"owner": who.organization_id}]
        removing = _removing([ref_of(fact) for fact in facts])
        await self.db.threads.change({"_id": thread_id, "$or": mine}, removing, {"_id": 1})

    async def _outbox(self, document: Document) -> Outbox:
        entries = document["outbox"]
        who = Principal(document["organization_id"] or document["owner"], "")
        facts: list[Fact] = []
        removed: list[str | int] = []
        size = 0
        for entry in entries:
            try:
                fact = await self._fact(who, document, entry)
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
            await self.db.threads.change({"_id": document["_id"]}, _removing(removed), {"_id": 1})
        return Outbox(document["_id"], who.organization_id, facts, cut=bool(entries[0].get("cut")))

    async def _fact(self, who: Principal, document: Document, entry: Document) -> Fact:
        match entry["type"]:
            case "message.created":
                _, found = await self._entry(who, document["_id"], entry["ref"])
                return MessageCreated((await unpack([found]))[0])
            case "thread.updated":
                return ThreadUpdated(thread_of(document))
            case _:
                return ThreadDeleted(document["_id"])
