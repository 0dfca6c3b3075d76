"""The documents of the MongoDB store, without a driver: their shapes, what fits in them, the pipelines that write them.

A thread is one document:

    {_id, organization_id, agent_id, user_id, title, metadata, created_at, updated_at, archived,
     running: null | {id, n, at}, messages: [entry], keys: [key], total, pushed, fence, count, bytes,
     key_id?, key_fingerprint?, key_at?, outbox?, outbox_at?}

An entry is {id, n, at, size, body, by?}: a message's place in its thread, its time, and the whole of it as JSON text,
zipped where it is large (BSON has other numbers and keys than JSON, and a document ends at 16 MB). A key is {id, ref,
message_id, run_id, fingerprint, at, n, free}: what an Idempotency-Key stored; `ref` is never used twice. Times are
milliseconds since 1970, so that a pipeline can move one past another.

A page is {_id, thread_id, first, last, messages: [entry], keys: [key]}: messages `first` to `last` of its thread, none
missing, none of which can change any more. A page is written once and never changed. It counts once the thread no
longer embeds its first message: until then it says nothing that the thread doesn't say too. So moving is two writes,
each harmless to repeat, and whoever moves next takes up a page that was left behind.

A deleted thread is {_id, organization_id: null, owner, running, total, cleared, sweep_at, outbox, outbox_at} for a
minute: `cleared` tells that what it left was deleted once, `sweep_at` when a sweeper looks (again). `mongo_outbox` has
the last two.

`total` is the number of messages, `pushed` the times that the newest write appended (its last is the thread's last),
`paged_bytes` is what moving has taken out of it,
`fence` is raised by what a claim under way must not overlook (a move, a sweeper), `count` and `bytes` measure the
document. Keeping a list of pages in the thread was refused: 100,000 messages would make it, and every write, grow.
"""

from __future__ import annotations

import asyncio
import hashlib
import zlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from msgspec.structs import replace

from agent_chat.stores.contracts.storage import RECORD_BYTES
from agent_chat.stores.models import Idempotency, JSONObject, Message, Principal, Thread, timestamp

Document = dict[str, Any]
Pipeline = list[Document]

KEY_MILLIS = 24 * 3600 * 1000
DOCUMENT_BYTES = 16 * 2**20 - 2**16
"""MongoDB's limit, less what the fields around the messages may grow by in one write."""

LARGE = 2**20
PAGE_MESSAGES = 100
PAGE_BYTES = 4 * 2**20
_ENTRY_BYTES = 150
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ZLIB = b"\x78"

SHOWN: Document = dict.fromkeys(
    [
        "organization_id",
        "agent_id",
        "user_id",
        "title",
        "metadata",
        "created_at",
        "updated_at",
        "archived",
        "running",
        "total",
    ],
    1,
)
"""What is read to show a thread; its messages are asked for beside it."""

HEAD: Document = dict.fromkeys(["organization_id", "archived", "running", "total", "fence", "count", "bytes"], 1)
"""What is read to decide about a write, and answered by one."""


class Limits(msgspec.Struct, frozen=True):
    """What stays embedded: `keep` messages, `bytes` of them; `slack` more are let in before a page is made."""

    keep: int = 100
    slack: int = 50
    bytes: int = 4 * 2**20

    def exceeded(self, count: int, size: int) -> bool:
        return count > self.keep + self.slack or size > self.bytes


class Packed(msgspec.Struct, frozen=True):
    """A message as it is stored. `size`: its JSON; the body may be smaller."""

    id: str
    at: int
    size: int
    body: bytes


def millis(stamp: str) -> int:
    return (datetime.fromisoformat(stamp) - _EPOCH) // timedelta(milliseconds=1)


def stamp(at: int) -> str:
    return timestamp(_EPOCH + timedelta(milliseconds=at))


async def pack(message: Message) -> Packed:
    body = msgspec.json.encode(message)
    size = len(body)
    if size > LARGE:
        body = await asyncio.to_thread(zlib.compress, body, 1)
    return Packed(message.id, millis(message.created_at), size, body)


async def unpack(entries: Sequence[Document]) -> list[Message]:
    if any(entry["size"] > LARGE for entry in entries):
        return await asyncio.to_thread(_unpacked, entries)
    return _unpacked(entries)


