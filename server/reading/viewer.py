"""A viewer: one reading of a thread's log, for whatever transport asks.

It hands on batches of encoded entries, puts a thread.snapshot where contiguity can't be proven, and knows where its
reading ends. A transport pulls `next()` and writes; it decides nothing.

A snapshot has the thread's latest 50 messages; past 8 MB it is fewer, for every reader that stops holds its own.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from typing import Literal

from msgspec.structs import replace

from agent_chat.server.encoding import encode_list
from agent_chat.stores.buffer import Cursor, Entry
from agent_chat.stores.contracts import EventLog, ThreadStore
from agent_chat.stores.errors import Gap, LogUnavailable, NotFound
from agent_chat.stores.events import (
    TERMINAL_TYPES,
    Event,
    MessageCreated,
    ThreadDeleted,
    ThreadSnapshot,
    decode,
    encode,
    message_id_of,
    terminal_event,
)
from agent_chat.stores.fold import fold
from agent_chat.stores.models import Message, Principal, Thread

_POSITION = re.compile(r"\d{1,20}-\d{1,20}", re.ASCII)
_ENDS = TERMINAL_TYPES | {"message.created"}
NEXT_END: Literal["next"] = "next"
_AWAY_SECONDS = 0.5
_GAP_SECONDS = 5.0


class Viewer:
    """One reader of a thread.

    Args:
        after: the position to resume behind; null begins with a snapshot.
        begin: hold everything back until the `message.created` of this message.
        until: end behind the terminal event of this run (or behind `message.created` of a message that is only
            stored); `"next"`: behind the next terminal event; null: never, but for thread.deleted.
    """

    def __init__(
        self,
        store: ThreadStore,
        log: EventLog,
        who: Principal,
        thread_id: str,
        *,
        after: str | None,
        begin: str | None = None,
        until: str | None = None,
    ) -> None:
        self._store = store
        self._log = log
        self.who = who
        self._thread_id = thread_id
        self._begin = begin
        self._until = until
        self._ended = False
        self._gaps = 0
        self._gap_at = -math.inf
        self._cursor: Cursor | None = None
        if after is not None and _POSITION.fullmatch(after):
            self._cursor = log.cursor(thread_id, after)

    async def next(self) -> list[Entry] | None:
        """The next entries, waiting for them; empty after `wake`; null once the reading has ended."""
        while not self._ended:
            try:
                if self._cursor is None:
                    return await self._snapshot()
                entries = await self._cursor.next()
            except LogUnavailable:
                await asyncio.sleep(_AWAY_SECONDS)
                return []
            except Gap:
                self._close_cursor()
                await self._pause_after_gap()
                continue
            shown = self._cut(entries)
            if shown or not entries:
                return shown
        return None

    def wake(self) -> None:
        """Make `next` return soon, with an empty list if there is nothing else."""
        if self._cursor:
            self._cursor.wake()

    def close(self) -> None:
        """End the viewer and release its cursor."""
        self._ended = True
        self._close_cursor()

    def _close_cursor(self) -> None:
        if self._cursor:
            self._cursor.close()
            self._cursor = None

    def _cut(self, entries: list[Entry]) -> list[Entry]:
        """What this reading shows of a batch: from where it begins to where it ends."""
        if self._begin is None and self._until is None and entries and entries[-1].type != "thread.deleted":
            return entries
        shown: list[Entry] = []
        for entry in entries:
            event = decode(entry.data) if entry.type in _ENDS else None
            if self._begin is not None and entry.type != "thread.deleted":
                if not isinstance(event, MessageCreated) or event.message.id != self._begin:
                    continue
                self._begin = None
            shown.append(entry)
            if entry.type == "thread.deleted" or (event is not None and self._is_end(event)):
                self._ended = True
                break
        return shown

    def _is_end(self, event: Event) -> bool:
        if self._until == NEXT_END:
            return not isinstance(event, MessageCreated)
        return self._until is not None and message_id_of(event) == self._until

    async def _snapshot(self) -> list[Entry]:
        try:
            position, thread = await self._read()
            if self._until == NEXT_END:
                running = _running(thread)
                self._until = running.id if running else None
                self._ended = running is None
            ending = await self._ending(thread) if self._until else None
        except NotFound:
            gone = Entry(await self._log.tail(self._thread_id), encode(ThreadDeleted(self._thread_id)))
            self._ended = True  # not before: while the log is unreachable this is tried again
            return [gone]
        self._begin = None
        entries = [Entry(position, await _encode_snapshot(thread))]
        if ending is not None:
            self._ended = True
            entries.append(Entry(position, encode(ending)))
        return entries

    async def _read(self) -> tuple[str, Thread]:
        """A thread exactly as its log has told it up to a position: position, store, then the run's events."""
        while True:
            position = await self._log.tail(self._thread_id)
            cursor = self._log.cursor(self._thread_id, position)
            try:
                thread = (await self._store.read(self.who, self._thread_id, message_limit=50)).thread
                if running := _running(thread):
                    events = await self._log.run_events(self._thread_id, running.id, position)
                    thread = _with(thread, fold(events, onto=running))
            except Gap:
                cursor.close()
                await self._pause_after_gap()
                continue
            except BaseException:
                cursor.close()
                raise
            self._cursor = cursor
            return position, thread

    async def _pause_after_gap(self) -> None:
        """Pause from the second gap in a row on, so that a log that keeps losing entries is not read in a loop."""
        now = time.monotonic()
        self._gaps = self._gaps + 1 if now - self._gap_at < _GAP_SECONDS else 0
        self._gap_at = now
        await asyncio.sleep(min(self._gaps * 0.05, _AWAY_SECONDS))

    async def _ending(self, thread: Thread) -> Event | None:
        """The event that this reading was to end with, if the snapshot already holds what it tells."""
        for message in thread.messages:
            if message.id == self._until:
                break
        else:
            message = await self._store.get_message(self.who, thread.id, self._until or "")
        if message.in_progress:
            return None
        return terminal_event(message) if message.status else MessageCreated(message)


def _running(thread: Thread) -> Message | None:
    return next((message for message in reversed(thread.messages) if message.in_progress), None)


async def _encode_snapshot(thread: Thread) -> bytes:
    """`encode(ThreadSnapshot(thread))`, in pieces."""
    empty = encode(ThreadSnapshot(replace(thread, messages=[])))
    return b"".join([empty.removesuffix(b"[]}}"), *await encode_list(thread.messages), b"}}"])


def _with(thread: Thread, message: Message) -> Thread:
    return replace(thread, messages=[message if old.id == message.id else old for old in thread.messages])


async def resumed(store: ThreadStore, log: EventLog, who: Principal, thread_id: str, position: str) -> Viewer | None:
    """The rest of a POST's stream behind `position`; null if the client had all of it.

    Raises: ThreadNotFound.
    """
    await store.get(who, thread_id, message_limit=0)
    try:
        if _POSITION.fullmatch(position) and not await log.in_run(thread_id, position):
            return None
    except (Gap, LogUnavailable):
        pass
    return Viewer(store, log, who, thread_id, after=position, until=NEXT_END)
