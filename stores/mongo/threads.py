"""The threads, messages, files and idempotency keys of the ThreadStore contract on MongoDB."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict
from datetime import datetime

import msgspec
from msgspec.structs import replace

from agent_chat.stores import rules
from agent_chat.stores.contracts import Created, MessagePage, Posted, ThreadPage, ThreadPart
from agent_chat.stores.errors import AttachmentNotFound, StoreUnavailable, ThreadNotFound
from agent_chat.stores.fitting import READ_BYTES, count_fitting
from agent_chat.stores.models import Idempotency, Message, Principal, StoredFile, Thread
from agent_chat.stores.mongo.documents import (
    DOCUMENT_BYTES,
    HEAD_FIELDS,
    KEY_TIME,
    LAST_PUSHED,
    THREAD_FIELDS,
    append_stages,
    build_key,
    build_thread,
    build_thread_document,
    build_used_key,
    embedded_tail,
    external_key,
    key_id,
    set_stage,
    write_pipeline,
)
from agent_chat.stores.mongo.messages import TRIES, contention, thread_query
from agent_chat.stores.mongo.native import Document, pack, to_seconds, to_timestamp
from agent_chat.stores.mongo.outbox import NO_FACTS, MongoOutbox, add_fact_stage
from agent_chat.stores.mongo.storage import THREAD_STORED, MongoStorage
from agent_chat.stores.rules import UsedKey

logger = logging.getLogger(__name__)

STRAGGLER_MILLIS = 60_000
"""How long after a deletion a sweeper deletes what writes under way have stored since."""

_CLEARED_AT_ONCE = 5000


def append_guard(principal: Principal, head: Document, need: int) -> Document:
    """The query for a thread to which messages may still be appended."""
    return {**thread_query(principal, head["_id"]), "archived": False, "bytes": {"$lte": DOCUMENT_BYTES - need}}


def key_guard(head: Document, new_key: Document | None, key: Document | None, now: datetime) -> Document:
    """The query for a thread in which the new key is still unused, or still the free one that was read.

    The fence guards what `older_messages` say about it: moving a key raises the fence.
    """
    if new_key is None:
        return {}
    used: Document = {"$elemMatch": {"id": new_key["id"], "at": {"$gt": now - KEY_TIME}}}
    if key is not None:
        used["$elemMatch"]["ref"] = {"$ne": key["ref"]}
    return {"fence": head["fence"], "keys": {"$not": used}}


class MongoThreads(MongoOutbox, MongoStorage):
    """Threads, messages, files and idempotency keys in MongoDB."""

    async def create(self, principal: Principal, thread: Thread, idempotency: Idempotency | None = None) -> Created:
        now = self.now()
        document = build_thread_document(principal, thread)
        if idempotency:
            id = key_id("create", principal.organization_id, principal.user_id, thread.agent_id, idempotency.key)
            document |= {"key_id": id, "key_fingerprint": idempotency.fingerprint, "key_at": now}
        for _ in range(TRIES):
            if await self.db.threads.insert(document):
                return Created(build_thread(document), replayed=False)
            if idempotency and (replayed := await self._find_created(document, idempotency, now)):
                return Created(replayed, replayed=True)
            if thread.external_id is not None and (
                found := await self.find_thread(principal, thread.agent_id, thread.external_id)
            ):
                return Created(found, replayed=False, found=True)
            if idempotency is None and thread.external_id is None:
                break
        raise contention(thread.id)

    async def find_thread(self, principal: Principal, agent_id: str, external_id: str) -> Thread | None:
        document = await self.db.threads.find_one(
            {"external_key": external_key(principal, agent_id, external_id)}, THREAD_FIELDS
        )
        return build_thread(document) if document else None

    async def get(self, principal: Principal, thread_id: str, *, message_limit: int = 50) -> Thread:
        return (await self.read(principal, thread_id, message_limit=message_limit)).thread

    async def read(
        self, principal: Principal, thread_id: str, *, message_limit: int, max_bytes: int = READ_BYTES
    ) -> ThreadPart:
        thread, page = await self._read_latest(principal, thread_id, message_limit, max_bytes, with_running=True)
        return ThreadPart(build_thread(thread, page.messages), page.cut)

    async def list_threads(
        self,
        principal: Principal,
        agent_id: str,
        *,
        limit: int,
        offset: int,
        archived: bool | None,
        message_limit: int,
        max_bytes: int,
        external_id: str | None = None,
    ) -> ThreadPage:
        """Reads the sizes of the embedded messages first, then those that fit. Moved messages are left out."""
        outlines = await self.db.threads.find(
            {
                "organization_id": principal.organization_id,
                "agent_id": agent_id,
                "archived": {"$in": [False, True]} if archived is None else archived,
                **({} if external_id is None else {"external_id": external_id}),
            },
            {"running": 1, "total": 1, "messages.id": 1, "messages.n": 1, "messages.size": 1},
            sort=[("last_activity_at", -1), ("_id", -1)],
            skip=offset,
            limit=limit + 1,
        )
        more, outlines = len(outlines) > limit, outlines[:limit]
        partials = await self._partial_sizes(outlines)
        tails = [embedded_tail(outline, message_limit) for outline in outlines]
        sizes = [[partials.get(entry["id"]) or int(entry["size"]) for entry in reversed(tail)] for tail in tails]
        counts = count_fitting(sizes, max_bytes)
        ids_by_count: dict[int, list[str]] = defaultdict(list)
        cut = False
        for outline, tail, count in zip(outlines, tails, counts, strict=True):
            cut = cut or count < min(message_limit, outline["total"])
            is_whole = count == len(tail) == len(outline["messages"])
            ids_by_count[message_limit if is_whole else count].append(outline["_id"])
        groups = await asyncio.gather(
            *[self._read_threads(principal, ids, count) for count, ids in ids_by_count.items()]
        )
        found = {thread.id: thread for group in groups for thread in group}
        threads = [found[outline["_id"]] for outline in outlines if outline["_id"] in found]
        return ThreadPage(threads, more=more, cut=cut)

    async def _partial_sizes(self, outlines: list[Document]) -> dict[str, int]:
        """The sizes of the messages of runs in progress, by message id."""
        running = [outline["running"]["id"] for outline in outlines if outline["running"]]
        runs = await self.db.runs.find({"_id": {"$in": running}}, {"partial.size": 1}) if running else []
        return {run["_id"]: run["partial"]["size"] for run in runs}

    async def _read_threads(self, principal: Principal, ids: list[str], limit: int) -> list[Thread]:
        """The threads with their latest embedded messages, at most `limit` each."""
        fields = {**THREAD_FIELDS, "messages": {"$slice": -limit}} if limit else THREAD_FIELDS
        documents = await self.db.threads.find(
            {"_id": {"$in": ids}, "organization_id": principal.organization_id}, fields
        )
        threads = []
        for document in documents:
            messages = await self._unpack_current(document, embedded_tail(document, limit), last=False)
            if messages is not None:
                threads.append(build_thread(document, messages))
                continue
            with contextlib.suppress(ThreadNotFound):
                threads.append(await self.get(principal, document["_id"], message_limit=limit))
        return threads

    async def update(
        self, principal: Principal, thread_id: str, *, title: str | None = None, archived: bool | None = None
    ) -> Thread:
        fact = add_fact_stage("thread.updated", "$updated_at", self.lease)
        pipeline = write_pipeline(self.now(), set_stage(title, archived), fact=fact)
        document = await self.db.threads.update_one(thread_query(principal, thread_id), pipeline, THREAD_FIELDS)
        if document is None:
            raise ThreadNotFound(thread_id)
        return build_thread(document)

    async def delete(self, principal: Principal, thread_id: str) -> str | None:
        """One write takes the thread from its organization and empties it; the rest is deleted here or by a sweeper."""
        await self._add_removal(rules.removal_of_thread(principal, thread_id))
        emptied: Document = {
            "_id": "$_id",
            "running": "$running",
            "total": "$total",
            "owner": "$organization_id",
            "stored": THREAD_STORED,
            "organization_id": None,
            "cleared": False,
            "sweep_at": "$$NOW",
        }
        pipeline = [{"$replaceWith": emptied}, add_fact_stage("thread.deleted", "$_id", self.lease)]
        document = await self.db.threads.update_one(thread_query(principal, thread_id), pipeline)
        if document is None:  # the removal stays: another process may be deleting the thread; else it removes nothing
            raise ThreadNotFound(thread_id)
        try:
            files = await self._files_bytes(thread_id)
            await self._clear(document)
            await self.release_bytes(principal.organization_id, int(document["stored"]) + files)
        except StoreUnavailable as error:
            logger.warning("The rest of thread %s was not deleted yet: %s", thread_id, error)
        running: str | None = (document["running"] or {}).get("id")
        return running

    async def _clear(self, emptied: Document) -> None:
        """Delete what belongs to a deleted thread.

        The first time, the emptied document stays for a sweeper, since a write under way may store something later.
        """
        thread_id = emptied["_id"]
        await self.db.runs.delete_many({"thread_id": thread_id})
        await self.db.attachments.delete_many({"thread_id": thread_id})
        for first in range(0, emptied["total"], _CLEARED_AT_ONCE):
            some = {"thread_id": thread_id, "n": {"$gte": first, "$lt": first + _CLEARED_AT_ONCE}}
            await self.db.older_messages.delete_many(some)
        deleted = {"_id": thread_id, "organization_id": None}
        sweep_again = {"cleared": True, "sweep_at": {"$add": ["$$NOW", STRAGGLER_MILLIS]}}
        if not emptied["cleared"] or emptied.get("outbox"):  # with an outbox, the deletion is not published yet
            await self.db.threads.update_one(deleted, [{"$set": sweep_again}], {"_id": 1})
        else:
            await self.db.threads.delete_one({**deleted, **NO_FACTS})

    async def add_file(self, principal: Principal, file: StoredFile) -> None:
        await self.get(principal, file.thread_id, message_limit=0)
        id = file.attachment.id
        body = msgspec.json.encode(file)
        record = {
            "_id": id,
            "thread_id": file.thread_id,
            "organization_id": principal.organization_id,
            "size": file.attachment.size,
            "text_bytes": len(body),
            "body": body,
        }
        try:
            await self.db.attachments.insert(record)
            await self.get(principal, file.thread_id, message_limit=0)
            if not await self._cancel_removal(id):
                raise StoreUnavailable(f"storing attachment {id} took too long")
        except BaseException:  # the thread was deleted, or the caller cannot know that the record exists
            with contextlib.suppress(StoreUnavailable):
                await self.db.attachments.delete_one({"_id": id})
            raise

    async def get_file(self, principal: Principal, thread_id: str, attachment_id: str) -> StoredFile:
        await self.get(principal, thread_id, message_limit=0)
        found = await self.db.attachments.find_one({"_id": attachment_id, "thread_id": thread_id})
        if found is None:
            raise AttachmentNotFound(attachment_id)
        return msgspec.json.decode(found["body"], type=StoredFile)

    async def remove_file(self, principal: Principal, thread_id: str, attachment_id: str) -> None:
        await self.get(principal, thread_id, message_limit=0)
        attachment = {"_id": attachment_id, "thread_id": thread_id}
        if found := await self.db.attachments.find_one(attachment, {"size": 1}):
            await self._add_removal(rules.removal_of_attachment(principal, thread_id, attachment_id, found["size"]))
            await self.db.attachments.delete_one(attachment)

    async def list_messages(
        self, principal: Principal, thread_id: str, *, before: str | None, limit: int, max_bytes: int = READ_BYTES
    ) -> MessagePage:
        if before is not None:
            return await self._read_before(principal, thread_id, before, limit, max_bytes)
        return (await self._read_latest(principal, thread_id, limit, max_bytes, with_running=False))[1]

    async def get_message(self, principal: Principal, thread_id: str, message_id: str) -> Message:
        for attempt in range(TRIES):
            thread, entry = await self._find_entry(principal, thread_id, message_id)
            messages = await self._unpack_current(thread, [entry], last=attempt == TRIES - 1)
            if messages is not None:
                return messages[0]
        raise contention(thread_id)

    async def append_message(
        self, principal: Principal, message: Message, idempotency: Idempotency | None = None
    ) -> Posted:
        thread_id = message.thread_id
        packed = await pack(message)
        now = self.now()
        for _ in range(TRIES):
            head, key = await self._read_head(principal, thread_id, idempotency)
            used = build_used_key(key) if key else None
            decision = rules.decide_post(thread_id, used, archived=head["archived"], running=None, starts_run=False)
            if used is not None and decision == "replay":
                return await self._replay(principal, thread_id, used)
            if head["bytes"] + packed.bytes > DOCUMENT_BYTES:
                await self._make_room(principal, thread_id, packed.bytes)
                continue
            new_key = self._build_key(principal, thread_id, idempotency, message.id, None, now)
            guard = {**append_guard(principal, head, packed.bytes), **key_guard(head, new_key, key, now)}
            fact = add_fact_stage("message.created", {"$literal": message.id}, self.lease)
            stages = append_stages([packed], new_key, None, now)
            pipeline = write_pipeline(now, *stages, fact=fact, active_at=LAST_PUSHED)
            if stored := await self.db.threads.update_one(guard, pipeline, {**HEAD_FIELDS, "pushed": 1}):
                await self._move_surplus(principal, thread_id, stored["count"], stored["bytes"])
                return Posted(replace(message, created_at=to_timestamp(stored["pushed"][0])), None, replayed=False)
        raise contention(thread_id)

    async def replay(self, principal: Principal, thread_id: str, idempotency: Idempotency) -> Posted | None:
        _, key = await self._read_head(principal, thread_id, idempotency)
        return await self._replay(principal, thread_id, build_used_key(key)) if key and not key["free"] else None

    # idempotency keys

    async def _find_created(self, document: Document, idempotency: Idempotency, now: datetime) -> Thread | None:
        """The thread that the key of this document created before; a key that no longer counts is freed.

        Raises: IdempotencyMismatch.
        """
        same_key = {"key_id": document["key_id"]}
        earlier = await self.db.threads.find_one(same_key, {**THREAD_FIELDS, "key_fingerprint": 1, "key_at": 1})
        if earlier is None:
            return None
        used_at = to_seconds(earlier["key_at"])
        if rules.key_counts(idempotency, earlier["key_fingerprint"], used_at, to_seconds(now)):
            return build_thread(earlier)
        outdated = {**same_key, "key_at": earlier["key_at"]}
        await self.db.threads.update_one(outdated, {"$unset": {"key_id": 1}}, {"_id": 1})
        return None

    async def _read_head(
        self, principal: Principal, thread_id: str, idempotency: Idempotency | None
    ) -> tuple[Document, Document | None]:
        """The thread's HEAD_FIELDS, and what the key stored before, if it still counts.

        Raises: ThreadNotFound, IdempotencyMismatch.
        """
        if idempotency is None:
            return await self._read_thread(principal, thread_id, HEAD_FIELDS), None
        id = key_id(thread_id, principal.user_id, idempotency.key)
        head = await self._read_thread(principal, thread_id, {**HEAD_FIELDS, "keys": {"$elemMatch": {"id": id}}})
        keys: list[Document] = head.get("keys") or []
        if not keys and head["count"] < head["total"]:
            moved = await self.db.older_messages.find({"key.id": id}, {"key": 1})
            keys = sorted((message["key"] for message in moved), key=lambda key: int(key["n"]))
        newest = keys[-1] if keys else None
        if newest is None or not rules.key_counts(
            idempotency, newest["fingerprint"], to_seconds(newest["at"]), to_seconds(self.now())
        ):
            return head, None
        return head, newest

    def _build_key(
        self,
        principal: Principal,
        thread_id: str,
        idempotency: Idempotency | None,
        message_id: str,
        run_id: str | None,
        now: datetime,
    ) -> Document | None:
        if idempotency is None:
            return None
        id = key_id(thread_id, principal.user_id, idempotency.key)
        return build_key(id, idempotency, message_id, run_id, now)

    async def _replay(self, principal: Principal, thread_id: str, key: UsedKey) -> Posted:
        """What the key stored before, as it is stored now."""
        message = await self.get_message(principal, thread_id, key.message_id)
        answer = await self.get_message(principal, thread_id, key.run_id) if key.run_id else None
        in_outbox = {**thread_query(principal, thread_id), "outbox.ref": message.id}
        unpublished = answer is None and await self.db.threads.find_one(in_outbox, {"_id": 1}) is not None
        return Posted(message, answer, replayed=True, unpublished=unpublished)
