"""The documents of the MongoDB store: their shapes, what fits into them, the pipelines that write them. No driver.

A thread is one document:

    {_id, organization_id, agent_id, user_id, title, metadata, created_at, updated_at, last_activity_at, archived,
     running: null | {id, n, at}, messages: [entry], keys: [key], total, pushed, fence, count, bytes, paged_bytes?,
     external_id?, external_key?, key_id?, key_fingerprint?, key_at?, outbox?, outbox_at?}

- An entry is {id, n, at, size, body, by?}: a message's place in its thread, its time, and the whole message as JSON
  text, compressed if it is large. It is not stored as BSON, whose numbers and keys differ from those of JSON. `by`
  names the finish that wrote it.
- A key is {id, ref, message_id, run_id, fingerprint, at, n, free}: what an Idempotency-Key stored. `ref` is never used
  twice; `free` as in `rules.UsedKey`.
- `total` is the number of messages; `pushed` has the times that the newest write appended, so its last is the thread's
  last. `count` and `bytes` measure the document; `paged_bytes` is how much moving has taken out of it.
- `external_key` is what makes `external_id` unique: a hash of it with the organization, the user and the agent.
- `fence` is incremented by writes that must make a claim under way fail: moving messages, and a sweeper that takes over
  the claim's record.
- Times are milliseconds since 1970, so that a pipeline can move one past another.

A page is {_id, thread_id, first, last, messages: [entry], keys: [key]}: the messages `first` to `last` of its thread,
without gaps, none of which can change any more. A page is written once and never changed. It is valid once the thread
no longer embeds its first message; until then it repeats what the thread contains. So moving takes two writes, each of
which may be repeated without harm, and the next process that moves continues with a page that was left behind.

A deleted thread is {_id, organization_id: null, owner, running, total, stored, cleared, sweep_at, outbox, outbox_at}
for about a minute: `cleared` is true once what belongs to it was deleted for the first time, and from `sweep_at` on a
sweeper deletes it (again). `outbox.py` describes the last two fields.

Storing a list of pages in the thread was refused: with 100,000 messages it would make the thread, and each write, grow.
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
from agent_chat.stores.rules import KEY_SECONDS, UsedKey

Document = dict[str, Any]
Pipeline = list[Document]

KEY_MILLIS = KEY_SECONDS * 1000
DOCUMENT_BYTES = 16 * 2**20 - 2**16
"""MongoDB's limit, minus what the fields around the messages may grow by in one write."""

LARGE = 2**20
PAGE_MESSAGES = 100
PAGE_BYTES = 4 * 2**20
_ENTRY_BYTES = 150
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ZLIB = b"\x78"

THREAD_FIELDS: Document = dict.fromkeys(
    [
        "organization_id",
        "agent_id",
        "user_id",
        "title",
        "metadata",
        "created_at",
        "updated_at",
        "archived",
        "external_id",
        "running",
        "total",
    ],
    1,
)
"""The fields to read for a `Thread`, without its messages."""

HEAD_FIELDS: Document = dict.fromkeys(["organization_id", "archived", "running", "total", "fence", "count", "bytes"], 1)
"""The fields on which a write depends, and which a write returns."""


class EmbeddingLimits(msgspec.Struct, frozen=True):
    """How much of its messages a thread embeds; what exceeds this is moved into pages.

    Attributes:
        messages: how many messages stay embedded.
        slack: how many more may be embedded before a page is written.
        bytes: how many bytes the embedded messages may have.
    """

    messages: int = 100
    slack: int = 50
    bytes: int = 4 * 2**20

    def exceeded(self, count: int, size: int) -> bool:
        return count > self.messages + self.slack or size > self.bytes


class Packed(msgspec.Struct, frozen=True):
    """A message as it is stored. `at`: its time; `size`: how long its JSON is; `body`: the JSON, or compressed JSON."""

    id: str
    at: int
    size: int
    body: bytes


def to_millis(timestamp: str) -> int:
    """Convert a timestamp to milliseconds since 1970."""
    return (datetime.fromisoformat(timestamp) - _EPOCH) // timedelta(milliseconds=1)


def to_timestamp(at: int) -> str:
    """Convert milliseconds since 1970 to a timestamp."""
    return timestamp(_EPOCH + timedelta(milliseconds=at))


async def pack(message: Message) -> Packed:
    """Encode a message as it is stored: as JSON, compressed if it is large."""
    body = msgspec.json.encode(message)
    size = len(body)
    if size > LARGE:
        body = await asyncio.to_thread(zlib.compress, body, 1)
    return Packed(message.id, to_millis(message.created_at), size, body)


