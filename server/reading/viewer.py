"""A viewer: one reading of a thread's log, for any transport.

It returns batches of encoded entries, inserts a thread.snapshot where contiguity cannot be proven, and knows where its
reading ends. A transport calls `next()` and writes; it decides nothing.

A snapshot has the thread's latest 50 messages, or fewer if they exceed 8 MB: a reader that has stopped holds its own
copy in memory.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from typing import Literal

from msgspec.structs import replace

from agent_chat.server.encoding import encode_list
from agent_chat.server.reading.queries import is_in_run, read_run_events
from agent_chat.server.timing import Timing
from agent_chat.stores.buffer import Cursor, Entry
from agent_chat.stores.contracts import EventLog, ThreadStore
from agent_chat.stores.errors import Gap, LogUnavailable, NotFound
from agent_chat.stores.events import (
    CLOSING_TYPES,
    TERMINAL_TYPES,
    Event,
    MessageCreated,
    ThreadDeleted,
    ThreadSnapshot,
    decode,
    encode,
    message_id_of,
    terminal_event,
    type_name,
)
from agent_chat.stores.fold import fold
from agent_chat.stores.models import Message, Principal, Thread

_POSITION = re.compile(r"\d{1,20}-\d{1,20}", re.ASCII)
_BOUNDARIES = TERMINAL_TYPES | {type_name(MessageCreated)}
"""The types of the events at which a reading can begin or end."""
_GAP_PAUSE_SECONDS = 0.05
SNAPSHOT_MESSAGES = 50
NEXT_END: Literal["next"] = "next"


class Viewer:
    """One reading of a thread.

    Its state: `_cursor` is None before the first snapshot and after a gap; the next call of `next` then makes a
    snapshot, and a cursor behind it. `_begin` is None once entries are shown. `_until` changes once from "next" to the
    running message's id if a snapshot is made first. `_ended` is set with the last entries, and by `close`.

    Args:
        after: the position to resume behind; None, or a string that is no position, begins with a snapshot.
        begin: show nothing before the `message.created` of this message. A snapshot replaces what was held back.
        until: where to end: behind the terminal event of this run, or behind the `message.created` of a message that
            started no run; `"next"`: behind the next terminal event; None: never. `thread.deleted` always ends it.

    Attributes:
        principal: whose reading it is.
    """

    def __init__(
        self,
        store: ThreadStore,
        log: EventLog,
        principal: Principal,
        thread_id: str,
        *,
        after: str | None,
        begin: str | None = None,
        until: str | None = None,
        timing: Timing = Timing(),
    ) -> None:
        self.principal = principal
        self._store = store
        self._log = log
        self._thread_id = thread_id
        self._begin = begin
        self._until = until
        self._timing = timing
        self._ended = False
        self._gaps = 0
        self._gap_at = -math.inf
        self._cursor: Cursor | None = None
        if after is not None and _POSITION.fullmatch(after):
            self._cursor = log.cursor(thread_id, after)

    async def next(self) -> list[Entry] | None:
        """Wait for the next entries and return them.

        Returns: an empty list after `wake`, and while the log is unreachable; None once the reading has ended.

        Raises: StoreUnavailable if a snapshot is due.
        """
        while not self._ended:
            try:
                if self._cursor is None:
                    return await self._make_snapshot()
                entries = await self._cursor.next()
            except LogUnavailable:
                await asyncio.sleep(self._timing.unreachable_pause)
                return []
            except Gap:
                self._close_cursor()
                await self._pause_after_gap()
                continue
            shown = self._select(entries)
            if shown or not entries:
                return shown
        return None

    def wake(self) -> None:
        """Make `next` return soon, with an empty list if there is nothing new."""
        if self._cursor:
            self._cursor.wake()

    def close(self) -> None:
        """End the reading; call it in the task that opened it."""
        self._ended = True
        self._close_cursor()

    def _close_cursor(self) -> None:
        if self._cursor:
            self._cursor.close()
            self._cursor = None

    def _select(self, entries: list[Entry]) -> list[Entry]:
        """The entries of a batch that lie between the beginning and the end of this reading."""
        if self._begin is None and self._until is None and entries and entries[-1].type not in CLOSING_TYPES:
            return entries
        shown: list[Entry] = []
        for entry in entries:
            event = decode(entry.data) if entry.type in _BOUNDARIES else None
            if self._begin is not None and entry.type not in CLOSING_TYPES:
                if not isinstance(event, MessageCreated) or event.message.id != self._begin:
                    continue
                self._begin = None
            shown.append(entry)
            if entry.type in CLOSING_TYPES or (event is not None and self._is_end(event)):
                self._ended = True
                break
        return shown

    def _is_end(self, event: Event) -> bool:
        if self._until == NEXT_END:
            return not isinstance(event, MessageCreated)
        return self._until is not None and message_id_of(event) == self._until

    async def _make_snapshot(self) -> list[Entry]:
        """A thread.snapshot, and behind it the event that ends this reading, if the snapshot contains that already."""
        try:
            position, thread = await self._read_thread()
            if self._until == NEXT_END:
                running = _running_message(thread)
                self._until = running.id if running else None
                self._ended = running is None
            ending = await self._find_ending(thread) if self._until else None
        except NotFound:
            deleted = Entry(await self._log.tail(self._thread_id), encode(ThreadDeleted(self._thread_id)))
            self._ended = True  # only now: while the log is unreachable this is tried again
            return [deleted]
        self._begin = None
        entries = [Entry(position, await _encode_snapshot(thread))]
        if ending is not None:
            self._ended = True
            entries.append(Entry(position, encode(ending)))
        return entries

    async def _read_thread(self) -> tuple[str, Thread]:
        """The thread as of a position, and a cursor behind it.

        Read in this order: position, store, the running message's events up to the position. In any other order
        messages would be lost in between.
        """
        while True:
            position = await self._log.tail(self._thread_id)
            cursor = self._log.cursor(self._thread_id, position)
            try:
                part = await self._store.read(self.principal, self._thread_id, message_limit=SNAPSHOT_MESSAGES)
                thread = part.thread
                if running := _running_message(thread):
                    events = await read_run_events(self._log, self._thread_id, running.id, position)
                    thread = _with_message(thread, fold(events, onto=running))
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
        """Pause from the second gap in a row on: a log that keeps losing entries is not read in a tight loop."""
        now = time.monotonic()
        self._gaps = self._gaps + 1 if now - self._gap_at < self._timing.repeated_gap else 0
        self._gap_at = now
        await asyncio.sleep(min(self._gaps * _GAP_PAUSE_SECONDS, self._timing.unreachable_pause))

    async def _find_ending(self, thread: Thread) -> Event | None:
        """The event at which this reading ends, if it has happened before the snapshot."""
        for message in thread.messages:
            if message.id == self._until:
                break
        else:
            message = await self._store.get_message(self.principal, thread.id, self._until or "")
        if message.in_progress:
            return None
        return terminal_event(message) if message.status else MessageCreated(message)


def _running_message(thread: Thread) -> Message | None:
    return next((message for message in reversed(thread.messages) if message.in_progress), None)


async def _encode_snapshot(thread: Thread) -> bytes:
    """`encode(ThreadSnapshot(thread))`, encoded in pieces."""
    empty = encode(ThreadSnapshot(replace(thread, messages=[])))
    return b"".join([empty.removesuffix(b"[]}}"), *await encode_list(thread.messages), b"}}"])


def _with_message(thread: Thread, message: Message) -> Thread:
    return replace(thread, messages=[message if old.id == message.id else old for old in thread.messages])


async def resume(
    store: ThreadStore, log: EventLog, principal: Principal, thread_id: str, position: str, timing: Timing = Timing()
) -> Viewer | None:
    """Read the rest of a POST's stream behind `position`; None if the client has all of it.

    The caller has checked that the thread exists.
    """
    try:
        if _POSITION.fullmatch(position) and not await is_in_run(log, thread_id, position):
            return None
    except (Gap, LogUnavailable):
        pass
    return Viewer(store, log, principal, thread_id, after=position, until=NEXT_END, timing=timing)
