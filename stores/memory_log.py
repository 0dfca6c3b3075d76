"""The EventLog in memory: the buffer that cursors read is the log itself.

For one process with the embedded store. A restart loses the logs, as Redis may; only resuming depends on them, and
readers with old positions get a snapshot.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable

from agent_chat.stores.budget import LogBudget
from agent_chat.stores.buffer import RETAINED_SECONDS, Buffer, Cursor, Entry
from agent_chat.stores.errors import Gap, LogDeleted
from agent_chat.stores.events import (
    TERMINAL_TYPES,
    Event,
    LogOpened,
    MessageSnapshot,
    decode,
    encode,
    run_id_of,
)

_DELETED_SECONDS = 60.0
"""How long the log of a deleted thread stays, to refuse appends."""
_DELETED_READ_SECONDS = 5.0
"""How long the entries before a thread's deletion stay, for slow readers."""
_TICK_SECONDS = 5.0


class _Log(Buffer):
    """One thread's log. `deleted`: it has had its last entry. `last_append`: by the clock of the MemoryLog."""

    def __init__(self, thread_id: str, budget: LogBudget, evicted: Callable[[], None]) -> None:
        super().__init__(budget=budget, evicted=evicted)
        self.thread_id = thread_id
        self.deleted = False
        self.last_append = 0.0


