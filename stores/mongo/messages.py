"""The messages of a thread, wherever they are: in its document, moved out of it, or in the record of a run.

Reading takes the thread first and `older_messages` after it, so that a message that is moved in the meantime is found
twice and never missed.
"""

from __future__ import annotations

import logging

from agent_chat.stores.contracts import MessagePage
from agent_chat.stores.errors import MessageNotFound, StoreUnavailable, ThreadNotFound
from agent_chat.stores.fitting import select_fitting
from agent_chat.stores.models import Message, Principal
from agent_chat.stores.mongo.database import MongoBase
from agent_chat.stores.mongo.documents import (
    DOCUMENT_BYTES,
    HEAD_FIELDS,
    THREAD_FIELDS,
    build_older_messages,
    select_oldest,
    take_out_pipeline,
)
from agent_chat.stores.mongo.native import Document, unpack

logger = logging.getLogger(__name__)

TRIES = 10
"""How often an operation starts again because the thread has changed in the meantime."""

_MOVES_PER_WRITE = 2


def thread_query(principal: Principal, thread_id: str) -> Document:
    """Build the query for a thread of this organization."""
    return {"_id": thread_id, "organization_id": principal.organization_id}


def contention(thread_id: str) -> StoreUnavailable:
    """The error after TRIES."""
    return StoreUnavailable(f"thread {thread_id} kept changing")


