"""A MongoDB store whose every command a test can count, break, or come before."""

from __future__ import annotations

import base64
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any, cast

import bson
from msgspec.structs import replace
from pymongo.monitoring import CommandFailedEvent, CommandListener, CommandStartedEvent, CommandSucceededEvent

from agent_chat.stores.errors import StoreUnavailable
from agent_chat.stores.models import Message, Principal, Thread, new_id, utcnow
from agent_chat.stores.mongo.documents import MEASURE_STAGES, Document, EmbeddingLimits, build_entry, pack, to_millis
from agent_chat.stores.mongo.store import INDEXES, MongoStore, MotorCollections
from tests.support.samples import ids, new_message, started_thread


class Read(CommandListener):
    """What the driver read, as command monitoring reports it: commands, documents and bytes.

    Attributes:
        queries: one query of each shape that was ever sent, as a find.
        preferences: the read preferences that were ever sent.
    """

    def __init__(self) -> None:
        self.queries: dict[tuple[str, str], Document] = {}
        self.preferences: set[str | None] = set()
        self.clear()

    def clear(self) -> None:
        self.commands: list[str] = []
        self.documents = 0
        self.bytes = 0

    def started(self, event: CommandStartedEvent) -> None:
        command = event.command
        self.preferences.add(command.get("$readPreference", {}).get("mode"))
        query = command.get("filter") or command.get("query")
        if event.command_name == "delete":
            query = command["deletes"][0]["q"]
        if query:
            collection = command[event.command_name]
            find = {"find": collection, "filter": query, "sort": command.get("sort") or {}}
            self.queries[collection, " ".join(sorted(query))] = find

    def succeeded(self, event: CommandSucceededEvent) -> None:
        cursor = event.reply.get("cursor", {})
        found = [*cursor.get("firstBatch", []), *cursor.get("nextBatch", [])]
        self.commands.append(event.command_name)
        self.documents += len(found)
        self.bytes += sum(len(bson.encode(document)) for document in found)

    def failed(self, event: CommandFailedEvent) -> None:
        self.commands.append(f"{event.command_name} failed")


class Commands:
    """The commands of one store by name (`threads.update_one`), in order.

    Attributes:
        dies_at: the index of the command at which the process dies: neither it nor any later one gets a response.
        response_lost: that command is done all the same.
        meanwhile: a command's name and a function that is called once before it.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.dies_at: int | None = None
        self.response_lost = False
        self.meanwhile: tuple[str, Callable[[], Awaitable[object]]] | None = None

    async def run(self, name: str, call: Callable[[], Awaitable[object]]) -> object:
        if self.meanwhile and self.meanwhile[0] == name:
            (_, happening), self.meanwhile = self.meanwhile, None
            await happening()
        index = len(self.names)
        self.names.append(name)
        if self.dies_at is None or index < self.dies_at:
            return await call()
        if index == self.dies_at and self.response_lost:
            await call()
        raise StoreUnavailable("the test took the database away")


class _Watched:
    def __init__(self, name: str, inner: object, commands: Commands) -> None:
        self._name = name
        self._inner = inner
        self._commands = commands

    def __getattr__(self, verb: str) -> Callable[..., Awaitable[object]]:
        call = getattr(self._inner, verb)

        def watched(*args: Any, **kwargs: Any) -> Awaitable[object]:
            return self._commands.run(f"{self._name}.{verb}", lambda: call(*args, **kwargs))

        return watched


@asynccontextmanager
async def opened(
    url: str,
    *,
    limits: EmbeddingLimits | None = None,
    lease: float = 20.0,
    commands: Commands | None = None,
    read: Read | None = None,
) -> AsyncIterator[MongoStore]:
    db = MotorCollections(url, timeoutMS=30_000, event_listeners=[read] if read else [])
    await db.prepare()
    for name in INDEXES if commands else ():
        setattr(db, name, _Watched(name, getattr(db, name), commands or Commands()))
    store = MongoStore(db, lease=lease, clock=utcnow, limits=limits)
    try:
        yield store
    finally:
        await store.close()


async def stored(store: MongoStore, thread_id: str) -> tuple[Document, list[Document]]:
    """A thread's document and its pages, as they are in the database."""
    thread = await store.db.threads.find_one({"_id": thread_id})
    assert thread is not None
    return thread, await store.db.pages.find({"thread_id": thread_id}, sort=[("first", 1)])


