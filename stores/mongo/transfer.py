"""Import and export of whole threads on MongoDB.

An imported thread exists from the insertion of its document on, which follows that of its older messages. What an
import that was killed has written before belongs to no thread; the next import of the thread deletes it.
"""

from __future__ import annotations

from collections.abc import Iterable

from agent_chat.stores.models import Message, Principal, Thread
from agent_chat.stores.mongo.documents import (
    THREAD_FIELDS,
    build_older_messages,
    build_thread,
    build_thread_document,
    select_oldest,
)
from agent_chat.stores.mongo.native import Document, measure, pack
from agent_chat.stores.mongo.storage import MongoStorage


class MongoTransfer(MongoStorage):
    """Whole threads in MongoDB."""

    async def import_thread(self, principal: Principal, thread: Thread, messages: Iterable[Message]) -> bool:
        own_id = {"_id": thread.id}
        if await self.db.threads.find_one(own_id, {"_id": 1}) or await self.db.removals.find_one(own_id, {"_id": 1}):
            return False
        of_thread = {"thread_id": thread.id}
        await self.db.older_messages.delete_many(of_thread)
        document = build_thread_document(principal, thread)
        await self._fill(document, messages)
        if await self.db.threads.insert(document):
            await self._add_bytes(principal.organization_id, document["bytes"] + document.get("moved_bytes", 0))
            return True
        if await self.db.threads.find_one(own_id, {"_id": 1}) is None:  # else they are those of another import
            await self.db.older_messages.delete_many(of_thread)
        return False

    async def _fill(self, document: Document, messages: Iterable[Message]) -> None:
        """Add the messages to the document of a thread that does not exist yet; the older ones are moved out of it."""
        entries: list[Document] = document["messages"]
        size = 0
        for n, message in enumerate(messages):
            packed = await pack(message)
            entries.append(packed.document | {"n": n})
            size += measure(entries[-1])
            document |= {"total": n + 1, "pushed": [packed.at], "last_activity_at": packed.at}
            while self.limits.exceeded(len(entries), size) and (oldest := select_oldest(document, self.limits)):
                await self.db.older_messages.insert_missing(build_older_messages(document, oldest))
                moved = sum(map(measure, oldest))
                size -= moved
                del entries[: len(oldest)]
                document["moved_bytes"] = document.get("moved_bytes", 0) + moved
        document["count"] = len(entries)
        document["bytes"] += size

    async def scan_threads(
        self, principal: Principal, *, user_id: str | None, agent_id: str | None, after: str | None, limit: int
    ) -> list[Thread]:
        query: Document = {"organization_id": principal.organization_id, "_id": {"$gt": after or ""}}
        if user_id is not None:
            query["user_id"] = user_id
        if agent_id is not None:
            query["agent_id"] = agent_id
        found = await self.db.threads.find(query, THREAD_FIELDS, sort=[("_id", 1)], limit=limit)
        return [build_thread(document) for document in found]
