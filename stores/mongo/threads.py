"""The ThreadStore contract on MongoDB, but for runs: threads, their messages, idempotency keys."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict

import msgspec
from msgspec.structs import replace

from agent_chat.stores.contracts import Created, MessagePage, Posted, ThreadPage, ThreadPart
from agent_chat.stores.contracts.storage import REMOVAL_SECONDS, BlobRemoval
from agent_chat.stores.errors import (
    AttachmentNotFound,
    IdempotencyMismatch,
    StoreUnavailable,
    ThreadArchived,
    ThreadNotFound,
)
from agent_chat.stores.fitting import READ_BYTES, count_fitting
from agent_chat.stores.models import Idempotency, Message, Principal, StoredFile, Thread
from agent_chat.stores.mongo.documents import (
    DOCUMENT_BYTES,
    HEAD,
    KEY_MILLIS,
    SHOWN,
    Document,
    changing,
    key_id,
    key_of,
    pack,
    pushing,
    stamp,
    tail_of,
    thread_document,
    thread_of,
    writing,
)
from agent_chat.stores.mongo.outbox import PUBLISHED, MongoOutbox, adding
from agent_chat.stores.mongo.pages import TRIES, contended, where
from agent_chat.stores.mongo.storage import THREAD_STORED, MongoStorage

logger = logging.getLogger(__name__)

STRAGGLERS = 60_000
"""How many milliseconds after a deletion a sweeper looks for what has landed late."""

_CLEARED_AT_ONCE = 5000


def guarded(who: Principal, head: Document, need: int) -> Document:
    """What must still be so when messages are appended to the thread."""
    return {**where(who, head["_id"]), "archived": False, "bytes": {"$lte": DOCUMENT_BYTES - need}}


def unused(head: Document, new_key: Document | None, key: Document | None, now: int) -> Document:
    """What must still be so of the new key: it is not there, or it is the freed one that was read.

    The fence holds what pages say of it.
    """
    if new_key is None:
        return {}
    valid: Document = {"$elemMatch": {"id": new_key["id"], "at": {"$gt": now - KEY_MILLIS}}}
    if key is not None:
        valid["$elemMatch"]["ref"] = {"$ne": key["ref"]}
    return {"fence": head["fence"], "keys": {"$not": valid}}


class MongoThreads(MongoOutbox, MongoStorage):
    async def create(self, who: Principal, thread: Thread, idempotency: Idempotency | None = None) -> Created:
        now = self.now()
        document = thread_document(who, thread)
        if idempotency:
            id = key_id("create", who.organization_id, who.user_id, thread.agent_id, idempotency.key)
            document |= {"key_id": id, "key_fingerprint": idempotency.fingerprint, "key_at": now}
        for _ in range(TRIES):
            if await self.db.threads.insert(document):
                return Created(thread_of(document), replayed=False)
            if idempotency is None:
                break
            same = {"key_id": document["key_id"]}
            made = await self.db.threads.one(same, {**SHOWN, "key_fingerprint": 1, "key_at": 1})
            if made and made["key_at"] > now - KEY_MILLIS:
                if made["key_fingerprint"] != idempotency.fingerprint:
                    raise IdempotencyMismatch(idempotency.key)
                return Created(thread_of(made), replayed=True)
            if made:
                await self.db.threads.change({**same, "key_at": made["key_at"]}, {"$unset": {"key_id": 1}}, {"_id": 1})
        raise contended(thread.id)

    async def get(self, who: Principal, thread_id: str, *, message_limit: int = 50) -> Thread:
        return (await self.read(who, thread_id, message_limit=message_limit)).thread

    async def read(
        self, who: Principal, thread_id: str, *, message_limit: int, max_bytes: int = READ_BYTES
    ) -> ThreadPart:
        thread, page = await self._latest(who, thread_id, message_limit, max_bytes, with_running=True)
        return ThreadPart(thread_of(thread, page.messages), page.cut)

    async def list_threads(
        self,
        who: Principal,
        agent_id: str,
        *,
        limit: int,
        offset: int,
        archived: bool | None,
        message_limit: int,
        max_bytes: int,
    ) -> ThreadPage:
        """Two readings: the sizes of what is embedded, then what fits of it. Messages in pages are left out."""
        found = await self.db.threads.many(
            {
                "organization_id": who.organization_id,
                "agent_id": agent_id,
                "archived": {"$in": [False, True]} if archived is None else archived,
            },
            {"running": 1, "total": 1, "messages.id": 1, "messages.n": 1, "messages.size": 1},
            sort=[("updated_at", -1), ("_id", -1)],
            skip=offset,
            limit=limit + 1,
        )
        outlines = found[:limit]
        partials = await self._partial_sizes(outlines)
        tails = [tail_of(outline, message_limit) for outline in outlines]
        sizes = [[partials.get(entry["id"]) or int(entry["size"]) for entry in reversed(tail)] for tail in tails]
        counts = count_fitting(sizes, max_bytes)
        wanted: dict[int, list[str]] = defaultdict(list)
        cut = False
        for outline, tail, count in zip(outlines, tails, counts, strict=True):
            cut = cut or count < min(message_limit, outline["total"])
            wanted[message_limit if count == len(tail) == len(outline["messages"]) else count].append(outline["_id"])
        shown = await asyncio.gather(*[self._shown(who, ids, count) for count, ids in wanted.items()])
        threads = [thread for group in shown for thread in group]
        threads.sort(key=lambda thread: (thread.updated_at, thread.id), reverse=True)
        return ThreadPage(threads, more=len(found) > limit, cut=cut)

    async def _partial_sizes(self, outlines: list[Document]) -> dict[str, int]:
        running = [outline["running"]["id"] for outline in outlines if outline["running"]]
        runs = await self.db.runs.many({"_id": {"$in": running}}, {"size": 1}) if running else []
        return {run["_id"]: run["size"] for run in runs}

    async def _shown(self, who: Principal, ids: list[str], limit: int) -> list[Thread]:
        """Threads with their latest embedded messages, at most `limit`."""
        fields = {**SHOWN, "messages": {"$slice": -limit}} if limit else SHOWN
        documents = await self.db.threads.many({"_id": {"$in": ids}, "organization_id": who.organization_id}, fields)
        threads = []
        for document in documents:
            messages = await self._told(document, tail_of(document, limit), last=False)
            if messages is not None:
                threads.append(thread_of(document, messages))
                continue
            with contextlib.suppress(ThreadNotFound):
                threads.append(await self.get(who, document["_id"], message_limit=limit))
        return threads

    async def update(
        self, who: Principal, thread_id: str, *, title: str | None = None, archived: bool | None = None
    ) -> Thread:
        fact = adding("thread.updated", "$updated_at", self.lease)
        pipeline = writing(self.now(), changing(title, archived), fact=fact)
        document = await self.db.threads.change(where(who, thread_id), pipeline, SHOWN)
        if document is None:
            raise ThreadNotFound(thread_id)
        return thread_of(document)

    async def delete(self, who: Principal, thread_id: str) -> str | None:
        """One write makes the thread nobody's and empties it; what it leaves is cleared here or by a sweeper."""
        await self._add_removal(BlobRemoval(thread_id, who.organization_id, thread_id, None, 0), REMOVAL_SECONDS)
        kept: Document = {"_id": "$_id", "running": "$running", "total": "$total", "owner": "$organization_id"}
        kept["stored"] = THREAD_STORED
        emptied = {**kept, "organization_id": None, "cleared": False, "sweep_at": "$$NOW"}
        pipeline = [{"$replaceWith": emptied}, adding("thread.deleted", "$_id", self.lease)]
        document = await self.db.threads.change(where(who, thread_id), pipeline)
        if document is None:  # the removal stays: it may be that of another process' deletion, else it deletes nothing
            raise ThreadNotFound(thread_id)
        try:
            files = await self._files_bytes(thread_id)
            await self._clear(document)
            await self.release_bytes(who.organization_id, int(document["stored"]) + files)
        except StoreUnavailable as error:
            logger.warning("the rest of thread %s was not deleted yet: %s", thread_id, error)
        running: str | None = (document["running"] or {}).get("id")
        return running

    async def _clear(self, emptied: Document) -> None:
        """Delete what the thread has left.

        The first time, the emptied document stays for a sweeper: a write that was under way can still land behind this.
        """
        thread_id = emptied["_id"]
        await self.db.runs.remove_all({"thread_id": thread_id})
        await self.db.attachments.remove_all({"thread_id": thread_id})
        for first in range(0, emptied["total"], _CLEARED_AT_ONCE):
            some = {"thread_id": thread_id, "first": {"$gte": first, "$lt": first + _CLEARED_AT_ONCE}}
            await self.db.pages.remove_all(some)
        nobodys = {"_id": thread_id, "organization_id": None}
        again = {"cleared": True, "sweep_at": {"$add": ["$$NOW", STRAGGLERS]}}
        if not emptied["cleared"] or emptied.get("outbox"):  # its deletion is not published yet
            await self.db.threads.change(nobodys, [{"$set": again}], {"_id": 1})
        else:
            await self.db.threads.remove({**nobodys, **PUBLISHED})

    async def add_file(self, who: Principal, file: StoredFile) -> None:
        await self.get(who, file.thread_id, message_limit=0)
        id = file.attachment.id
        body = msgspec.json.encode(file)
        kept = {
            "thread_id": file.thread_id,
            "organization_id": who.organization_id,
            "size": file.attachment.size,
            "text_bytes": len(body),
            "body": body,
        }
        try:
            await self.db.attachments.insert({"_id": id, **kept})
            await self.get(who, file.thread_id, message_limit=0)
            if not await self._cancel_removal(id):
                raise StoreUnavailable(f"storing attachment {id} took too long")
        except BaseException:  # the thread was deleted meanwhile, or the caller will not know that the record is there
            with contextlib.suppress(StoreUnavailable):
                await self.db.attachments.remove({"_id": id})
            raise

    async def get_file(self, who: Principal, thread_id: str, attachment_id: str) -> StoredFile:
        await self.get(who, thread_id, message_limit=0)
        found = await self.db.attachments.one({"_id": attachment_id, "thread_id": thread_id})
        if found is None:
            raise AttachmentNotFound(attachment_id)
        return msgspec.json.decode(found["body"], type=StoredFile)

    async def remove_file(self, who: Principal, thread_id: str, attachment_id: str) -> None:
        await self.get(who, thread_id, message_limit=0)
        attachment = {"_id": attachment_id, "thread_id": thread_id}
        if found := await self.db.attachments.one(attachment, {"size": 1}):
            removal = BlobRemoval(attachment_id, who.organization_id, thread_id, attachment_id, found["size"])
            await self._add_removal(removal, REMOVAL_SECONDS)
            await self.db.attachments.remove(attachment)

    async def list_messages(
        self, who: Principal, thread_id: str, *, before: str | None, limit: int, max_bytes: int = READ_BYTES
    ) -> MessagePage:
        if before is not None:
            return await self._before(who, thread_id, before, limit, max_bytes)
        return (await self._latest(who, thread_id, limit, max_bytes, with_running=False))[1]

    async def get_message(self, who: Principal, thread_id: str, message_id: str) -> Message:
        for attempt in range(TRIES):
            thread, entry = await self._entry(who, thread_id, message_id)
            messages = await self._told(thread, [entry], last=attempt == TRIES - 1)
            if messages is not None:
                return messages[0]
        raise contended(thread_id)

    async def append_message(self, who: Principal, message: Message, idempotency: Idempotency | None = None) -> Posted:
        thread_id = message.thread_id
        packed = await pack(message)
        now = self.now()
        for _ in range(TRIES):
            head, key = await self._head(who, thread_id, idempotency)
            if key and not key["free"]:
                return await self._replayed(who, thread_id, key)
            if head["archived"]:
                raise ThreadArchived(thread_id)
            if head["bytes"] + len(packed.body) > DOCUMENT_BYTES:
                await self._make_room(who, thread_id, len(packed.body))
                continue
            new_key = self._new_key(who, thread_id, idempotency, message.id, None, now)
            guard = {**guarded(who, head, len(packed.body)), **unused(head, new_key, key, now)}
            fact = adding("message.created", {"$literal": message.id}, self.lease)
            pipeline = writing(now, *pushing([packed], new_key, None, now), fact=fact)
            if stored := await self.db.threads.change(guard, pipeline, {**HEAD, "pushed": 1}):
                await self._settle(who, thread_id, stored["count"], stored["bytes"])
                return Posted(replace(message, created_at=stamp(stored["pushed"][0])), None, replayed=False)
        raise contended(thread_id)

    async def replay(self, who: Principal, thread_id: str, idempotency: Idempotency) -> Posted | None:
        _, key = await self._head(who, thread_id, idempotency)
        return await self._replayed(who, thread_id, key) if key and not key["free"] else None

    # idempotency keys

    async def _head(
        self, who: Principal, thread_id: str, idempotency: Idempotency | None
    ) -> tuple[Document, Document | None]:
        """The thread's head, and what the key stored, if it is not too old.

        Raises: ThreadNotFound, IdempotencyMismatch.
        """
        if idempotency is None:
            return await self._thread(who, thread_id, HEAD), None
        id = key_id(thread_id, who.user_id, idempotency.key)
        head = await self._thread(who, thread_id, {**HEAD, "keys": {"$elemMatch": {"id": id}}})
        keys: list[Document] = head.get("keys") or []
        if not keys and head["count"] < head["total"]:
            pages = await self.db.pages.many({"keys.id": id}, {"keys": {"$elemMatch": {"id": id}}})
            keys = sorted((key for page in pages for key in page["keys"]), key=lambda key: int(key["n"]))
        if not keys or keys[-1]["at"] <= self.now() - KEY_MILLIS:
            return head, None
        if keys[-1]["fingerprint"] != idempotency.fingerprint:
            raise IdempotencyMismatch(idempotency.key)
        return head, keys[-1]

    def _new_key(
        self,
        who: Principal,
        thread_id: str,
        idempotency: Idempotency | None,
        message_id: str,
        run_id: str | None,
        now: int,
    ) -> Document | None:
        if idempotency is None:
            return None
        id = key_id(thread_id, who.user_id, idempotency.key)
        return key_of(id, idempotency, message_id, run_id, now)

    async def _replayed(self, who: Principal, thread_id: str, key: Document) -> Posted:
        message = await self.get_message(who, thread_id, key["message_id"])
        answer = await self.get_message(who, thread_id, key["run_id"]) if key["run_id"] else None
        held = {**where(who, thread_id), "outbox.ref": message.id}
        unpublished = answer is None and await self.db.threads.one(held, {"_id": 1}) is not None
        return Posted(message, answer, replayed=True, unpublished=unpublished)
