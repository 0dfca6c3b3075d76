"""The EventLog in memory: the buffer that cursors read is the log itself.

For one process with the embedded store. A restart loses the logs, as Redis may; nothing but resume depends on
them, and old positions are met with a snapshot.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

from agent_chat.stores.budget import LogBudget
from agent_chat.stores.buffer import (
    RETAINED_SECONDS,
    Buffer,
    Cursor,
    Entry,
    are_whole,
    in_run,
    position_before,
    run_events,
)
from agent_chat.stores.errors import Gap, LogDeleted
from agent_chat.stores.events import (
    TERMINAL_TYPES,
    Event,
    LogOpened,
    MessageSnapshot,
    decode,
    encode,
    message_id_of,
)

_DELETED_SECONDS = 60.0
_TICK_SECONDS = 5.0


_DELETED_READ_SECONDS = 5.0
"""How long the entries before a thread's deletion stay for slow readers; the last one refuses appends for a minute."""


class _Log(Buffer):
    def __init__(self, thread_id: str, budget: LogBudget, evicted: Callable[[], None]) -> None:
        super().__init__(budget=budget, evicted=evicted)
        self.thread_id = thread_id
        self.deleted = False
        self.last_append = 0.0

    def end_at(self, position: str) -> int:
        """Where the entry behind `position` is or will be. Raises: Gap if the position is not here."""
        index = self.index_after(position)
        if index is None:
            raise Gap(position)
        return index

    def backwards(self, end: int) -> Iterator[Entry]:
        """The entries before `end`, newest first."""
        return reversed(self.entries[: end - self.first])


class MemoryLog:
    """Every thread's log of this process.

    Args:
        clock: seconds, monotonic; what "an hour after the last" is measured with.
        budget: what all logs may take together.
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
        return False

    @property
    def failures(self) -> int:
        return 0

    def writer(self, thread_id: str, snapshot: Callable[[], MessageSnapshot] | None = None) -> _Writer:
        return _Writer(self, thread_id, snapshot)

    async def tail(self, thread_id: str) -> str:
        return self._open(thread_id).entries[-1].position

    def cursor(self, thread_id: str, after: str) -> Cursor:
        return Cursor(self._open(thread_id), after)

    async def find(self, thread_id: str, message_id: str, run_id: str | None) -> str | None:
        return position_before(self._open(thread_id).entries, message_id, run_id)

    async def in_run(self, thread_id: str, position: str) -> bool:
        log = self._open(thread_id)
        return in_run(log.backwards(log.end_at(position)))

    async def run_events(self, thread_id: str, run_id: str, upto: str) -> list[Event]:
        log = self._open(thread_id)
        end = log.end_at(upto)
        events = run_events(log.backwards(end), run_id)
        if end < log.cut_end and not are_whole(events):
            raise Gap(upto)
        return events

    async def reset(self, thread_id: str) -> None:
        log = self._logs.get(thread_id)
        if log is not None and not log.deleted:
            del self._logs[thread_id]
            log.lose()

    async def signal(self, run_id: str) -> None:
        for callback in self._callbacks:
            callback(run_id)

    def on_signal(self, callback: Callable[[str], None]) -> None:
        self._callbacks.append(callback)

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for log in self._logs.values():
            log.lose()
        self._logs.clear()

    def append(self, thread_id: str, event: Event) -> str:
        """Append one event and wake the cursors; the new position. Raises: LogDeleted."""
        log = self._open(thread_id)
        if log.deleted:
            raise LogDeleted(thread_id)
        return self._push(log, event)

    def is_newest(self, thread_id: str, position: str) -> bool:
        """True if the log ends with that entry, and nothing gave way since."""
        log = self._logs.get(thread_id)
        return log is not None and log.entries[-1].position == position and log.end > log.cut_end

    def holds(self, thread_id: str, position: str) -> bool:
        """True if that entry is still in the log, and nothing gave way since."""
        log = self._logs.get(thread_id)
        end = log.index_after(position) if log is not None else None
        return log is not None and end is not None and end > log.cut_end

    def ended(self, thread_id: str, run_id: str | None, since: str) -> bool:
        """True if the terminal event of that run is behind that entry, evicted or not, and still in the log."""
        log = self._logs.get(thread_id)
        if run_id is None or log is None or log.entries[-1].position == since:
            return False
        index = log.index_after(since)
        later = log.entries if index is None else log.entries[index - log.first :]
        return any(entry.type in TERMINAL_TYPES and message_id_of(decode(entry.data)) == run_id for entry in later)

    def expire(self) -> None:
        """Drop the logs whose last entry is an hour old, and those of deleted threads after a minute."""
        now = self._clock()
        self._next_expiry = now + _DELETED_SECONDS
        self._shrink_deleted(now)
        for thread_id, log in list(self._logs.items()):
            if now - log.last_append >= (_DELETED_SECONDS if log.deleted else RETAINED_SECONDS):
                del self._logs[thread_id]
                log.lose()

    def _shrink_deleted(self, now: float) -> None:
        """Release what came before a deletion, once its readers had time to read it."""
        for thread_id, since in list(self._deleted.items()):
            if now - since < _DELETED_READ_SECONDS:
                return
            del self._deleted[thread_id]
            if (log := self._logs.get(thread_id)) is not None:
                log.shrink()

    def _tick(self) -> None:
        """Expire without being asked; the timer runs while there are logs."""
        self._timer = None
        try:
            self._shrink_deleted(self._clock())
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
        """As Redis makes stream ids: milliseconds and a sequence number, always greater than the last."""
        ms, sequence = self._last_position
        now = time.time_ns() // 1_000_000
        self._last_position = (now, 0) if now > ms else (ms, sequence + 1)
        return f"{self._last_position[0]}-{self._last_position[1]}"


class _Writer:
    def __init__(self, log: MemoryLog, thread_id: str, snapshot: Callable[[], MessageSnapshot] | None) -> None:
        self._log = log
        self._thread_id = thread_id
        self._snapshot = snapshot
        self._last: str | None = None

    def write(self, event: Event) -> None:
        log, thread_id, last = self._log, self._thread_id, self._last
        if last is not None and not log.is_newest(thread_id, last):
            if log.ended(thread_id, message_id_of(event), last):
                return
            if self._snapshot is not None and not log.holds(thread_id, last):
                self._last = log.append(thread_id, self._snapshot())
                if event.superseded_by_snapshot:
                    return
        self._last = log.append(thread_id, event)

    async def flush(self) -> None:
        """Nothing is ever pending here."""