class MemoryLog:
    """Every thread's log of this process.

    Args:
        clock: monotonic seconds, for the age of logs.
        budget: bounds the memory of all logs.

    Attributes:
        _deleted: when the threads were deleted whose earlier entries are still in memory, oldest first.
        _last_position: milliseconds and sequence number.
        _timer: the next tick; None while there are no logs.
        _next_expiry: when old logs are looked for again.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, budget: LogBudget | None = None) -> None:
        self.budget = budget or LogBudget()
        self._clock = clock
        self._deleted: dict[str, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._logs: dict[str, _Log] = {}
        self._callbacks: list[Callable[[str], None]] = []
        self._last_position = (0, 0)
        self._next_expiry = 0.0

    @property
    def unreachable(self) -> bool:
        """False: it is in this process."""
        return False

    @property
    def failures(self) -> int:
        """None happen."""
        return 0

    def writer(self, thread_id: str, snapshot: Callable[[], MessageSnapshot] | None = None) -> _Writer:
        """As in EventLog."""
        return _Writer(self, thread_id, snapshot)

    async def tail(self, thread_id: str) -> str:
        """As in EventLog."""
        return self._open(thread_id).entries[-1].position

    def cursor(self, thread_id: str, after: str) -> Cursor:
        """As in EventLog."""
        return Cursor(self._open(thread_id), after)

    async def backwards(self, thread_id: str, position: str | None = None) -> AsyncGenerator[Entry]:
        """As in EventLog."""
        log = self._open(thread_id)
        end = log.end if position is None else log.index_after(position)
        if end is None:
            raise Gap(position or "")
        for entry in reversed(log.entries[: end - log.first]):
            yield entry
        if position is not None and end < log.evicted_end:
            raise Gap(position)

    async def reset(self, thread_id: str) -> None:
        """As in EventLog."""
        log = self._logs.get(thread_id)
        if log is not None and not log.deleted:
            del self._logs[thread_id]
            log.lose()

    async def signal(self, run_id: str) -> None:
        """As in EventLog."""
        for callback in self._callbacks:
            callback(run_id)

    def on_signal(self, callback: Callable[[str], None]) -> None:
        """As in EventLog."""
        self._callbacks.append(callback)

    async def close(self) -> None:
        """As in EventLog."""
        if self._timer is not None:
            self._timer.cancel()
        for log in self._logs.values():
            log.lose()
        self._logs.clear()

    def append(self, thread_id: str, event: Event) -> str:
        """Append one event, wake the cursors, and return the event's position. Raises: LogDeleted."""
        log = self._open(thread_id)
        if log.deleted:
            raise LogDeleted(thread_id)  # I17
        return self._push(log, event)

    def is_last(self, thread_id: str, position: str) -> bool:
        """Return True if the log ends with that entry, and nothing was evicted since."""
        log = self._logs.get(thread_id)
        return log is not None and log.entries[-1].position == position and log.end > log.evicted_end

    def contains(self, thread_id: str, position: str) -> bool:
        """Return True if that entry is still in the log, and nothing was evicted since."""
        log = self._logs.get(thread_id)
        end = log.index_after(position) if log is not None else None
        return log is not None and end is not None and end > log.evicted_end

    def has_ended(self, thread_id: str, run_id: str | None, since: str) -> bool:
        """Return True if the run's terminal event follows that entry, evicted or not, and is still in the log."""
        log = self._logs.get(thread_id)
        if run_id is None or log is None or log.entries[-1].position == since:
            return False
        index = log.index_after(since)
        later = log.entries if index is None else log.entries[index - log.first :]
        return any(entry.type in TERMINAL_TYPES and run_id_of(decode(entry.data)) == run_id for entry in later)

    def expire(self) -> None:
        """Remove the logs whose last entry is an hour old, and those of deleted threads after a minute."""
        now = self._clock()
        self._next_expiry = now + _DELETED_SECONDS
        self._drop_deleted(now)
        for thread_id, log in list(self._logs.items()):
            if now - log.last_append >= (_DELETED_SECONDS if log.deleted else RETAINED_SECONDS):
                del self._logs[thread_id]
                log.lose()

    def _drop_deleted(self, now: float) -> None:
        """Release the entries before a deletion, once their readers had time to read them."""
        for thread_id, since in list(self._deleted.items()):
            if now - since < _DELETED_READ_SECONDS:
                return
            del self._deleted[thread_id]
            if (log := self._logs.get(thread_id)) is not None:
                log.drop_all_but_last()

    def _tick(self) -> None:
        """Release what has expired though no log is opened or read."""
        self._timer = None
        try:
            self._drop_deleted(self._clock())
            if self._clock() >= self._next_expiry:
                self.expire()
        finally:
            self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is None and self._logs:
            self._timer = asyncio.get_running_loop().call_later(_TICK_SECONDS, self._tick)

    def _open(self, thread_id: str) -> _Log:
        log = self._logs.get(thread_id)
        if log is None:
            if self._clock() >= self._next_expiry:
                self.expire()
            log = self._logs[thread_id] = _Log(thread_id, self.budget, lambda: self._evict(thread_id))
            self._set_timer()
            self._push(log, LogOpened())
        return log

    def _evict(self, thread_id: str) -> None:
        if (log := self._logs.pop(thread_id, None)) is not None:
            log.lose()

    def _push(self, log: _Log, event: Event) -> str:
        position = self._next_position()
        log.last_append = self._clock()
        log.push(Entry(position, encode(event)))
        if event.closes_log:
            log.deleted = True
            self._deleted[log.thread_id] = log.last_append
        return position

    def _next_position(self) -> str:
        """Return a position of the form of Redis' stream ids, never used before (I12)."""
        milliseconds, sequence = self._last_position
        now = time.time_ns() // 1_000_000
        self._last_position = (now, 0) if now > milliseconds else (milliseconds, sequence + 1)
        return f"{self._last_position[0]}-{self._last_position[1]}"


class _Writer:
    """A LogWriter of one thread. `_last`: the position of its last entry."""

    def __init__(self, log: MemoryLog, thread_id: str, snapshot: Callable[[], MessageSnapshot] | None) -> None:
        self._log = log
        self._thread_id = thread_id
        self._snapshot = snapshot
        self._last: str | None = None

    def write(self, event: Event) -> None:
        """As in LogWriter."""
        log, thread_id, last = self._log, self._thread_id, self._last
        if last is not None and not log.is_last(thread_id, last):
            if log.has_ended(thread_id, run_id_of(event), last):
                return  # I16
            if self._snapshot is not None and not log.contains(thread_id, last):
                self._last = log.append(thread_id, self._snapshot())  # I15
                if event.superseded_by_snapshot:
                    return
        self._last = log.append(thread_id, event)

    async def flush(self) -> None:
        """As in LogWriter: nothing is ever pending."""
