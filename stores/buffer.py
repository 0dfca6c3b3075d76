"""Readers of a log: encoded entries in one shared buffer per thread, and cursors over it.

A cursor is an index into the buffer, not a queue: an event is encoded once per process (I20), a reader that wakes takes
everything new in one batch, and a slow reader lags. Queues per viewer were refused: they cost memory per viewer and
event, and have to choose whose events to drop.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from agent_chat.stores.budget import LogBudget
from agent_chat.stores.errors import Gap
from agent_chat.stores.events import type_of

RETAINED_EVENTS = 10_000
RETAINED_BYTES = 8 * 2**20
RETAINED_SECONDS = 3600.0
"""How much of a log is retained, and how long at least (I18)."""

_TRIM_EVERY = 500
_CACHED_ENTRIES = 64
"""How many of a buffer's newest entries cache their encoded forms, for readers that follow closely."""
_ENTRY_BYTES = 208
"""What an entry takes besides its data: the headers of two objects, the position, its slots."""
_DICT_BYTES = sys.getsizeof({"": None})
_BUFFER_BYTES = 1500
"""What a log without entries takes."""

_Form = TypeVar("_Form", bytes, str)


class Entry:
    """One event in a log.

    Attributes:
        position: its position.
        data: the event as `encode` returns it.
        type: the event's type.
        budget: counts the encoded forms while the entry caches them, that is, while it is among the newest of a
            buffer; else None.
    """

    __slots__ = ("_encode", "_form", "_forms_size", "_other_forms", "budget", "data", "position", "type")

    def __init__(self, position: str, data: bytes) -> None:
        self.position = position
        self.data = data
        self.type = type_of(data)
        self.budget: LogBudget | None = None
        self._encode: Callable[[Entry], Any] | None = None
        self._form: Any = None
        self._other_forms: dict[Callable[[Entry], Any], Any] | None = None
        self._forms_size = 0

    def encoded(self, encode: Callable[[Entry], _Form]) -> _Form:
        """Return `encode(self)`: what a dialect sends for this entry, encoded once for all readers that follow (I20).

        Args:
            encode: a module-level function; it is also the key in the cache.
        """
        if self._encode is encode:  # most entries are encoded for one kind of channel
            form: _Form = self._form
            return form
        if self._other_forms is not None and encode in self._other_forms:
            form = self._other_forms[encode]
            return form
        form = encode(self)
        if self.budget is not None:
            size = sys.getsizeof(form)
            if self._encode is None:
                self._encode, self._form = encode, form
            else:
                if self._other_forms is None:
                    self._other_forms = {}
                    size += _DICT_BYTES
                self._other_forms[encode] = form
            self._forms_size += size
            self.budget.used += size
        return form

    def drop_forms(self) -> None:
        """Stop caching encoded forms: late readers encode their own."""
        if self._encode is not None and self.budget is not None:
            self.budget.used -= self._forms_size
            self._encode = self._form = self._other_forms = None
            self._forms_size = 0
        self.budget = None


class Bounds:
    """How many entries a buffer holds, and how many bytes of data. Several buffers may share one, which may change."""

    __slots__ = ("bytes", "events")

    def __init__(self, events: int = RETAINED_EVENTS, bytes: int = RETAINED_BYTES) -> None:
        self.events = events
        self.bytes = bytes


