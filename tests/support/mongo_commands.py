"""A MongoDB store whose every command a test can count, break, or come before."""

from __future__ import annotations

import base64
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from itertools import pairwise
from typing import Any, cast

import bson
from msgspec.structs import replace
from pymongo.monitoring import CommandFailedEvent, CommandListener, CommandStartedEvent, CommandSucceededEvent

from agent_chat.stores.errors import StoreUnavailable
from agent_chat.stores.models import Message, Principal, Thread, new_id, utcnow
from agent_chat.stores.mongo.documents import MEASURE_STAGES, EmbeddingLimits, build_older_messages
from agent_chat.stores.mongo.native import Document, pack, to_date
from agent_chat.stores.mongo.store import INDEXES, WITHOUT_INDEXES, MongoStore, MotorCollections
from tests.support.samples import ids, new_message, started_thread

_MILLISECOND = timedelta(milliseconds=1)


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


def watch(db: MotorCollections, commands: Commands) -> None:
    """Send every command of the store through `commands`."""
    for name in (*INDEXES, *WITHOUT_INDEXES):
        setattr(db, name, _Watched(name, getattr(db, name), commands))


@asynccontextmanager
async def opened(
    url: str,
    *,
    limits: EmbeddingLimits | None = None,
    lease: float = 20.0,
    commands: Commands | None = None,
    read: Read | None = None,
) -> AsyncIterator[MongoStore]:
    db = MotorCollections(url, timeoutMS=60_000, event_listeners=[read] if read else [])
    await db.prepare()
    if read:  # not what opening has sent
        read.clear()
        read.queries.clear()
    if commands:
        watch(db, commands)
    store = MongoStore(db, lease=lease, clock=utcnow, limits=limits)
    try:
        yield store
    finally:
        await store.close()


async def stored(store: MongoStore, thread_id: str) -> tuple[Document, list[Document]]:
    """A thread's document and the messages moved out of it, as they are in the database."""
    thread = await store.db.threads.find_one({"_id": thread_id})
    assert thread is not None
    return thread, await store.db.older_messages.find({"thread_id": thread_id}, sort=[("n", 1)])


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
    n, at = document["total"], max(to_date(first.created_at), document["pushed"][-1] + _MILLISECOND)
    entries: list[Document] = [
        (await pack(message)).document | {"created_at": at + index * _MILLISECOND, "n": n + index}
        for index, message in enumerate(messages)
    ]
    step = store.limits.slack + 1
    moved = 0 if onto else max(0, (len(entries) - store.limits.messages) // step) * step
    owner = {"_id": thread.id, "organization_id": thread.organization_id, "keys": []}
    await _insert(store, build_older_messages(owner, entries[:moved]))
    changes: Document = {
        "messages": {"$concatArrays": ["$messages", entries[moved:]]},
        "total": n + len(entries),
        "pushed": [entries[-1]["created_at"]],
        "fence": {"$add": ["$fence", moved // step]},
    }
    if moved:
        changes["moved_bytes"] = moved * 300
    await store.db.threads.update_one({"_id": thread.id}, [{"$set": changes}, *MEASURE_STAGES], {"_id": 1})
    return thread, messages


async def _insert(store: MongoStore, documents: list[Document]) -> None:
    """Insert them, thousands per command, and many without indexes, which take longer than the documents."""
    db = cast(MotorCollections, store.db)
    if is_large := len(documents) > 10_000:
        await db._database["older_messages"].drop_indexes()
    for start in range(0, len(documents), 2000):
        await db.older_messages.insert_missing(documents[start : start + 2000])
    if is_large:
        await db.prepare()


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
    thread, moved = await stored(store, thread_id)
    assert sorted(entry["n"] for entry in moved + thread["messages"]) == list(range(thread["total"]))
    found = {document["id"] for document in moved} | {entry["id"] for entry in thread["messages"]}
    assert found == set(ids(messages))
    assert len(messages) == thread["total"]
    assert all(earlier.created_at < later.created_at for earlier, later in pairwise(messages))
    return messages
