"""One memory budget for all logs of a process, whatever number of threads they belong to (I18).

The logs in memory are a cache for readers that resume: what is evicted is a Gap to its reader and then a snapshot,
never a loss. So the log that was followed least recently is evicted first, and one that is followed only if no other is
left. A bound per thread alone was refused: a client can open any number of threads.
"""

from __future__ import annotations

from typing import Protocol

LOG_BYTES = 256 * 2**20


class BudgetedLog(Protocol):
    """The entries of one log that are in memory."""

    def evict(self, *, keep_last: bool) -> bool:
        """Release a part of the entries. The last one is released with the log itself, unless `keep_last`.

        Returns False if nothing was released.
        """
        ...


class LogBudget:
    """Counts what the logs take, and evicts entries where that exceeds the limit.

    Attributes:
        limit: in bytes.
        used: bytes, including the overhead of Python's objects and the cached encoded forms.
        evictions: how often entries of a log were evicted.
        _idle: the logs without readers, least recently followed or evicted first.
        _followed: the logs with readers, in the same order.
    """

    def __init__(self, limit: int = LOG_BYTES) -> None:
        self.limit = limit
        self.used = 0
        self.evictions = 0
        self._idle: dict[BudgetedLog, None] = {}
        self._followed: dict[BudgetedLog, None] = {}

    def add(self, log: BudgetedLog) -> None:
        """Count a new log, which has no readers."""
        self._idle[log] = None

    def remove(self, log: BudgetedLog) -> None:
        """Count the log no more."""
        self._idle.pop(log, None)
        self._followed.pop(log, None)

    def follow(self, log: BudgetedLog) -> None:
        """Register that the log has a reader now."""
        if log in self._idle:
            del self._idle[log]
            self._followed[log] = None

    def unfollow(self, log: BudgetedLog) -> None:
        """Register that the log has no reader any more."""
        if log in self._followed:
            del self._followed[log]
            self._idle[log] = None

    def make_room(self, growing: BudgetedLog) -> None:
        """Evict entries until the limit is kept; those of `growing` last, and never its newest entry."""
        while self.used > self.limit:
            log = self._next(growing)
            if log is None:
                return
            self.evictions += 1
            order = self._idle if log in self._idle else self._followed
            del order[log]
            order[log] = None
            if not log.evict(keep_last=log is growing):
                return

    def _next(self, growing: BudgetedLog) -> BudgetedLog | None:
        for order in (self._idle, self._followed):
            for log in order:
                if log is not growing:
                    return log
        return growing if growing in self._idle or growing in self._followed else None
