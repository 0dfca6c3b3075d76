"""The documents of the MongoDB store: their shapes, what fits into them, the pipelines that write them. No driver.

A thread is one document:

    {_id, organization_id, agent_id, user_id, title, metadata, created_at, updated_at, last_activity_at, archived,
     running: null | {id, n, at}, messages: [entry], keys: [key], total, pushed, fence, count, bytes, moved_bytes?,
     external_id?, external_key?, key_id?, key_fingerprint?, key_at?, outbox?, outbox_at?}

- An entry is a message as `native` describes it, with `n`, its place in its thread, and `by?`, the finish that wrote
  it.
- A key is {id, ref, message_id, run_id, fingerprint, at, n, free}: what an Idempotency-Key stored. `ref` is never used
  twice; `n` is the place of the first message that it stored; `free` as in `rules.UsedKey`.
- `total` is the number of messages; `pushed` has the times that the newest write appended, so its last is the thread's
  last. `count` and `bytes` measure the document; `moved_bytes` is how much moving has taken out of it.
- `external_key` is what makes `external_id` unique: a hash of it with the organization, the user and the agent.
- `fence` is incremented by writes that must make a claim under way fail: moving messages, and a sweeper that takes over
  the claim's record.
- Times are BSON dates, so that a pipeline can move one past another.

The thread's older messages are moved into the collection `older_messages`, one document each: the entry with
{_id, organization_id, thread_id, key?}. `_id` is made of the thread's id and `n`, since an import may repeat the ids of
messages in another thread; `key` is the one that stored the message. None of them is of a run in progress.

Moving takes two writes: inserting them, and taking them out of the thread. In between, or if the process dies there, a
message is stored twice and alike; readers prefer the thread's. The next process that moves inserts what is missing.

Pages of a hundred messages were refused: deleting or changing one old message would rewrite the others, and nobody
could query them. So was a list of the moved messages in the thread: with 100,000 it would make each write grow.

A deleted thread is {_id, organization_id: null, owner, running, total, stored, cleared, sweep_at, outbox, outbox_at}
for about a minute: `cleared` is true once what belongs to it was deleted for the first time, and from `sweep_at` on a
sweeper deletes it (again). `outbox.py` describes the last two fields.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime, timedelta

import msgspec

from agent_chat.stores.contracts.storage import RECORD_BYTES
from agent_chat.stores.models import Idempotency, Message, Principal, Thread
from agent_chat.stores.mongo.native import (
    Document,
    Packed,
    decode_value,
    encode_value,
    measure,
    to_date,
    to_seconds,
    to_timestamp,
)
from agent_chat.stores.rules import KEY_SECONDS, UsedKey

Pipeline = list[Document]

KEY_TIME = timedelta(seconds=KEY_SECONDS)
DOCUMENT_BYTES = 16 * 2**20 - 2**16
"""MongoDB's limit, minus what the fields around the messages may grow by in one write."""

MOVED_AT_ONCE = 100
MOVED_BYTES = 4 * 2**20
_ENTRY_BYTES = 20
_NEVER = datetime.min  # noqa: DTZ901 - like every date from the database