def _unpacked(entries: Sequence[Document]) -> list[Message]:
    return [replace(unpack_body(entry["body"]), created_at=stamp(entry["at"])) for entry in entries]


def unpack_body(body: bytes) -> Message:
    data = zlib.decompress(body) if body[:1] == _ZLIB else body
    return msgspec.json.decode(data, type=Message)


def json_text(value: JSONObject) -> str:
    return msgspec.json.encode(value).decode()


def entry_of(packed: Packed, n: object, at: object) -> Document:
    """`n` and `at`: numbers, or expressions of a pipeline."""
    return {"id": packed.id, "n": n, "at": at, "size": packed.size, "body": packed.body}


def thread_document(who: Principal, thread: Thread) -> Document:
    return {
        "_id": thread.id,
        "organization_id": who.organization_id,
        "agent_id": thread.agent_id,
        "user_id": who.user_id,
        "title": thread.title,
        "metadata": json_text(thread.metadata),
        "created_at": millis(thread.created_at),
        "updated_at": millis(thread.updated_at),
        "archived": thread.archived,
        "running": None,
        "messages": [],
        "keys": [],
        "total": 0,
        "pushed": [-(2**53)],
        "fence": 0,
        "count": 0,
        "bytes": RECORD_BYTES + len(thread.metadata and json_text(thread.metadata)) + len(thread.title),
    }


def thread_of(document: Document, messages: list[Message] | None = None) -> Thread:
    return Thread(
        id=document["_id"],
        agent_id=document["agent_id"],
        user_id=document["user_id"],
        organization_id=document["organization_id"],
        title=document["title"],
        metadata=msgspec.json.decode(document["metadata"]),
        created_at=stamp(document["created_at"]),
        updated_at=stamp(document["updated_at"]),
        archived=document["archived"],
        messages=messages or [],
    )


def key_id(*parts: str) -> str:
    """One name for a key and all that it belongs to."""
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def key_of(id: str, idempotency: Idempotency, message_id: str, run_id: str | None, now: int) -> Document:
    return {
        "id": id,
        "ref": run_id or message_id,
        "message_id": message_id,
        "run_id": run_id,
        "fingerprint": idempotency.fingerprint,
        "at": now,
        "free": False,
    }


# pipelines


def _literal(value: object) -> Document:
    """A value that is none of the language's own: a title may begin with `$`."""
    return {"$literal": value}


def writing(now: int, *stages: Document, fact: Document | None = None) -> Pipeline:
    """Stages, and what every write to a thread does: move `updated_at` on, and measure.

    `fact`: the stage that puts what is written into the outbox (`mongo_outbox.adding`).
    """
    touch = {"$set": {"updated_at": {"$max": [now, {"$add": ["$updated_at", 1]}]}}}
    return [*stages, touch, *([fact] if fact else []), *MEASURE]


MEASURE: Pipeline = [{"$set": {"count": {"$size": "$messages"}, "bytes": {"$bsonSize": "$$ROOT"}}}]


def changing(title: str | None, archived: bool | None) -> Document:
    given = {"title": title, "archived": archived}
    return {"$set": {name: _literal(value) for name, value in given.items() if value is not None}}


def pushing(messages: Sequence[Packed], key: Document | None, run: str | None, now: int) -> list[Document]:
    """Append the messages, each later than the one before it; keep the key; take the thread for the run."""
    times: list[Document] = []
    before: Document = {"$arrayElemAt": ["$pushed", -1]}
    for message in messages:
        before = {"$max": [message.at, {"$add": [before, 1]}]}
        times.append(before)
    entries = [
        entry_of(message, {"$add": ["$total", index]}, {"$arrayElemAt": ["$pushed", index]})
        | {"id": _literal(message.id)}
        for index, message in enumerate(messages)
    ]
    sets: Document = {
        "messages": {"$concatArrays": ["$messages", entries]},
        "total": {"$add": ["$total", len(entries)]},
    }
    if run is not None:
        last = entries[-1]
        sets["running"] = {"id": _literal(run), "n": last["n"], "at": last["at"]}
    if key is not None:
        kept = {"$and": [{"$gt": ["$$key.at", now - KEY_MILLIS]}, {"$ne": ["$$key.id", key["id"]]}]}
        fresh = {name: _literal(value) for name, value in key.items()} | {"n": "$total"}
        sets["keys"] = {
            "$concatArrays": [{"$filter": {"input": "$keys", "as": "key", "cond": kept}}, [fresh]],
        }
    return [{"$set": {"pushed": times}}, {"$set": sets}]


