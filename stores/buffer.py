"""Readers of a log: encoded entries in one shared buffer per thread, and cursors over it.

A viewer is a number that points into the buffer, not a queue: an event is encoded once per process and kind of
channel, a viewer that wakes takes all that is new in one write, and a slow one just lags. Per-viewer queues were
refused: they cost memory per viewer and event, and must choose whom to drop.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterable

from agent_chat.stores.budget import LogBudget
from agent_chat.stores.errors import Gap
from agent_chat.stores.events import (
    RUN_TYPES,
    TURN_TYPES,
    WHOLE_TYPES,
    Event,
    MessageCreated,
    RunStarted,
    TerminalEvent,
    decode,
    message_id_of,
    type_of,
)

RETAINED_EVENTS = 10_000
RETAINED_BYTES = 8 * 2**20
RETAINED_SECONDS = 3600.0
_TRIM_EVERY = 500
_SHARED = 64
"""How many of the newest entries store their wire forms, for readers who come soon after each other."""
_ENTRY_BYTES = 192
"""What an entry takes beside its data: two objects' headers, the position, its slots."""
_BUFFER_BYTES = 1500
"""What a log without an entry takes."""


class Entry:
    """One event in a log: its position, its type, and its bytes for each kind of channel.

    A wire form is stored for the next reader while the entry is among the newest of a buffer; `budget` counts it there.
    """

    __slots__ = ("_sse", "_ws", "budget", "data", "position", "type")

    def __init__(self, position: str, data: bytes) -> None:
        self.position = position
        self.data = data
        self.type = type_of(data)
        self._sse: bytes | None = None
        self._ws: str | None = None
        self.budget: LogBudget | None = None

    @property
    def sse(self) -> bytes:
        """A server-sent event with LF line ends, `id` last: a reader cut off inside the frame must not skip it."""
        frame = self._sse
        if frame is None:
            frame = b"event: %b\ndata: %b\nid: %b\n\n" % (self.type.encode(), self.data, self.position.encode())
            if self.budget is not None:
                self._sse = frame
                self.budget.used += sys.getsizeof(frame)
        return frame

    @property
    def ws(self) -> str:
        """The same object with `position` inside."""
        frame = self._ws
        if frame is None:
            frame = f'{self.data[:-1].decode()},"position":"{self.position}"}}'
            if self.budget is not None:
                self._ws = frame
                self.budget.used += sys.getsizeof(frame)
        return frame

    def unshare(self) -> None:
        """Release the wire forms: a late reader makes its own."""
        if self.budget is not None:
            if self._sse is not None:
                self.budget.used -= sys.getsizeof(self._sse)
                self._sse = None
            if self._ws is not None:
                self.budget.used -= sys.getsizeof(self._ws)
                self._ws = None
            self.budget = None