async def unpack(entries: Sequence[Document]) -> list[Message]:
    """Decode the messages of these entries."""
    if any(entry["size"] > LARGE for entry in entries):
        return await asyncio.to_thread(_unpack, entries)
    return _unpack(entries)


def _unpack(entries: Sequence[Document]) -> list[Message]:
    return [replace(unpack_body(entry["body"]), created_at=to_timestamp(entry["at"])) for entry in entries]


def unpack_body(body: bytes) -> Message:
    """Decode one message."""
    data = zlib.decompress(body) if body[:1] == _ZLIB else body
    return msgspec.json.decode(data, type=Message)


def encode_json(value: JSONObject) -> str:
    """Encode an object as JSON text, which BSON returns unchanged."""
    return msgspec.json.encode(value).decode()


def build_entry(packed: Packed, n: object, at: object) -> Document:
    """`n` and `at` are numbers or expressions of a pipeline."""
    return {"id": packed.id, "n": n, "at": at, "size": packed.size, "body": packed.body}


def build_thread_document(principal: Principal, thread: Thread) -> Document:
    """Build the document of a new thread."""
    metadata = encode_json(thread.client_metadata())
    document: Document = {
        "_id": thread.id,
        "organization_id": principal.organization_id,
        "agent_id": thread.agent_id,
        "user_id": principal.user_id,
        "title": thread.title,
        "metadata": metadata,
        "created_at": to_millis(thread.created_at),
        "updated_at": to_millis(thread.updated_at),
        "last_activity_at": to_millis(thread.created_at),
        "archived": thread.archived,
        "running": None,
        "messages": [],
        "keys": [],
        "total": 0,
        "pushed": [-(2**53)],
        "fence": 0,
        "count": 0,
        "bytes": RECORD_BYTES + len(metadata) + len(thread.title),
    }
    if thread.external_id is None:
        return document
    key = external_key(principal, thread.agent_id, thread.external_id)
    return document | {"external_id": thread.external_id, "external_key": key}


def build_thread(document: Document, messages: list[Message] | None = None) -> Thread:
    """Build a thread from its document."""
    thread = Thread(
        id=document["_id"],
        agent_id=document["agent_id"],
        user_id=document["user_id"],
        organization_id=document["organization_id"],
        title=document["title"],
        metadata=msgspec.json.decode(document["metadata"]),
        created_at=to_timestamp(document["created_at"]),
        updated_at=to_timestamp(document["updated_at"]),
        archived=document["archived"],
        messages=messages or [],
    )
    external_id = document.get("external_id")
    return thread if external_id is None else thread.with_external_id(external_id)


def key_id(*parts: str) -> str:
    """A name for an Idempotency-Key within everything that it belongs to."""
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def external_key(principal: Principal, agent_id: str, external_id: str) -> str:
    """Return the `external_key` of a thread."""
    return key_id("thread", principal.organization_id, principal.user_id, agent_id, external_id)


def build_key(id: str, idempotency: Idempotency, message_id: str, run_id: str | None, now: int) -> Document:
    """Build the entry of an Idempotency-Key."""
    return {
        "id": id,
        "ref": run_id or message_id,
        "message_id": message_id,
        "run_id": run_id,
        "fingerprint": idempotency.fingerprint,
        "at": now,
        "free": False,
    }


def build_used_key(key: Document) -> UsedKey:
    """Build a used key from its entry."""
    return UsedKey(key["fingerprint"], key["message_id"], key["run_id"], key["at"] / 1000, free=key["free"])


# pipelines


def _literal(value: object) -> Document:
    """A value that the pipeline takes as it is: a title may begin with `$`."""
    return {"$literal": value}


def write_pipeline(
    now: int, *stages: Document, fact: Document | None = None, active_at: object | None = None
) -> Pipeline:
    """The stages, followed by what every write to a thread does: move `updated_at` on, and measure the document.

    `updated_at` moves as `rules.next_timestamp` moves it.

    Args:
        fact: the stage that puts what is written into the outbox (`outbox.add_fact_stage`).
        active_at: the time of the message or of the answer that is written; None for any other write.
    """
    times: Document = {"updated_at": {"$max": [now, {"$add": ["$updated_at", 1]}]}}
    if active_at is not None:
        times["last_activity_at"] = {"$max": ["$last_activity_at", active_at]}
    return [*stages, {"$set": times}, *([fact] if fact else []), *MEASURE_STAGES]


LAST_PUSHED: Document = {"$arrayElemAt": ["$pushed", -1]}
"""The time of the thread's last message, as an expression."""


MEASURE_STAGES: Pipeline = [{"$set": {"count": {"$size": "$messages"}, "bytes": {"$bsonSize": "$$ROOT"}}}]


def set_stage(title: str | None, archived: bool | None) -> Document:
    """Set what is not None."""
    fields = {"title": title, "archived": archived}
    return {"$set": {name: _literal(value) for name, value in fields.items() if value is not None}}


