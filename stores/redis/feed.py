"""Following the logs in Redis: one feed per followed thread and process, whatever the number of viewers.

Pub/sub is the fan-out, and it may lose, double and reorder messages; the stream is the history. So contiguity is proven
(I13): each message names the entry before it, a feed takes only what follows its last entry, and everything else makes
it read the stream from that entry on, inclusive. If the stream no longer contains that entry, there is a gap: the feed
begins a new buffer, and every cursor of the old one raises Gap.
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
from agent_chat.stores.redis.connection import Backoff

logger = logging.getLogger(__name__)

PAGE = 500
_STASH_MESSAGES = 10_000
_STASH_BYTES = 2**20

Read = Callable[[str, str], Awaitable[list[Entry]]]
"""Return up to PAGE entries of a thread from a position on, inclusive. Raises: LogUnavailable."""

Open = Callable[[str], Awaitable[str]]
"""Return the position of a thread's last entry. Raises: LogUnavailable."""


class Feed:
    """The newest entries of one thread's log, kept up to date in this process.

    Args:
        start: the position of its first reader.
        page_seconds: how long it waits for a page.

    Attributes:
        readers: the number of open cursors; `idle_since`: when the last one was closed.
        filled_at: when the stream was last read to its end.
        buffer: what the cursors read; replaced after a gap.
        _start: where the first reading begins; None once there is a tail, or it was not in the log.
        _tail: the position of the last entry; None before the first reading.
        _stash: messages that arrived during a reading, with their size in _stash_bytes.
        _filling: the task that reads the stream; None if there is none.
        _refill_again: the stream has to be read (again).
    """

    def __init__(
        self,
        thread_id: str,
        start: str,
        read: Read,
        open: Open,
        budget: LogBudget | None = None,
        page_seconds: float = 2.0,
    ) -> None:
        self.thread_id = thread_id
        self._page_seconds = page_seconds
        self.readers = 0
        self.idle_since = 0.0
        self.filled_at = time.monotonic()
        self._budget = budget or LogBudget()
        self.buffer = self._new_buffer()
        self._start: str | None = start
        self._tail: str | None = None
        self._read = read
        self._open = open
        self._stash: list[tuple[str, str, bytes]] = []
        self._stash_bytes = 0
        self._filling: asyncio.Task[None] | None = None
        self._refill_again = False

    def _new_buffer(self) -> Buffer:
        buffer = Buffer(budget=self._budget, evicted=self.lose)
        buffer.pages = partial(self._read_page, buffer)
        return buffer

    def cursor(self, after: str) -> Cursor:
        """Return a reader of what follows the position."""
        self.readers += 1
        return Cursor(self.buffer, after, self._on_close)

    def _on_close(self) -> None:
        self.readers -= 1
        self.idle_since = time.monotonic()

    def offer(self, position: str, previous: str, data: bytes) -> None:
        """Take an entry that pub/sub delivered; `previous` is the position of the one before it."""
        if self._filling is not None or self._tail is None:
            if len(self._stash) < _STASH_MESSAGES and self._stash_bytes < _STASH_BYTES:
                self._stash.append((position, previous, data))
                self._stash_bytes += len(data)
            else:
                self._refill_again = True
        elif not self._accept(position, previous, data):
            self.refill()

    def _accept(self, position: str, previous: str, data: bytes) -> bool:
        """Append the entry if it follows the tail. Returns True if it did, or is in the buffer already."""
        if previous != self._tail:
            return self.buffer.index_after(position) is not None
        self._push(Entry(position, data))
        return True

    def _push(self, entry: Entry) -> None:
        self.buffer.push(entry)
        self._tail = entry.position

    def refill(self) -> asyncio.Task[None]:
        """Read what the stream has. The returned task ends when everything that is in it now was read."""
        self._refill_again = True
        if self._filling is None:
            self._filling = asyncio.create_task(self._fill(), name=f"fill {self.thread_id}")
        return self._filling

    async def _fill(self) -> None:
        backoff = Backoff()
        try:
            while self._refill_again:
                self._refill_again = False
                try:
                    await self._read_to_end()
                    self._accept_stash()
                except Exception as error:
                    if not isinstance(error, LogUnavailable):
                        logger.exception("the feed of thread %s could not be filled", self.thread_id)
                    self._refill_again = True
                    await backoff.wait()
            self.filled_at = time.monotonic()
        finally:
            self._filling = None

    def _accept_stash(self) -> None:
        stash, self._stash, self._stash_bytes = self._stash, [], 0
        for message in stash:
            self._refill_again = not self._accept(*message) or self._refill_again

    async def _read_to_end(self) -> None:
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
        """Begin a new buffer: what follows cannot be proven to follow."""
        lost, self.buffer = self.buffer, self._new_buffer()
        self._tail = self._start = None
        lost.lose()

    async def _read_page(self, buffer: Buffer, position: str) -> list[Entry]:
        """Return what follows the position in the stream, up to the buffer's first entry: `Buffer.pages`."""
        try:
            async with asyncio.timeout(self._page_seconds):
                while not buffer.lost and buffer.index_after(position) is None:
                    rows = await self._read(self.thread_id, position)
                    if not rows or rows[0].position != position:
                        raise Gap(position)
                    if len(rows) > 1:
                        return _cut_at_buffer(rows[1:], buffer)
                    await asyncio.wait({self.refill()})
                return []
        except TimeoutError as error:
            raise LogUnavailable(f"no page within {self._page_seconds:g} seconds") from error

    async def close(self) -> None:
        """Stop reading; every cursor gets a Gap."""
        if self._filling is not None:
            self._filling.cancel()
            await asyncio.wait({self._filling})
        self.buffer.lose()


def _cut_at_buffer(rows: list[Entry], buffer: Buffer) -> list[Entry]:
    """Return the rows up to the buffer's first entry: what follows that one is shared with other cursors."""
    if buffer.entries:
        first = buffer.entries[0].position
        for number, row in enumerate(rows, 1):
            if row.position == first:
                return rows[:number]
    return rows