class Buffer:
    """The newest entries of one thread's log, in this process.

    Args:
        pages: reads what follows a position that is not in the buffer (any more, or yet); without it that is a Gap. It
            returns nothing only once the position is in the buffer or the buffer is lost.
        budget: what the process' logs may take together.
        evicted: called where the budget takes the last entry; by default the buffer is lost.
    """

    def __init__(
        self,
        pages: Callable[[str], Awaitable[list[Entry]]] | None = None,
        budget: LogBudget | None = None,
        evicted: Callable[[], None] | None = None,
    ) -> None:
        self.entries: list[Entry] = []
        self.first = 0
        self.bytes = 0
        self.lost = False
        self.cut_end = -1
        self.pages = pages
        self.cursors: set[Cursor] = set()
        self._evicted = evicted or self.lose
        self._budget = budget or LogBudget()
        self._budget.used += _BUFFER_BYTES
        self._budget.enter(self)

    @property
    def end(self) -> int:
        """The index after the last entry."""
        return self.first + len(self.entries)

    def push(self, entry: Entry) -> None:
        """Add an entry."""
        entries, budget, size = self.entries, self._budget, len(entry.data)
        entry.budget = budget
        entries.append(entry)
        self.bytes += size
        budget.used += size + _ENTRY_BYTES
        if len(entries) > _SHARED:
            entries[-1 - _SHARED].unshare()
            if len(entries) >= RETAINED_EVENTS + _TRIM_EVERY:
                self._drop(len(entries) - RETAINED_EVENTS)
        while self.bytes > RETAINED_BYTES and len(entries) > 1:
            self._drop(max(1, len(entries) // 20))
        if budget.used > budget.limit:
            budget.make_room(self)
        for cursor in self.cursors:
            cursor.notify()

    def _drop(self, count: int) -> None:
        size = 0
        for entry in self.entries[:count]:
            entry.unshare()
            size += len(entry.data)
        self.bytes -= size
        self._budget.used -= size + count * _ENTRY_BYTES
        del self.entries[:count]
        self.first += count

    def shrink(self) -> None:
        """Release all entries but the last: whoever reads at the end continues, all others get a Gap."""
        self._drop(len(self.entries) - 1)

    def evict(self, *, keep_last: bool) -> bool:
        """Release the older half if anybody follows, else all but the last; the last one on the next call.

        `cut_end` is where the log ended then: what was released may be newer than a run's last checkpoint, so a run
        that continues behind it must publish its whole message, or late readers would miss a part of the text.
        """
        self.cut_end = self.end
        if len(self.entries) <= 1 and keep_last:
            return False
        if len(self.entries) <= 1:
            self._evicted()
        elif self.cursors:
            self._drop(len(self.entries) // 2)
        else:
            self.shrink()
        return True

    def lose(self) -> None:
        """Declare that what follows is no continuation: every cursor gets a Gap, and the memory is released."""
        if not self.lost:
            self.lost = True
            self._drop(len(self.entries))
            self._budget.used -= _BUFFER_BYTES
            self._budget.leave(self)
        for cursor in self.cursors:
            cursor.notify()

    def join(self, cursor: Cursor) -> None:
        """Add a cursor."""
        self.cursors.add(cursor)
        if len(self.cursors) == 1:
            self._budget.follow(self)

    def part(self, cursor: Cursor) -> None:
        """Remove a cursor."""
        self.cursors.discard(cursor)
        if not self.cursors:
            self._budget.unfollow(self)

    def index_after(self, position: str) -> int | None:
        """Where the entry behind `position` is or will be; None if the position isn't here."""
        for back, entry in enumerate(reversed(self.entries)):
            if entry.position == position:
                return self.end - back
        return None


class Cursor:
    """One viewer's place in a log. `close` it in the task that opened it."""

    def __init__(self, buffer: Buffer, after: str, closed: Callable[[], None] | None = None) -> None:
        self.position = after
        self._buffer = buffer
        self._index = buffer.index_after(after)
        self._closed = closed
        self._waiting: asyncio.Future[None] | None = None
        self._woken = False
        buffer.join(self)

    async def next(self) -> list[Entry]:
        """Everything new, waiting until there is something; an empty list after `wake` if there is none.

        Raises: Gap; LogUnavailable if nothing could be read now, and another call may.
        """
        while True:
            if self._buffer.lost:
                raise Gap(self.position)
            behind = self._behind()
            entries = await self._page() if behind else self._taken()
            if entries:
                self.position = entries[-1].position
                return entries
            if self._woken:
                self._woken = False
                return []
            if behind:
                continue
            self._waiting = asyncio.get_running_loop().create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None

    def _behind(self) -> bool:
        """True if what follows is not to be found in the buffer, or not yet."""
        if self._index is None:
            self._index = self._buffer.index_after(self.position)
        return self._index is None or self._index < self._buffer.first

    def _taken(self) -> list[Entry]:
        buffer = self._buffer
        if self._index is None or self._index >= buffer.end:
            return []
        entries = buffer.entries[self._index - buffer.first :]
        self._index = buffer.end
        return entries

    async def _page(self) -> list[Entry]:
        """What the log itself has next; nothing if by now the position is in the buffer, or the buffer is lost."""
        if self._buffer.pages is None:
            raise Gap(self.position)
        entries = await self._buffer.pages(self.position)
        self._index = self._buffer.index_after(entries[-1].position if entries else self.position)
        return entries

    def notify(self) -> None:
        """Wake the reader, if it waits."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def wake(self) -> None:
        """Make `next` return, with an empty list if there is nothing new: the viewer has something else to do."""
        self._woken = True
        self.notify()

    def close(self) -> None:
        """Stop reading; the buffer may then be released."""
        self._buffer.part(self)
        if self._closed:
            self._closed()
            self._closed = None


def position_before(entries: Iterable[Entry], message_id: str, run_id: str | None) -> str | None:
    """`EventLog.find` over a log's entries, oldest first."""
    before: str | None = None
    found: str | None = None
    for entry in entries:
        if entry.type in TURN_TYPES:
            event = decode(entry.data)
            if isinstance(event, MessageCreated) and event.message.id == message_id:
                found = before
                if run_id is None:
                    return found
            elif isinstance(event, RunStarted) and event.message.id == run_id:
                return found
        before = entry.position
    return None


def in_run(backwards: Iterable[Entry]) -> bool:
    """`EventLog.in_run` over the entries up to the position, newest first.

    Judged by ids, not by what came last: a terminal event may be said after the next question, and a paused
    worker's deltas, or an orphan's question once more, after or just before their own run's end.
    """
    ended: set[str] = set()
    newest: str | None = None
    for entry in backwards:
        if entry.type not in TURN_TYPES and (newest is not None or entry.type not in RUN_TYPES):
            continue
        match decode(entry.data):
            case TerminalEvent(message=message):
                ended |= {message.id, (message.run or {}).get("in_reply_to", message.id)}
            case RunStarted(message=message):
                return message.id not in ended
            case MessageCreated(message=message):
                if message.role == "user" and message.id not in ended:
                    return True
            case event:
                newest = message_id_of(event)
    return newest is not None and newest not in ended


def run_events(backwards: Iterable[Entry], run_id: str) -> list[Event]:
    """`EventLog.run_events` over the entries up to the position, newest first."""
    events: list[Event] = []
    for entry in backwards:
        if entry.type in RUN_TYPES:
            event = decode(entry.data)
            if message_id_of(event) == run_id:
                events.append(event)
                if entry.type in WHOLE_TYPES:
                    break
    return events[::-1]


def are_whole(events: list[Event]) -> bool:
    """True if a run's events begin with one that has its whole message, so that they need no checkpoint."""
    return bool(events) and events[0].whole_message
