"""The messages of a thread, wherever they are: in its document, in pages, and of a run in its record.

`mongo_documents` tells what a page is and when it counts. Reading takes the thread first and pages after it, so that
a message which is moved meanwhile is found twice and never missed.
"""

from __future__ import annotations

import logging

from agent_chat.stores.contracts import MessagePage
from agent_chat.stores.errors import MessageNotFound, StoreUnavailable, ThreadNotFound
from agent_chat.stores.fitting import select_fitting
from agent_chat.stores.models import Message, Principal
from agent_chat.stores.mongo.database import Database
from agent_chat.stores.mongo.documents import (
    DOCUMENT_BYTES,
    HEAD,
    PAGE_MESSAGES,
    SHOWN,
    Document,
    covering,
    next_page,
    unpack,
)

logger = logging.getLogger(__name__)

TRIES = 10
_ROUNDS = 2


def where(who: Principal, thread_id: str) -> Document:
    return {"_id": thread_id, "organization_id": who.organization_id}


def contended(thread_id: str) -> StoreUnavailable:
    return StoreUnavailable(f"thread {thread_id} kept changing")


class MongoPages(Database):
    # reading

    async def _thread(self, who: Principal, thread_id: str, fields: Document) -> Document:
        document = await self.db.threads.one(where(who, thread_id), fields)
        if document is None:
            raise ThreadNotFound(thread_id)
        return document

    async def _latest(
        self, who: Principal, thread_id: str, limit: int, max_bytes: int, *, with_running: bool
    ) -> tuple[Document, MessagePage]:
        """The thread and its latest messages; `with_running`: and that of a run in progress in any case."""
        fields = {**SHOWN, "messages": {"$slice": -limit}} if limit else SHOWN
        for attempt in range(TRIES):
            thread = await self._thread(who, thread_id, fields)
            span = (thread["total"] - limit, thread["total"])
            last = attempt == TRIES - 1
            page = await self._between(thread, *span, max_bytes, last=last, with_running=with_running)
            if page is not None:
                return thread, page
        raise contended(thread_id)

    async def _before(self, who: Principal, thread_id: str, before: str, limit: int, max_bytes: int) -> MessagePage:
        """The messages before that one. Raises: MessageNotFound."""
        for attempt in range(TRIES):
            thread = await self._thread(who, thread_id, {**HEAD, "messages.id": 1, "messages.n": 1})
            embedded = thread["messages"]
            place = next((entry["n"] for entry in embedded if entry["id"] == before), None)
            if place is None:
                place = (await self._paged(thread_id, before))["n"]
            wanted = [index for index, entry in enumerate(embedded) if place - limit <= entry["n"] < place]
            thread["messages"] = []
            if wanted:
                part = {**HEAD, "messages": {"$slice": [wanted[0], len(wanted)]}}
                thread = await self._thread(who, thread_id, part)
            page = await self._between(thread, place - limit, place, max_bytes, last=attempt == TRIES - 1)
            if page is not None:
                return page
        raise contended(thread_id)

    async def _between(
        self, thread: Document, first: int, end: int, max_bytes: int, *, last: bool, with_running: bool = False
    ) -> MessagePage | None:
        """The messages from place `first` up to `end` that fit, those that the thread has at hand, others from pages.

        Of pages the sizes are read first, and then only those pages that hold what fits. None if a message is missing
        or the run has ended, for the thread has changed since it was read; at the `last` attempt a run without a
        record is shown as it began.
        """
        first = max(0, first)
        found = {entry["n"]: entry for entry in thread.get("messages", []) if first <= entry["n"] < end}
        page_of: dict[int, str] = {}
        if len(found) < end - first:
            outlines = await self.db.pages.many(
                {"thread_id": thread["_id"], "first": {"$gt": first - PAGE_MESSAGES, "$lt": end}},
                {"messages.id": 1, "messages.n": 1, "messages.size": 1},
            )
            paged = {e["n"]: (e, page["_id"]) for page in outlines for e in page["messages"] if first <= e["n"] < end}
            page_of = {n: page_id for n, (_, page_id) in paged.items() if n not in found}
            found = {n: entry for n, (entry, _) in paged.items()} | found
        if len(found) < end - first:
            return None
        entries = await self._with_partial(thread, [found[n] for n in sorted(found, reverse=True)], last=last)
        if entries is None:
            return None
        running = (thread["running"] or {}).get("id")
        places = [index for index, entry in enumerate(entries) if with_running and entry["id"] == running]
        place = places[0] if places else None
        chosen = [entries[index] for index in select_fitting([e["size"] for e in entries], max_bytes, place)]
        wanted = {entry["n"]: page_of[entry["n"]] for entry in chosen if entry["n"] in page_of}
        if wanted:
            pages = await self.db.pages.many({"_id": {"$in": sorted(set(wanted.values()))}}, {"messages": 1})
            bodies = {entry["n"]: entry for page in pages for entry in page["messages"]}
            if not bodies.keys() >= wanted.keys():
                return None
            chosen = [bodies[entry["n"]] if entry["n"] in wanted else entry for entry in chosen]
        return MessagePage(await unpack(chosen[::-1]), cut=len(chosen) < len(entries))

    async def _entry(self, who: Principal, thread_id: str, message_id: str) -> tuple[Document, Document]:
        """The thread's head, and one message of it. Raises: ThreadNotFound, MessageNotFound."""
        thread = await self._thread(who, thread_id, {**HEAD, "messages": {"$elemMatch": {"id": message_id}}})
        entries = thread.get("messages") or [await self._paged(thread_id, message_id)]
        return thread, entries[0]

    async def _paged(self, thread_id: str, message_id: str) -> Document:
        fields = {"thread_id": 1, "messages": {"$elemMatch": {"id": message_id}}}
        page = await self.db.pages.one({"messages.id": message_id}, fields)
        if page is None or page["thread_id"] != thread_id:
            raise MessageNotFound(message_id)
        entry: Document = page["messages"][0]
        return entry

    async def _told(self, thread: Document, entries: list[Document], *, last: bool) -> list[Message] | None:
        """The messages, that of a run as its last checkpoint left it; None if the run has ended since.

        At the `last` attempt a run without a record is shown as it began.
        """
        shown = await self._with_partial(thread, entries, last=last)
        return None if shown is None else await unpack(shown)

    async def _with_partial(self, thread: Document, entries: list[Document], *, last: bool) -> list[Document] | None:
        """The entries, that of a run in progress with the message of its last checkpoint; None as in `_told`."""
        running = (thread["running"] or {}).get("id")
        if any(entry["id"] == running for entry in entries):
            run = await self.db.runs.one(
                {"_id": running, "organization_id": thread["organization_id"]}, {"partial": 1, "size": 1}
            )
            if run is None and not last:
                return None
            if run is not None:
                partial = {"body": run["partial"], "size": run["size"]}
                entries = [entry | partial if entry["id"] == running else entry for entry in entries]
        return entries

    # moving

    async def _settle(self, who: Principal, thread_id: str, count: int, size: int) -> None:
        """Move what is too much, a page or two at a time. What fails here is done with the next write."""
        if not self.limits.exceeded(count, size):
            return
        try:
            for _ in range(_ROUNDS):
                if not await self._move(who, thread_id):
                    return
        except StoreUnavailable as error:
            logger.warning("messages of thread %s were not moved yet: %s", thread_id, error)

    async def _make_room(self, who: Principal, thread_id: str, need: int) -> None:
        """Move messages until the document can take that many bytes more.

        Raises: ValueError if it never will.
        """
        while (await self._thread(who, thread_id, HEAD))["bytes"] + need > DOCUMENT_BYTES:
            if not await self._move(who, thread_id, everything=True):
                raise ValueError(f"thread {thread_id} has no room for {need} bytes")

    async def _move(self, who: Principal, thread_id: str, *, everything: bool = False) -> bool:
        """Make one page, or take up one that was left behind, and take its messages out of the thread."""
        thread = await self.db.threads.one(where(who, thread_id), {**HEAD, "messages": 1, "keys": 1})
        if thread is None:
            return False
        fields = {"first": 1, "last": 1, "keys.ref": 1}
        page = await self.db.pages.one(
            {"thread_id": thread_id, "first": {"$in": [entry["n"] for entry in thread["messages"]]}}, fields
        )
        if page is None:
            page = next_page(thread, self.limits, everything=everything)
            if page is None:
                return False
            if not await self.db.pages.insert(page):
                page = await self.db.pages.one({"_id": page["_id"]}, fields)
        if page is None:
            return False
        if await self.db.threads.change(where(who, thread_id), covering(page), {"_id": 1}) is None:
            await self.db.pages.remove({"_id": page["_id"]})
            return False
        return True