THREAD_FIELDS: Document = dict.fromkeys(
    [
        "organization_id",
        "agent_id",
        "user_id",
        "title",
        "metadata",
        "metadata_json",
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
    """How much of its messages a thread embeds; what exceeds this is moved to `older_messages`.

    Attributes:
        messages: how many messages stay embedded.
        slack: how many more may be embedded before messages are moved.
        bytes: how many bytes the embedded messages may have.
    """

    messages: int = 100
    slack: int = 50
    bytes: int = 4 * 2**20

    def exceeded(self, count: int, size: int) -> bool:
        return count > self.messages + self.slack or size > self.bytes


def build_thread_document(principal: Principal, thread: Thread) -> Document:
    """Build the document of a new thread."""
    metadata = encode_value("metadata", thread.client_metadata())
    document: Document = {
        "_id": thread.id,
        "organization_id": principal.organization_id,
        "agent_id": thread.agent_id,
        "user_id": principal.user_id,
        "title": thread.title,
        **metadata,
        "created_at": to_date(thread.created_at),
        "updated_at": to_date(thread.updated_at),
        "last_activity_at": to_date(thread.created_at),
        "archived": thread.archived,
        "running": None,
        "messages": [],
        "keys": [],
        "total": 0,
        "pushed": [_NEVER],
        "fence": 0,
        "count": 0,
        "bytes": RECORD_BYTES + measure(metadata) + len(thread.title),
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
        metadata=decode_value(document, "metadata"),
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


def build_key(id: str, idempotency: Idempotency, message_id: str, run_id: str | None, now: datetime) -> Document:
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
    return UsedKey(key["fingerprint"], key["message_id"], key["run_id"], to_seconds(key["at"]), free=key["free"])


# pipelines


def _literal(value: object) -> Document:
    """A value that the pipeline takes as it is: a title may begin with `$`."""
    return {"$literal": value}


def write_pipeline(
    now: datetime, *stages: Document, fact: Document | None = None, active_at: object | None = None
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


def append_stages(messages: Sequence[Packed], key: Document | None, run: str | None, now: datetime) -> list[Document]:
    """Append the messages, store the key, claim the thread for the run.

    Each message is later than the one before it, by `rules.next_timestamp`. Keys that count no more are deleted.
    """
    times: list[Document] = []
    before = LAST_PUSHED
    for message in messages:
        before = {"$max": [message.at, {"$add": [before, 1]}]}
        times.append(before)
    places: list[Document] = [{"$add": ["$total", index]} for index in range(len(messages))]
    moments: list[Document] = [{"$arrayElemAt": ["$pushed", index]} for index in range(len(messages))]
    entries = [
        _build_entry(message, {"n": n, "created_at": at})
        for message, n, at in zip(messages, places, moments, strict=True)
    ]
    sets: Document = {
        "messages": {"$concatArrays": ["$messages", entries]},
        "total": {"$add": ["$total", len(entries)]},
    }
    if run is not None:
        sets["running"] = {"id": _literal(run), "n": places[-1], "at": moments[-1]}
    if key is not None:
        still_counts = {"$gt": ["$$key.at", now - KEY_TIME]}
        others = {"$and": [still_counts, {"$ne": ["$$key.id", key["id"]]}]}
        added = {name: _literal(value) for name, value in key.items()} | {"n": "$total"}
        sets["keys"] = {"$concatArrays": [{"$filter": {"input": "$keys", "as": "key", "cond": others}}, [added]]}
    return [{"$set": {"pushed": times}}, {"$set": sets}]


def _build_entry(message: Packed, fields: Document) -> Document:
    """The message's entry as an expression; `fields`: what the pipeline computes of it."""
    return {"$mergeObjects": [_literal(message.raw), fields]}


def finish_stage(message: Packed, by: str, *, frees_key: bool) -> Document:
    """Replace the message, release the thread, and free the run's key."""
    final = _build_entry(message, {"created_at": "$$it.created_at", "n": "$$it.n", "by": _literal(by)})
    sets: Document = {
        "running": None,
        "messages": _map_where("messages", {"$eq": ["$$it.id", _literal(message.id)]}, final),
    }
    if frees_key:
        freed = {"$mergeObjects": ["$$it", {"free": True}]}
        sets["keys"] = _map_where("keys", {"$eq": ["$$it.ref", _literal(message.id)]}, freed)
    return {"$set": sets}


def _map_where(field: str, condition: Document, changed: Document) -> Document:
    """The array with `changed` in place of each item (`$$it`) that meets the condition."""
    return {"$map": {"input": f"${field}", "as": "it", "in": {"$cond": [condition, changed, "$$it"]}}}


def take_out_pipeline(places: Sequence[int]) -> Pipeline:
    """Take the messages at these places out of the thread, with their keys."""
    outside = {"$not": [{"$in": ["$$it.n", list(places)]}]}
    sets: Document = {
        name: {"$filter": {"input": f"${name}", "as": "it", "cond": outside}} for name in ("messages", "keys")
    }
    sets["fence"] = {"$add": ["$fence", 1]}
    moved: Document = {"$subtract": ["$bytes", {"$bsonSize": "$$ROOT"}]}
    moved_bytes = {"moved_bytes": {"$add": [{"$ifNull": ["$moved_bytes", 0]}, moved]}}
    return [{"$set": sets}, {"$set": moved_bytes}, *MEASURE_STAGES]


# moving messages out of the thread


def select_oldest(document: Document, limits: EmbeddingLimits, *, everything: bool = False) -> list[Document]:
    """The oldest entries that need not stay, as many as are moved at once; [] if all may stay.

    The message of a run in progress stays, and so does that of the run's key, which `finish_stage` may free.
    """
    running = (document["running"] or {}).get("id")
    staying = {key["n"] for key in document["keys"] if key["ref"] == running}
    sized = [(entry, measure(entry) + _ENTRY_BYTES) for entry in document["messages"]]
    count = len(sized) if everything else _count_movable([size for _, size in sized], limits)
    chosen: list[Document] = []
    total = 0
    for entry, size in sized[:count]:
        if entry["id"] == running or entry["n"] in staying:
            continue
        total += size
        if chosen and (len(chosen) == MOVED_AT_ONCE or total > MOVED_BYTES):
            break
        chosen.append(entry)
    return chosen


def _count_movable(sizes: list[int], limits: EmbeddingLimits) -> int:
    """How many of the oldest messages exceed what stays. If they exceed its bytes, half of the room is cleared."""
    total = sum(sizes)
    if not limits.exceeded(len(sizes), total):
        return 0
    room = limits.bytes if total <= limits.bytes else limits.bytes // 2
    kept = 0
    for count, size in enumerate(reversed(sizes)):
        kept += size
        if count >= limits.messages or (kept > room and not (count == 0 and kept <= limits.bytes)):
            return len(sizes) - count
    return 0


def build_older_messages(document: Document, entries: Sequence[Document]) -> list[Document]:
    """The documents for entries that leave their thread, each with the key that stored it."""
    keys = {key["n"]: {"key": key} for key in document["keys"]}
    place = {"organization_id": document["organization_id"], "thread_id": document["_id"]}
    return [
        {"_id": f"{document['_id']}/{entry['n']}", **place, **entry, **keys.get(entry["n"], {})} for entry in entries
    ]


# reading


def embedded_tail(document: Document, limit: int) -> list[Document]:
    """The embedded entries that are the thread's latest, oldest first, without gaps."""
    entries: list[Document] = document.get("messages", [])
    count = 0
    while count < min(limit, len(entries)) and entries[-1 - count]["n"] == document["total"] - 1 - count:
        count += 1
    return entries[len(entries) - count :]
