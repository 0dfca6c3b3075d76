"""Migration 1: messages become BSON, and pages of older messages become one document per message.

Version 0.1.0, and the commits after it, stored a message as JSON text in `body`, compressed if it was large; its time
in `at` and all times of threads as milliseconds since 1970; the metadata of a thread as JSON text. A page was
{_id, thread_id, first, last, messages: [entry], keys: [key]}: entries that the thread no longer embedded. The record of
a run had its message in `partial`, in the same form as a body.

A thread is migrated in two steps: its pages are copied, then its document is replaced. After both it no longer looks
like one of 0.1.0. So a process that is killed leaves threads of both kinds, and the next one migrates the rest; a copy
that was made before is not made again. The pages are dropped after the last thread.

This module has its own copies of what it needs of the old code, since later versions change the rest.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime

import msgspec

from agent_chat.stores.errors import StoreUnavailable
from agent_chat.stores.models import Message
from agent_chat.stores.mongo.database import Collection, Collections
from agent_chat.stores.mongo.documents import (
    KEY_TIME,
    MEASURE_STAGES,
    EmbeddingLimits,
    Pipeline,
    build_older_messages,
    select_oldest,
)
from agent_chat.stores.mongo.native import Document, encode_value, from_millis, measure, pack

logger = logging.getLogger(__name__)

Renew = Callable[[], Awaitable[None]]

_AT_ONCE = 100
_PAGES_AT_ONCE = 4
_ZLIB = b"\x78"
_OLD_THREAD: Document = {"metadata": {"$type": "string"}}
_OLD_RUN: Document = {"partial": {"$type": "binData"}}
_UNREADABLE = (msgspec.DecodeError, zlib.error, KeyError, TypeError, ValueError)


async def store_natively(db: Collections, renew: Renew) -> None:
    """Migrate every thread and every record of a run. Raises: StoreUnavailable, also for a thread that is damaged."""
    count = 0
    async for thread_id in _find_ids(db.threads, _OLD_THREAD):
        try:
            await _migrate_thread(db, thread_id, renew)
        except _UNREADABLE as error:
            raise StoreUnavailable(f"thread {thread_id} cannot be migrated: {error!r:.200}") from error
        count += 1
        if count % 1000 == 0:
            logger.info("%d threads migrated", count)
    async for run_id in _find_ids(db.runs, _OLD_RUN):
        await renew()
        await _migrate_run(db, run_id)
    for deleted in await db.threads.find({"organization_id": None, "outbox.type": "thread.updated"}, {"outbox": 1}):
        await db.threads.update_one({"_id": deleted["_id"]}, {"$set": _convert_outbox(deleted)}, {"_id": 1})
    now = await db.now()
    for organization in await db.storage.find({}, {"_id": 1}):
        await db.storage.update_one({"_id": organization["_id"]}, {"$set": {"measure_at": now}}, {"_id": 1})
    await db.drop("pages")


async def _find_ids(collection: Collection, query: Document) -> AsyncIterator[str]:
    """The ids of all documents that match, in their order, so that none is looked at twice."""
    after = ""
    by_id = [("_id", 1)]
    while found := await collection.find({**query, "_id": {"$gt": after}}, {"_id": 1}, sort=by_id, limit=_AT_ONCE):
        for each in found:
            after = each["_id"]
            yield after


async def _migrate_run(db: Collections, run_id: str) -> None:
    run = await db.runs.find_one({"_id": run_id, **_OLD_RUN}, {"partial": 1})
    if run is not None:
        try:
            partial = (await pack(_decode_body(run["partial"]))).document
        except _UNREADABLE as error:  # such a record was left out by every version
            logger.error("The record of run %s cannot be read: %s", run_id, error)
            return
        changes: Pipeline = [{"$set": {"partial": {"$literal": partial}}}, {"$unset": "size"}]
        await db.runs.update_one({"_id": run_id, **_OLD_RUN}, changes, {"_id": 1})


async def _migrate_thread(db: Collections, thread_id: str, renew: Renew) -> None:
    await renew()
    old = await db.threads.find_one({"_id": thread_id, **_OLD_THREAD})
    if old is None:
        return
    now = await db.now()
    keys = await _read_keys(db, old, now)
    embedded = {entry["n"] for entry in old["messages"]}
    moved_bytes, first = 0, 0
    while pages := await db.pages.find(
        {"thread_id": thread_id, "first": {"$gte": first}}, sort=[("first", 1)], limit=_PAGES_AT_ONCE
    ):
        await renew()
        first = pages[-1]["first"] + 1
        for page in pages:
            entries = [await _convert_entry(each) for each in page["messages"] if each["n"] not in embedded]
            moved_bytes += await _insert(db, old | {"keys": keys}, entries)
    new = await _convert_thread(old, keys)
    while surplus := select_oldest(new, EmbeddingLimits()):  # text takes more room than it did compressed
        moved_bytes += await _insert(db, new, surplus)
        places = {entry["n"] for entry in surplus}
        for name in ("messages", "keys"):
            new[name] = [each for each in new[name] if each["n"] not in places]
    embedded = {entry["n"] for entry in new["messages"]}
    new["keys"] = [key for key in new["keys"] if key["n"] in embedded]
    if moved_bytes:
        new["moved_bytes"] = moved_bytes
    replacing = [{"$replaceWith": {"$literal": new}}, *MEASURE_STAGES]
    await db.threads.update_one({"_id": thread_id, **_OLD_THREAD}, replacing, {"_id": 1})


async def _insert(db: Collections, thread: Document, entries: list[Document]) -> int:
    """Insert the entries as moved messages, and return their bytes."""
    documents = build_older_messages(thread, entries)
    if documents:
        await db.older_messages.insert_missing(documents)
    return sum(map(measure, documents))


async def _read_keys(db: Collections, thread: Document, now: datetime) -> list[Document]:
    """The thread's keys that still count, wherever they were."""
    earliest = now - KEY_TIME
    query = {"thread_id": thread["_id"], "keys.at": {"$gt": round((earliest - from_millis(0)).total_seconds() * 1000)}}
    pages = await db.pages.find(query, {"keys": 1})
    keys = {key["n"]: key | {"at": from_millis(key["at"])} for each in (*pages, thread) for key in each["keys"]}
    return [keys[n] for n in sorted(keys) if keys[n]["at"] > earliest]