class MongoMessages(MongoBase):
    """Reading the messages of a thread, and moving the older ones out of it."""

    # reading

    async def _read_thread(self, principal: Principal, thread_id: str, fields: Document) -> Document:
        document = await self.db.threads.find_one(thread_query(principal, thread_id), fields)
        if document is None:
            raise ThreadNotFound(thread_id)
        return document

    async def _read_latest(
        self, principal: Principal, thread_id: str, limit: int, max_bytes: int, *, with_running: bool
    ) -> tuple[Document, MessagePage]:
        """The thread and its latest messages; `with_running`: also that of a run in progress, whatever its size."""
        fields = {**THREAD_FIELDS, "messages": {"$slice": -limit}} if limit else THREAD_FIELDS
        for attempt in range(TRIES):
            thread = await self._read_thread(principal, thread_id, fields)
            span = (thread["total"] - limit, thread["total"])
            last = attempt == TRIES - 1
            page = await self._read_span(thread, *span, max_bytes, last=last, with_running=with_running)
            if page is not None:
                return thread, page
        raise contention(thread_id)

    async def _read_before(
        self, principal: Principal, thread_id: str, before: str, limit: int, max_bytes: int
    ) -> MessagePage:
        """The messages before that one. Raises: MessageNotFound."""
        for attempt in range(TRIES):
            thread = await self._read_thread(principal, thread_id, {**HEAD_FIELDS, "messages.id": 1, "messages.n": 1})
            embedded = thread["messages"]
            place = next((entry["n"] for entry in embedded if entry["id"] == before), None)
            if place is None:
                place = (await self._find_moved(thread_id, before))["n"]
            wanted = [index for index, entry in enumerate(embedded) if place - limit <= entry["n"] < place]
            thread["messages"] = []
            if wanted:
                part = {**HEAD_FIELDS, "messages": {"$slice": [wanted[0], len(wanted)]}}
                thread = await self._read_thread(principal, thread_id, part)
            page = await self._read_span(thread, place - limit, place, max_bytes, last=attempt == TRIES - 1)
            if page is not None:
                return page
        raise contention(thread_id)

    async def _read_span(
        self, thread: Document, first: int, end: int, max_bytes: int, *, last: bool, with_running: bool = False
    ) -> MessagePage | None:
        """The messages from place `first` up to `end` that fit: those that `thread` contains, and moved ones.

        Of the moved ones, first the sizes are read, then only those that fit. None if the thread has changed since it
        was read: a message is missing, or its run has ended. At the `last` attempt a run without a record is returned
        as it began.
        """
        first = max(0, first)
        found = {entry["n"]: entry for entry in thread.get("messages", []) if first <= entry["n"] < end}
        moved: dict[int, Document] = {}
        if len(found) < end - first:
            places = {"thread_id": thread["_id"], "n": {"$gte": first, "$lt": end}}
            outlines = await self.db.older_messages.find(places, {"id": 1, "n": 1, "size": 1})
            moved = {outline["n"]: outline for outline in outlines if outline["n"] not in found}
            found |= moved
        if len(found) < end - first:
            return None
        entries = await self._with_partial(thread, [found[n] for n in sorted(found, reverse=True)], last=last)
        if entries is None:
            return None
        running = (thread["running"] or {}).get("id")
        places_of_run = [index for index, entry in enumerate(entries) if with_running and entry["id"] == running]
        place = places_of_run[0] if places_of_run else None
        chosen = [entries[index] for index in select_fitting([e["size"] for e in entries], max_bytes, place)]
        wanted = [entry["_id"] for entry in chosen if entry["n"] in moved]
        if wanted:
            read = await self.db.older_messages.find({"_id": {"$in": wanted}})
            whole = {document["n"]: document for document in read}
            if len(whole) < len(wanted):
                return None
            chosen = [whole.get(entry["n"], entry) for entry in chosen]
        return MessagePage(await unpack(thread["_id"], chosen[::-1]), cut=len(chosen) < len(entries))

    async def _find_entry(self, principal: Principal, thread_id: str, message_id: str) -> tuple[Document, Document]:
        """The thread's HEAD_FIELDS and one of its entries. Raises: ThreadNotFound, MessageNotFound."""
        thread = await self._read_thread(
            principal, thread_id, {**HEAD_FIELDS, "messages": {"$elemMatch": {"id": message_id}}}
        )
        entries = thread.get("messages") or [await self._find_moved(thread_id, message_id)]
        return thread, entries[0]

    async def _find_moved(self, thread_id: str, message_id: str) -> Document:
        """The entry of a message that was moved out of its thread. Raises: MessageNotFound."""
        document = await self.db.older_messages.find_one({"thread_id": thread_id, "id": message_id})
        if document is None:
            raise MessageNotFound(message_id)
        return document

    async def _unpack_current(self, thread: Document, entries: list[Document], *, last: bool) -> list[Message] | None:
        """The messages, that of a run in progress as its last checkpoint left it; None if the run has ended since.

        At the `last` attempt a run without a record is returned as it began.
        """
        shown = await self._with_partial(thread, entries, last=last)
        return None if shown is None else await unpack(thread["_id"], shown)

    async def _with_partial(self, thread: Document, entries: list[Document], *, last: bool) -> list[Document] | None:
        """The entries, that of a run in progress as its last checkpoint left it; None as in `_unpack_current`."""
        running = (thread["running"] or {}).get("id")
        if any(entry["id"] == running for entry in entries):
            record = {"_id": running, "organization_id": thread["organization_id"]}
            run = await self.db.runs.find_one(record, {"partial": 1})
            if run is None and not last:
                return None
            if run is not None:
                partial: Document = run["partial"]
                entries = [
                    partial | {"n": entry["n"], "created_at": entry["created_at"]} if entry["id"] == running else entry
                    for entry in entries
                ]
        return entries

    # moving messages

    async def _move_surplus(self, principal: Principal, thread_id: str, count: int, size: int) -> None:
        """Move what exceeds the limits, in at most _MOVES_PER_WRITE steps. If that fails, the next write does it."""
        if not self.limits.exceeded(count, size):
            return
        try:
            for _ in range(_MOVES_PER_WRITE):
                if not await self._move(principal, thread_id):
                    return
        except StoreUnavailable as error:
            logger.warning("The messages of thread %s were not moved out of it yet: %s", thread_id, error)

    async def _make_room(self, principal: Principal, thread_id: str, need: int) -> None:
        """Move messages out of the thread until it has room for that many more bytes.

        Raises: ValueError if it never will have.
        """
        while (await self._read_thread(principal, thread_id, HEAD_FIELDS))["bytes"] + need > DOCUMENT_BYTES:
            if not await self._move(principal, thread_id, everything=True):
                raise ValueError(f"thread {thread_id} has no room for {need} bytes")

    async def _move(self, principal: Principal, thread_id: str, *, everything: bool = False) -> bool:
        """Move some of the oldest messages out of the thread; False if no need."""
        fields = {**HEAD_FIELDS, "messages": 1, "keys": 1}
        thread = await self.db.threads.find_one(thread_query(principal, thread_id), fields)
        entries = select_oldest(thread, self.limits, everything=everything) if thread else []
        if thread is None or not entries:
            return False
        documents = build_older_messages(thread, entries)
        await self.db.older_messages.insert_missing(documents)
        taking_out = take_out_pipeline([entry["n"] for entry in entries])
        if await self.db.threads.update_one(thread_query(principal, thread_id), taking_out, {"_id": 1}) is None:
            await self.db.older_messages.delete_many({"_id": {"$in": [each["_id"] for each in documents]}})
            return False
        return True