def finishing(message: Packed, by: str, *, frees: bool) -> Document:
    """Replace the message, release the thread, and free the run's key."""
    final = {"size": message.size, "body": message.body, "by": _literal(by)}
    sets: Document = {
        "running": None,
        "messages": _where("messages", {"$eq": ["$$it.id", _literal(message.id)]}, final),
    }
    if frees:
        sets["keys"] = _where("keys", {"$eq": ["$$it.ref", _literal(message.id)]}, {"free": True})
    return {"$set": sets}


def _where(field: str, condition: Document, changes: Document) -> Document:
    merged = {"$mergeObjects": ["$$it", changes]}
    return {"$map": {"input": f"${field}", "as": "it", "in": {"$cond": [condition, merged, "$$it"]}}}


def covering(page: Document) -> Pipeline:
    """Take what the page holds out of the thread: from now on it counts."""
    outside = {"$or": [{"$lt": ["$$it.n", page["first"]]}, {"$gt": ["$$it.n", page["last"]]}]}
    refs = _literal([key["ref"] for key in page["keys"]])
    elsewhere = {"$not": [{"$in": ["$$it.ref", refs]}]}
    sets = {
        "messages": {"$filter": {"input": "$messages", "as": "it", "cond": outside}},
        "keys": {"$filter": {"input": "$keys", "as": "it", "cond": elsewhere}},
        "fence": {"$add": ["$fence", 1]},
    }
    moved: Document = {"$subtract": ["$bytes", {"$bsonSize": "$$ROOT"}]}
    paged = {"paged_bytes": {"$add": [{"$ifNull": ["$paged_bytes", 0]}, moved]}}
    return [{"$set": sets}, {"$set": paged}, *MEASURE]


# what to move


def next_page(document: Document, limits: Limits, *, everything: bool = False) -> Document | None:
    """The page to make of a thread's oldest messages; null if all may stay. The message of a run always stays."""
    running = (document["running"] or {}).get("id")
    chunk = _oldest(document["messages"], running, limits, everything=everything)
    if not chunk:
        return None
    keys = [key for key in document["keys"][: -limits.keep] if key["ref"] != running]
    return {
        "_id": f"{document['_id']}/{chunk[0]['n']}",
        "thread_id": document["_id"],
        "first": chunk[0]["n"],
        "last": chunk[-1]["n"],
        "messages": chunk,
        "keys": keys,
    }


def _oldest(entries: list[Document], running: str | None, limits: Limits, *, everything: bool) -> list[Document]:
    """The oldest messages that needn't stay: as many as one page takes, with none missing between them."""
    chunk: list[Document] = []
    size = 0
    for entry in entries[: _movable(entries, limits, everything=everything)]:
        size += _weight(entry)
        if chunk and (entry["n"] != chunk[-1]["n"] + 1 or len(chunk) == PAGE_MESSAGES or size > PAGE_BYTES):
            break
        if entry["id"] != running:
            chunk.append(entry)
        elif chunk:
            break
        else:
            size = 0
    return chunk


def _movable(entries: list[Document], limits: Limits, *, everything: bool) -> int:
    """How many of the oldest entries are past what stays; where bytes overflow, half is cleared at once."""
    total = sum(map(_weight, entries))
    if everything or not limits.exceeded(len(entries), total):
        return len(entries) if everything else 0
    room = limits.bytes if total <= limits.bytes else limits.bytes // 2
    size = 0
    for kept, entry in enumerate(reversed(entries)):
        size += _weight(entry)
        if kept >= limits.keep or (size > room and not (kept == 0 and size <= limits.bytes)):
            return len(entries) - kept
    return 0


def _weight(entry: Document) -> int:
    return len(entry["body"]) + _ENTRY_BYTES


# what to read


def tail_of(document: Document, limit: int) -> list[Document]:
    """The embedded entries that are the thread's latest, oldest first: none is missing between or behind them."""
    entries: list[Document] = document.get("messages", [])
    count = 0
    while count < min(limit, len(entries)) and entries[-1 - count]["n"] == document["total"] - 1 - count:
        count += 1
    return entries[len(entries) - count :]