async def _convert_thread(old: Document, keys: list[Document]) -> Document:
    """The new document, without what pages had. `count` and `bytes` are measured when it is written."""
    kept = {name: value for name, value in old.items() if name not in ("metadata", "paged_bytes", "messages", "keys")}
    new = kept | {
        **encode_value("metadata", msgspec.json.decode(old["metadata"])),
        "created_at": from_millis(old["created_at"]),
        "updated_at": from_millis(old["updated_at"]),
        "running": old["running"] and old["running"] | {"at": from_millis(old["running"]["at"])},
        "messages": [await _convert_entry(entry) for entry in old["messages"]],
        "keys": keys,
        "pushed": [from_millis(at) for at in old["pushed"]],
        **_convert_outbox(old),
    }
    new["last_activity_at"] = from_millis(old.get("last_activity_at") or max(old["created_at"], old["pushed"][-1]))
    if "key_at" in old:
        new["key_at"] = from_millis(old["key_at"])
    return new


def _convert_outbox(old: Document) -> Document:
    """The outbox, in which updates are named by their time."""
    if "outbox" not in old:
        return {}
    return {
        "outbox": [
            entry | {"ref": from_millis(entry["ref"])} if isinstance(entry["ref"], int) else entry
            for entry in old["outbox"]
        ]
    }


async def _convert_entry(old: Document) -> Document:
    by = {"by": old["by"]} if "by" in old else {}
    entry = (await pack(_decode_body(old["body"]))).document
    return entry | {"created_at": from_millis(old["at"]), "n": old["n"], **by}


def _decode_body(body: bytes) -> Message:
    data = zlib.decompress(body) if body[:1] == _ZLIB else body
    return msgspec.json.decode(data, type=Message)
