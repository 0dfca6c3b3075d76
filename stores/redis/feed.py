"""Following logs that lie in Redis: one feed per followed thread and process, whatever the number of viewers.

Pub/sub is the fan-out and may lose, double and reorder; the stream is the history. So contiguity is proven, not
hoped for: each message names the entry before it, a feed takes only what follows its last entry, and everything else
makes it read the stream from that entry, inclusive. A stream that no longer begins there is a gap: a new buffer, and
every cursor of the old one starts over with a snapshot.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial

from agent_chat.stores.budget import LogBudget
from agent_chat.stores.buffer import Buffer, Cursor, Entry
from agent_chat.stores.errors import Gap, LogUnavailable
from agent_chat.stores.redis.writer import Backoff

logger = logging.getLogger(__name__)

PAGE = 500
_PAGE_SECONDS = 2.0
_STASHED = 10_000
_STASHED_BYTES = 2**20

Read = Callable[[str, str], Awaitable[list[Entry]]]
"""Up to PAGE entries of a thread from a position, inclusive. Raises: LogUnavailable."""

Open = Callable[[str], Awaitable[str]]
"""The position of a thread's last entry. Raises: LogUnavailable."""


class Feed:
    """What this process knows of one thread's log. `start`: where its first reader is."""

    def __init__(self, thread_id: str, start: str, read: Read, open: Open, budget: LogBudget | None = None) -> None:
        self._budget = budget or LogBudget()
        self.thread_id = thread_id
        self.readers = 0
        self.idle_since = 0.0
        self.filled_at = time.monotonic()
        self.buffer = self._new_buffer()
        self._start: str | None = start
        self._tail: str | None = None
        self._read = read
        self._open = open
        self._stash: list[tuple[str, str, bytes]] = []
        self._stash_bytes = 0
        self._filling: asyncio.Task[None] | None = None
        self._again = False

    def _new_buffer(self) -> Buffer:
        buffer = Buffer(budget=self._budget, evicted=self.lose)
        buffer.pages = partial(self._page, buffer)
        return buffer

    def cursor(self, after: str) -> Cursor:
        self.readers += 1
        return Cursor(self.buffer, after, self._leave)

    def _leave(self) -> None:
        self.readers -= 1
        self.idle_since = time.monotonic()

    def offer(self, position: str, previous: str, data: bytes) -> None:
        """Take an entry that pub/sub brought."""
        if self._filling is not None or self._tail is None:
            if len(self._stash) < _STASHED and self._stash_bytes < _STASHED_BYTES:
                self._stash.append((position, previous, data))
                self._stash_bytes += len(data)
            else:
                self._again = True
        elif not self._fits(position, previous, data):
            self.refill()

    def _fits(self, position: str, previous: str, data: bytes) -> bool:
        """Push the entry if it follows; true if it did, or is known."""
        if previous != self._tail:
            return self.buffer.index_after(position) is not None
        self._push(Entry(position, data))
        return True

    def _push(self, entry: Entry) -> None:
        self.buffer.push(entry)
        self._tail = entry.position

    def refill(self) -> asyncio.Task[None]:
        """Read what the stream has; the reading that will have seen all that is there now."""
        self._again = True
        if self._filling is None:
            self._filling = asyncio.create_task(self._fill(), name=f"fill {self.thread_id}")
        return self._filling

    async def _fill(self) -> None:
        backoff = Backoff()
        try:
            while self._again:
                self._again = False
                try:
                    await self._catch_up()
                    self._take_stash()
                except Exception as error:
                    if not isinstance(error, LogUnavailable):
                        logger.exception("the feed of thread %s could not be filled", self.thread_id)
                    self._again = True
                    await backoff.wait()
            self.filled_at = time.monotonic()
        finally:
            self._filling = None

    def _take_stash(self) -> None:
        stash, self._stash, self._stash_bytes = self._stash, [], 0
        for message in stash:
            self._again = not self._fits(*message) or self._again

    async def _catch_up(self) -> None:
        while True:
            begin = self._tail or self._start or await self._open(self.thread_id)
            rows = await self._read(self.thread_id, begin)
            if rows and rows[0].position == begin:
                for entry in rows[1:] if self._tail else rows:
                    self._push(entry)
                if len(rows) < PAGE:
                    return
            else:
                if self._tail:
                    self.lose()
                self._start = None

    def lose(self) -> None:
        """Begin anew: what follows can't be proven to follow."""
        lost, self.buffer = self.buffer, self._new_buffer()
        self._tail = self._start = None
        lost.lose()

    async def _page(self, buffer: Buffer, position: str) -> list[Entry]:
        """`Buffer.pages`: from the stream, as far as the buffer's beginning."""
        try:
            async with asyncio.timeout(_PAGE_SECONDS):
                while not buffer.lost and buffer.index_after(position) is None:
                    rows = await self._read(self.thread_id, position)
                    if not rows or rows[0].position != position:
                        raise Gap(position)
                    if len(rows) > 1:
                        return _upto(rows[1:], buffer)
                    await asyncio.wait({self.refill()})
                return []
        except TimeoutError as error:
            raise LogUnavailable(f"no page within {_PAGE_SECONDS:g} seconds") from error

    async def close(self) -> None:
        if self._filling is not None:
            self._filling.cancel()
            await asyncio.wait({self._filling})
        self.buffer.lose()


def _upto(rows: list[Entry], buffer: Buffer) -> list[Entry]:
    """The rows up to the buffer's first entry: what follows that one is shared."""
    if buffer.entries:
        first = buffer.entries[0].position
        for n, row in enumerate(rows, 1):
            if row.position == first:
                return rows[:n]
    return rows