async def loaded(
    store: MongoStore, principal: Principal, contents: list[str], *, onto: Thread | None = None
) -> tuple[Thread, list[Message]]:
    """A new thread with a message of each content, written directly as the documents that as many appends leave.

    100,000 appends would take a quarter of an hour on SecantusDB. `onto`: put them behind what that thread has; all of
    them stay in its document.
    """
    thread = onto or await started_thread(store, principal)
    first = new_message(thread.id, "", "system")
    messages = [replace(first, id=new_id(), content=content) for content in contents]
    document = (await store.db.threads.find_one({"_id": thread.id}, {"total": 1, "pushed": 1})) or {}
    n, at = document["total"], max(to_millis(first.created_at), document["pushed"][-1] + 1)
    packed = [await pack(message) for message in messages]
    entries = [build_entry(one, n + index, at + index) for index, one in enumerate(packed)]
    size = store.limits.slack + 1
    pages = 0 if onto else max(0, (len(entries) - store.limits.messages) // size)
    await _put_pages(store, thread.id, [entries[page * size : (page + 1) * size] for page in range(pages)])
    changes: Document = {
        "messages": {"$concatArrays": ["$messages", entries[pages * size :]]},
        "total": n + len(entries),
        "pushed": [entries[-1]["at"]],
        "fence": {"$add": ["$fence", pages]},
    }
    if pages:
        changes["paged_bytes"] = pages * size * 300
    await store.db.threads.update_one({"_id": thread.id}, [{"$set": changes}, *MEASURE_STAGES], {"_id": 1})
    return thread, messages


async def _put_pages(store: MongoStore, thread_id: str, pages: list[list[Document]]) -> None:
    """Insert the pages, a hundred per command: a command takes longer than a page."""
    documents: list[Document] = [
        {
            "_id": f"{thread_id}/{page[0]['n']}",
            "thread_id": thread_id,
            "first": page[0]["n"],
            "last": page[-1]["n"],
            "messages": page,
            "keys": [],
        }
        for page in pages
    ]
    database = cast(MotorCollections, store.db)._database
    for start in range(0, len(documents), 100):
        await database["pages"].insert_many(documents[start : start + 100], ordered=False)


async def every_message(store: MongoStore, principal: Principal, thread_id: str, limit: int = 3) -> list[Message]:
    """All of a thread's messages, paged back to the beginning."""
    found: list[Message] = []
    while older := (
        await store.list_messages(principal, thread_id, before=found[0].id if found else None, limit=limit)
    ).messages:
        found = older + found
    return found


def noise(size: int) -> str:
    """Text that does not compress."""
    return base64.b64encode(os.urandom(size * 3 // 4)).decode()


async def note(store: MongoStore, principal: Principal, thread_id: str, content: str = "note") -> Message:
    return (await store.append_message(principal, new_message(thread_id, content, "system"))).message


async def whole(store: MongoStore, principal: Principal, thread_id: str) -> list[Message]:
    """Return all messages; check that the documents have each of them once, in order and without gaps."""
    messages = await every_message(store, principal, thread_id)
    thread, pages = await stored(store, thread_id)
    entries = [entry for page in pages for entry in page["messages"]] + thread["messages"]
    assert sorted(entry["n"] for entry in entries) == list(range(thread["total"]))
    assert {entry["id"] for entry in entries} == set(ids(messages))
    assert len(messages) == thread["total"]
    assert all(page["messages"][0]["n"] == page["first"] for page in pages)
    assert all(page["messages"][-1]["n"] == page["last"] for page in pages)
    assert all(earlier.created_at < later.created_at for earlier, later in pairwise(messages))
    return messages
