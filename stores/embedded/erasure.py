"""Erases the events of deleted threads: on disk they are overwritten with spaces, by the thread's index."""

from __future__ import annotations

import logging
from collections import deque

from agent_chat.stores.embedded.segments import Segments
from agent_chat.stores.embedded.thread_log import ThreadLog

logger = logging.getLogger(__name__)

_READ_SECONDS = 5.0
"""How long the entries before a thread's deletion stay, for slow readers."""
_EVENTS = 2000
"""How many entries are overwritten at a time, in about 5 ms."""


class Erasure:
    """The deleted threads whose earlier entries still exist, and when each was deleted, oldest first.

    Args:
        segments: None for a log in memory.
    """

    def __init__(self, segments: Segments | None) -> None:
        self._segments = segments
        self._logs: deque[tuple[float, ThreadLog]] = deque()

    def add(self, log: ThreadLog, now: float) -> None:
        """Erase that log, except its last entry, once its readers had time to read it."""
        self._logs.append((now, log))

    def advance(self, now: float) -> bool:
        """Erase what is due, a part at a time; return False if a part is left."""
        left = _EVENTS
        while self._logs and now - self._logs[0][0] >= _READ_SECONDS:
            log = self._logs[0][1]
            count = min(left, max(0, len(log.positions) - 1))
            self._erase(log, count)
            left -= count
            if len(log.positions) > 1:
                return False
            if log.buffer is not None:
                log.buffer.drop_all_but_last()
            self._logs.popleft()
        return True

    def _erase(self, log: ThreadLog, count: int) -> None:
        """Overwrite the log's oldest entries."""
        if self._segments is not None:
            try:
                for place, size in zip(log.places[:count], log.sizes[:count], strict=True):
                    self._segments.erase(place, size)
            except OSError as error:
                logger.warning("events of a deleted thread could not be erased: %s", error)
        log.remove(count)
