"""The queue in front of the database's threads: round robin over organizations, in order within one.

Where several threads serve the queue, one organization never occupies all of them, so that another's short read does
not wait for long ones. A plain queue was refused: three readers of large pages delayed every other read by their own
time.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """A queue of items by key, served by threads.

    Args:
        threads: how many threads call `get`; of several, one key never occupies all.
    """

    def __init__(self, threads: int) -> None:
        self._changed = threading.Condition()
        self._queues: dict[str, deque[T]] = {}
        """By key, the one whose turn is next first."""
        self._running: Counter[str] = Counter()
        self._most = threads - 1 if threads > 1 else sys.maxsize
        self._ends = 0

    def put(self, key: str, item: T) -> None:
        """Append an item behind those of the same key."""
        with self._changed:
            self._queues.setdefault(key, deque()).append(item)
            self._changed.notify()

    def end(self) -> None:
        """Let one call of `get` return None once the queue is empty."""
        with self._changed:
            self._ends += 1
            self._changed.notify_all()

    def get(self) -> tuple[str, T] | None:
        """Wait for the next item. The thread calls `done` with its key afterwards; None ends the thread."""
        with self._changed:
            while (found := self._take()) is None:
                if self._ends and not self._queues:
                    self._ends -= 1
                    return None
                self._changed.wait()
            return found

    def get_more(self) -> tuple[str, T] | None:
        """Return the next item, if there is one."""
        with self._changed:
            return self._take()

    def done(self, key: str) -> None:
        """Report that an item of this key has been served."""
        with self._changed:
            self._running[key] -= 1
            if not self._running[key]:
                del self._running[key]
            self._changed.notify_all()

    def drain(self) -> tuple[list[T], bool]:
        """Take all items, and tell whether the calling thread shall end."""
        with self._changed:
            items = [item for queue in self._queues.values() for item in queue]
            self._queues.clear()
            ends = self._ends > 0
            self._ends -= ends
            self._changed.notify_all()
            return items, ends

    def _take(self) -> tuple[str, T] | None:
        for key in self._queues:
            if self._running[key] < self._most:
                queue = self._queues.pop(key)
                item = queue.popleft()
                if queue:
                    self._queues[key] = queue  # behind the others
                self._running[key] += 1
                return key, item
        return None