def append_stages(messages: Sequence[Packed], key: Document | None, run: str | None, now: int) -> list[Document]:
    """Append the messages, store the key, claim the thread for the run.

    Each message is later than the one before it, by `rules.next_timestamp`. Keys that count no more are deleted.
    """
    times: list[Document] = []
    before = LAST_PUSHED
    for message in messages:
        before = {"$max": [message.at, {"$add": [before, 1]}]}
        times.append(before)
    entries = [
        build_entry(message, {"$add": ["$total", index]}, {"$arrayElemAt": ["$pushed", index]})
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
        still_counts = {"$gt": ["$$key.at", now - KEY_MILLIS]}
        others = {"$and": [still_counts, {"$ne": ["$$key.id", key["id"]]}]}
        added = {name: _literal(value) for name, value in key.items()} | {"n": "$total"}
        sets["keys"] = {"$concatArrays": [{"$filter": {"input": "$keys", "as": "key", "cond": others}}, [added]]}
    return [{"$set": {"pushed": times}}, {"$set": sets}]


def finish_stage(message: Packed, by: str, *, frees_key: bool) -> Document:
    """Replace the message, release the thread, and free the run's key."""
    final = {"size": message.size, "body": message.body, "by": _literal(by)}
    sets: Document = {
        "running": None,
        "messages": _map_where("messages", {"$eq": ["$$it.id", _literal(message.id)]}, final),
    }
    if frees_key:
        sets["keys"] = _map_where("keys", {"$eq": ["$$it.ref", _literal(message.id)]}, {"free": True})
    return {"$set": sets}


def _map_where(field: str, condition: Document, changes: Document) -> Document:
    """The array with `changes` merged into the items (`$$it`) that meet the condition."""
    merged = {"$mergeObjects": ["$$it", changes]}
    return {"$map": {"input": f"${field}", "as": "it", "in": {"$cond": [condition, merged, "$$it"]}}}


def take_out_pipeline(page: Document) -> Pipeline:
    """Take the page's messages and keys out of the thread, which makes the page valid."""
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
    return [{"$set": sets}, {"$set": paged}, *MEASURE_STAGES]


# moving messages into pages


def next_page(document: Document, limits: EmbeddingLimits, *, everything: bool = False) -> Document | None:
    """The page for a thread's oldest messages; None if all may stay. The message of a run in progress always stays."""
    running = (document["running"] or {}).get("id")
    chunk = _select_oldest(document["messages"], running, limits, everything=everything)
    if not chunk:
        return None
    keys = [key for key in document["keys"][: -limits.messages] if key["ref"] != running]
    return {
        "_id": f"{document['_id']}/{chunk[0]['n']}",
        "thread_id": document["_id"],
        "first": chunk[0]["n"],
        "last": chunk[-1]["n"],
        "messages": chunk,
        "keys": keys,
    }


def _select_oldest(
    entries: list[Document], running: str | None, limits: EmbeddingLimits, *, everything: bool
) -> list[Document]:
    """The oldest messages that need not stay: as many as fit into one page, without gaps."""
    chunk: list[Document] = []
    size = 0
    for entry in entries[: _count_movable(entries, limits, everything=everything)]:
        size += stored_size(entry)
        if chunk and (entry["n"] != chunk[-1]["n"] + 1 or len(chunk) == PAGE_MESSAGES or size > PAGE_BYTES):
            break
        if entry["id"] != running:
            chunk.append(entry)
        elif chunk:
            break
        else:
            size = 0
    return chunk


def _count_movable(entries: list[Document], limits: EmbeddingLimits, *, everything: bool) -> int:
    """How many of the oldest entries exceed what stays. If they exceed its bytes, half of the room is cleared."""
    total = sum(map(stored_size, entries))
    if everything or not limits.exceeded(len(entries), total):
        return len(entries) if everything else 0
    room = limits.bytes if total <= limits.bytes else limits.bytes // 2
    size = 0
    for count, entry in enumerate(reversed(entries)):
        size += stored_size(entry)
        if count >= limits.messages or (size > room and not (count == 0 and size <= limits.bytes)):
            return len(entries) - count
    return 0


def stored_size(entry: Document) -> int:
    """About how many bytes an entry takes."""
    return len(entry["body"]) + _ENTRY_BYTES


# reading


def embedded_tail(document: Document, limit: int) -> list[Document]:
    """The embedded entries that are the thread's latest, oldest first, without gaps."""
    entries: list[Document] = document.get("messages", [])
    count = 0
    while count < min(limit, len(entries)) and entries[-1 - count]["n"] == document["total"] - 1 - count:
        count += 1
    return entries[len(entries) - count :]
