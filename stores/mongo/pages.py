"""The messages of a thread, wherever they are: in its document, in pages, and, of a run in progress, in its record.

`documents` describes what a page is and when it is valid. Reading takes the thread first and pages after it, so that a
message that is moved in the meantime is found twice and never missed.
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
    PAGE_MESSAGES,
    THREAD_FIELDS,
    Document,
    next_page,
    take_out_pipeline,
    unpack,
)

logger = logging.getLogger(__name__)

TRIES = 10
"""How often an operation starts again because the thread has changed in the meantime."""

_PAGES_PER_WRITE = 2


def thread_query(principal: Principal, thread_id: str) -> Document:
    """Build the query for a thread of this organization."""
    return {"_id": thread_id, "organization_id": principal.organization_id}


def contention(thread_id: str) -> StoreUnavailable:
    """The error after TRIES."""
    return StoreUnavailable(f"thread {thread_id} kept changing")


class MongoPages(MongoBase):
    # reading

    """Reading the messages of a thread, and moving them into pages."""

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
                place = (await self._find_paged_entry(thread_id, before))["n"]
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
        """The messages from place `first` up to `end` that fit: those that `thread` contains, the others from pages.

        Of the pages, first the sizes are read, then only the pages with messages that fit. None if the thread has
        changed since it was read: a message is missing, or its run has ended. At the `last` attempt a run without a
        record is returned as it began.
        """
        first = max(0, first)
        found = {entry["n"]: entry for entry in thread.get("messages", []) if first <= entry["n"] < end}
        page_of: dict[int, str] = {}
        if len(found) < end - first:
            outlines = await self.db.pages.find(
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
            pages = await self.db.pages.find({"_id": {"$in": sorted(set(wanted.values()))}}, {"messages": 1})
            bodies = {entry["n"]: entry for page in pages for entry in page["messages"]}
            if not bodies.keys() >= wanted.keys():
                return None
            chosen = [bodies[entry["n"]] if entry["n"] in wanted else entry for entry in chosen]
        return MessagePage(await unpack(chosen[::-1]), cut=len(chosen) < len(entries))

    async def _find_entry(self, principal: Principal, thread_id: str, message_id: str) -> tuple[Document, Document]:
        """The thread's HEAD_FIELDS and one of its entries. Raises: ThreadNotFound, MessageNotFound."""
        thread = await self._read_thread(
            principal, thread_id, {**HEAD_FIELDS, "messages": {"$elemMatch": {"id": message_id}}}
        )
        entries = thread.get("messages") or [await self._find_paged_entry(thread_id, message_id)]
        return thread, entries[0]

    async def _find_paged_entry(self, thread_id: str, message_id: str) -> Document:
        """Raises: MessageNotFound."""
        fields = {"thread_id": 1, "messages": {"$elemMatch": {"id": message_id}}}
        page = await self.db.pages.find_one({"messages.id": message_id}, fields)
        if page is None or page["thread_id"] != thread_id:
            raise MessageNotFound(message_id)
        entry: Document = page["messages"][0]
        return entry

    async def _unpack_current(self, thread: Document, entries: list[Document], *, last: bool) -> list[Message] | None:
        """The messages, that of a run in progress as its last checkpoint left it; None if the run has ended since.

        At the `last` attempt a run without a record is returned as it began.
        """
        shown = await self._with_partial(thread, entries, last=last)
        return None if shown is None else await unpack(shown)

    async def _with_partial(self, thread: Document, entries: list[Document], *, last: bool) -> list[Document] | None:
        """The entries, that of a run in progress as its last checkpoint left it; None as in `_unpack_current`."""
        running = (thread["running"] or {}).get("id")
        if any(entry["id"] == running for entry in entries):
            run = await self.db.runs.find_one(
                {"_id": running, "organization_id": thread["organization_id"]}, {"partial": 1, "size": 1}
            )
            if run is None and not last:
                return None
            if run is not None:
                partial = {"body": run["partial"], "size": run["size"]}
                entries = [entry | partial if entry["id"] == running else entry for entry in entries]
        return entries

    # moving messages into pages

    async def _move_surplus(self, principal: Principal, thread_id: str, count: int, size: int) -> None:
        """Move what exceeds the limits into pages, at most _PAGES_PER_WRITE. If that fails, the next write does it."""
        if not self.limits.exceeded(count, size):
            return
        try:
            for _ in range(_PAGES_PER_WRITE):
                if not await self._move(principal, thread_id):
                    return
        except StoreUnavailable as error:
            logger.warning("The messages of thread %s were not moved into pages yet: %s", thread_id, error)

    async def _make_room(self, principal: Principal, thread_id: str, need: int) -> None:
        """Move messages into pages until the document has room for that many more bytes.

        Raises: ValueError if it never will have.
        """
        while (await self._read_thread(principal, thread_id, HEAD_FIELDS))["bytes"] + need > DOCUMENT_BYTES:
            if not await self._move(principal, thread_id, everything=True):
                raise ValueError(f"thread {thread_id} has no room for {need} bytes")

    async def _move(self, principal: Principal, thread_id: str, *, everything: bool = False) -> bool:
        """Write a page, or use one that was left behind, and take its messages out of the thread; False if no need."""
        thread = await self.db.threads.find_one(
            thread_query(principal, thread_id), {**HEAD_FIELDS, "messages": 1, "keys": 1}
        )
        if thread is None:
            return False
        fields = {"first": 1, "last": 1, "keys.ref": 1}
        page = await self.db.pages.find_one(
            {"thread_id": thread_id, "first": {"$in": [entry["n"] for entry in thread["messages"]]}}, fields
        )
        if page is None:
            page = next_page(thread, self.limits, everything=everything)
            if page is None:
                return False
            if not await self.db.pages.insert(page):
                page = await self.db.pages.find_one({"_id": page["_id"]}, fields)
        if page is None:
            return False
        if (
            await self.db.threads.update_one(thread_query(principal, thread_id), take_out_pipeline(page), {"_id": 1})
            is None
        ):
            await self.db.pages.delete_one({"_id": page["_id"]})
            return False
        return True
