"""One budget of memory for all logs of a process, whatever number of threads they belong to.

The logs are a cache for readers who resume: what gives way is a Gap to its reader and then a snapshot, never a loss.
So the least recently followed log gives way first, and one that is followed only when no other is left. A bound per
thread alone was refused: a client opens any number of threads.
"""

from __future__ import annotations

from typing import Protocol

LOG_BYTES = 256 * 2**20


class BudgetedLog(Protocol):
    """Entries of one log that are in memory."""

    def evict(self, *, keep_last: bool) -> bool:
        """Release a part of the entries, of a single one that and the log, unless `keep_last`; True if it did."""
        ...


class LogBudget:
    """Counts what the logs hold, and has some of them give way where that exceeds the limit.

    `used`: bytes with the overhead of Python's objects and of cached wire forms. `evictions`: how often a log gave way.
    """

    def __init__(self, limit: int = LOG_BYTES) -> None:
        self.limit = limit
        self.used = 0
        self.evictions = 0
        self._idle: dict[BudgetedLog, None] = {}
        self._followed: dict[BudgetedLog, None] = {}

    def enter(self, log: BudgetedLog) -> None:
        """Account for a log without readers."""
        self._idle[log] = None

    def leave(self, log: BudgetedLog) -> None:
        """Remove a log from the budget."""
        self._idle.pop(log, None)
        self._followed.pop(log, None)

    def follow(self, log: BudgetedLog) -> None:
        """Its first reader has come."""
        if log in self._idle:
            del self._idle[log]
            self._followed[log] = None

    def unfollow(self, log: BudgetedLog) -> None:
        """Its last reader has gone."""
        if log in self._followed:
            del self._followed[log]
            self._idle[log] = None

    def make_room(self, growing: BudgetedLog) -> None:
        """Have logs give way until the limit is kept; `growing` is the last to, and keeps its newest entry."""
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
