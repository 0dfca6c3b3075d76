"""One thread's log: where its entries are on disk, and the buffer of those who follow it."""

from __future__ import annotations

from array import array
from bisect import bisect_left

from agent_chat.stores.buffer import RETAINED_BYTES, RETAINED_EVENTS, Buffer


class ThreadLog:
    """One thread's log. Both the index and the buffer, where there is one, reach to the log's last entry.

    The index has 20 bytes for each entry whose segment still exists, also for those that are not retained any more:
    a deletion of the thread overwrites them all.

    Attributes:
        last: the position of the last entry, flushed or not; `deleted`: it is thread.deleted.
        evicted_at: `last` when retained entries were last evicted; 0 if never. A run whose entries were evicted has to
            publish its whole message: they may be newer than its last checkpoint, which late readers begin with.
        positions: of the entries on disk, ascending, with the place of each one's data in `places` and its size.
        first: the index of the first retained entry.
        bytes: of the retained entries' data.
        newest_segment: the number of the segment of the last entry on disk.
        buffer: what cursors read; None while there are none and the entries are on disk.
    """

    __slots__ = (
        "buffer",
        "bytes",
        "deleted",
        "evicted_at",
        "first",
        "last",
        "newest_segment",
        "places",
        "positions",
        "sizes",
        "thread_id",
    )

    def __init__(self, thread_id: str) -> None:
        self.thread_id = thread_id
        self.last = 0
        self.deleted = False
        self.evicted_at = 0
        self.positions = array("Q")
        self.places = array("Q")
        self.sizes = array("I")
        self.first = 0
        self.bytes = 0
        self.newest_segment = 0
        self.buffer: Buffer | None = None

    @property
    def is_indexed(self) -> bool:
        """Whether retained entries are on disk; the last one is among them."""
        return self.first < len(self.positions)

    def add(self, position: int, place: int, size: int) -> None:
        """Index an entry, and retain none that exceed the bounds."""
        positions = self.positions
        positions.append(position)
        self.places.append(place)
        self.sizes.append(size)
        self.bytes += size
        while len(positions) - self.first > RETAINED_EVENTS or self.bytes > RETAINED_BYTES:
            if self.first == len(positions) - 1:
                return  # the newest entry is retained, whatever its size
            self.bytes -= self.sizes[self.first]
            self.first += 1

    def index(self, position: int) -> int | None:
        """Return the index of a retained entry; None if there is none at that position."""
        found = bisect_left(self.positions, position, self.first)
        return found if found < len(self.positions) and self.positions[found] == position else None

    def restart(self) -> None:
        """Retain none of the entries on disk."""
        self.first = len(self.positions)
        self.bytes = 0

    def cut(self, place: int) -> None:
        """Remove the entries before that place, whose segments are deleted."""
        count = bisect_left(self.places, place)
        if count > self.first:
            self.bytes -= sum(self.sizes[self.first : count])
            self.evicted_at = self.last
        self._remove(count)

    def remove(self, count: int) -> None:
        """Remove the oldest entries, which nobody reads any more."""
        if count > self.first:
            self.bytes -= sum(self.sizes[self.first : count])
        self._remove(count)

    def _remove(self, count: int) -> None:
        self.first = max(0, self.first - count)
        for column in (self.positions, self.places, self.sizes):
            del column[:count]