class Buffer:
    """The newest entries of one thread's log, in this process.

    Args:
        pages: reads what follows a position that is not in the buffer (any more, or yet); without it, that is a Gap.
            Returns nothing only if the position has come into the buffer, or the buffer is lost.
        budget: bounds the memory of all logs of the process.
        evicted: called when the budget evicts the last entry; by default the buffer is lost.
        bounds: by default what a log retains.
        before: the position of the entry that precedes the first one in the log; None if it is unknown.

    Attributes:
        entries: oldest first.
        first: the index of `entries[0]`: the number of entries before it that were dropped.
        before: the position of the last entry that was dropped, or the argument.
        bytes: of the entries' data.
        lost: what follows does not continue these entries; every cursor raises Gap.
        cursors: those that are open.
    """

    def __init__(
        self,
        pages: Callable[[str], Awaitable[list[Entry]]] | None = None,
        budget: LogBudget | None = None,
        evicted: Callable[[], None] | None = None,
        bounds: Bounds | None = None,
        before: str | None = None,
    ) -> None:
        self.entries: list[Entry] = []
        self.first = 0
        self.before = before
        self.bytes = 0
        self.lost = False
        self.pages = pages
        self._bounds = bounds or Bounds()
        self.cursors: set[Cursor] = set()
        self._evicted = evicted or self.lose
        self._budget = budget or LogBudget()
        self._budget.used += _BUFFER_BYTES
        self._budget.add(self)

    @property
    def end(self) -> int:
        """The index of the next entry."""
        return self.first + len(self.entries)

    def push(self, entry: Entry) -> None:
        """Append an entry, drop what exceeds the bounds, and wake the cursors."""
        entries, budget, size = self.entries, self._budget, len(entry.data)
        entry.budget = budget
        entries.append(entry)
        self.bytes += size
        budget.used += size + _ENTRY_BYTES
        if len(entries) > _CACHED_ENTRIES:
            entries[-1 - _CACHED_ENTRIES].drop_forms()
            if len(entries) >= self._bounds.events + _TRIM_EVERY:
                self._drop(len(entries) - self._bounds.events)
        while self.bytes > self._bounds.bytes and len(entries) > 1:
            self._drop(max(1, len(entries) // 20))
        if budget.used > budget.limit:
            budget.make_room(self)
        for cursor in self.cursors:
            cursor.notify()

    def _drop(self, count: int) -> None:
        """Remove the oldest entries, one at least."""
        self.before = self.entries[count - 1].position
        size = 0
        for entry in self.entries[:count]:
            entry.drop_forms()
            size += len(entry.data)
        self.bytes -= size
        self._budget.used -= size + count * _ENTRY_BYTES
        del self.entries[:count]
        self.first += count

    def drop_all_but_last(self) -> None:
        """Remove all entries but the last: a reader at the end continues, all others get a Gap."""
        if len(self.entries) > 1:
            self._drop(len(self.entries) - 1)

    def evict(self, *, keep_last: bool) -> bool:
        """Remove the older half if there are cursors, else all entries but the last; on the next call the last one.

        As in BudgetedLog.
        """
        if len(self.entries) <= 1 and keep_last:
            return False
        if len(self.entries) <= 1:
            self._evicted()
        elif self.cursors:
            self._drop(len(self.entries) // 2)
        else:
            self.drop_all_but_last()
        return True

    def lose(self) -> None:
        """Declare that what follows does not continue the entries: every cursor gets a Gap, the memory is freed."""
        if not self.lost:
            self.lost = True
            if self.entries:
                self._drop(len(self.entries))
            self._budget.used -= _BUFFER_BYTES
            self._budget.remove(self)
        for cursor in self.cursors:
            cursor.notify()

    def add_cursor(self, cursor: Cursor) -> None:
        """Wake this cursor at each new entry."""
        self.cursors.add(cursor)
        if len(self.cursors) == 1:
            self._budget.follow(self)

    def remove_cursor(self, cursor: Cursor) -> None:
        """Stop waking this cursor."""
        self.cursors.discard(cursor)
        if not self.cursors:
            self._budget.unfollow(self)

    def index_after(self, position: str) -> int | None:
        """Return the index after `position`, where an entry is or will be; None if the position is not here."""
        for back, entry in enumerate(reversed(self.entries)):
            if entry.position == position:
                return self.end - back
        return self.first if position == self.before else None


class Cursor:
    """A reader of one log. `close` it in the task that opened it.

    Attributes:
        position: of the last entry that `next` returned; at first, the position after which it reads.
        _index: the index of the next entry in the buffer; None if it is unknown.
        _closed: called once when the cursor is closed.
        _waiting: what `next` waits for; None if no call waits.
        _woken: `wake` was called, and `next` has not returned since.
    """

    def __init__(self, buffer: Buffer, after: str, closed: Callable[[], None] | None = None) -> None:
        self.position = after
        self._buffer = buffer
        self._index = buffer.index_after(after)
        self._closed = closed
        self._waiting: asyncio.Future[None] | None = None
        self._woken = False
        buffer.add_cursor(self)

    async def next(self) -> list[Entry]:
        """Return everything new, waiting until there is something; an empty list after `wake` if there is nothing.

        Raises: Gap (I13); LogUnavailable if nothing could be read now, and another call may succeed.
        """
        while True:
            if self._buffer.lost:
                raise Gap(self.position)
            behind = self._is_behind()
            entries = await self._read_page() if behind else self._take_new()
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

    def _is_behind(self) -> bool:
        """Return True if what follows is not in the buffer, or not yet."""
        if self._index is None:
            self._index = self._buffer.index_after(self.position)
        return self._index is None or self._index < self._buffer.first

    def _take_new(self) -> list[Entry]:
        buffer = self._buffer
        if self._index is None or self._index >= buffer.end:
            return []
        entries = buffer.entries[self._index - buffer.first :]
        self._index = buffer.end
        return entries

    async def _read_page(self) -> list[Entry]:
        """Read what follows from the log itself; nothing if the position has come into the buffer meanwhile."""
        if self._buffer.pages is None:
            raise Gap(self.position)
        entries = await self._buffer.pages(self.position)
        self._index = self._buffer.index_after(entries[-1].position if entries else self.position)
        return entries

    def notify(self) -> None:
        """Let a waiting `next` look for new entries."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def wake(self) -> None:
        """Make `next` return, with an empty list if there is nothing new: its caller has something else to do."""
        self._woken = True
        self.notify()

    def close(self) -> None:
        """Stop reading. Closing twice does no harm."""
        self._buffer.remove_cursor(self)
        if self._closed:
            self._closed()
            self._closed = None
