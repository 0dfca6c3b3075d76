"""The EventLog of one process, in segment files of the data folder, so that nothing a reader has received dies with it.

What is appended waits for the next iteration of the event loop, which writes all of it at once; only then is it pushed
to the buffers of those who follow. Everything that shows a position or an entry writes what is pending first. So no
reader is ever ahead of the disk, and a write is paid per iteration, not per event.

A thread's log is an index of its lines on disk. It has a buffer while it has cursors.

While nothing can be written (or without a folder: for tests), the buffers are the log: events are published, but a
restart loses them, and the memory budget bounds them. Readers then meet a Gap and get a snapshot.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from functools import partial
from pathlib import Path

from agent_chat.stores.budget import LogBudget
from agent_chat.stores.buffer import RETAINED_BYTES, RETAINED_EVENTS, RETAINED_SECONDS, Bounds, Buffer, Cursor, Entry
from agent_chat.stores.embedded.erasure import Erasure
from agent_chat.stores.embedded.files import Files
from agent_chat.stores.embedded.positions import at_milliseconds, milliseconds_of, parse, text_of
from agent_chat.stores.embedded.reads import newest_first, read_page
from agent_chat.stores.embedded.recovery import Recovered, recover
from agent_chat.stores.embedded.segments import DISK_BYTES, Segment
from agent_chat.stores.embedded.thread_log import ThreadLog
from agent_chat.stores.errors import Gap, LogDeleted
from agent_chat.stores.events import TERMINAL_TYPES, Event, LogOpened, MessageSnapshot, decode, encode, run_id_of

logger = logging.getLogger(__name__)

_BUFFERED_EVENTS = 512
_BUFFERED_BYTES = 2**18
"""How much of a followed log is in memory while it is on disk as well."""
_PENDING_BYTES = 2**18
_RETRY_SECONDS = 1.0
_TICK_SECONDS = 5.0
_SWEEP_SECONDS = 60.0
_DELETED_SECONDS = 60.0
"""How long a log in memory refuses appends after its thread's deletion; on disk the last entry is kept as any other."""


class EmbeddedLog:
    """Every thread's log of this process.

    Args:
        recovered: what is on disk; None for a log in memory.
        clock: seconds since the epoch, for positions and the age of entries.
        budget: bounds the memory of all buffers.

    Attributes:
        volatile: as in EventLog.
        failures: as in EventLog.
        _last: the position of the last entry of all.
        _written: the position of the last entry that is not pending.
        _pending: the entries that are to be written: log, position as number and text, data, its offset in the lines.
        _lines: what is to be written for them, in parts, with its size in _pending_bytes.
        _bounds: of all buffers.
        _retry_at: when writing is tried again while the log is volatile.
        _timer: the next tick; None while there are no logs.
    """

    def __init__(
        self,
        recovered: Recovered | None = None,
        *,
        clock: Callable[[], float] = time.time,
        budget: LogBudget | None = None,
    ) -> None:
        self.budget = budget or LogBudget()
        self.volatile = recovered is None
        self.failures = 0
        self._clock = clock
        self._segments = recovered.segments if recovered else None
        self._logs: dict[str, ThreadLog] = recovered.logs if recovered else {}
        self._last = self._written = recovered.last if recovered else 0
        self._pending: list[tuple[ThreadLog, int, str, bytes, int]] = []
        self._lines: list[bytes] = []
        self._pending_bytes = 0
        self._bounds = Bounds()
        self._retry_at = 0.0
        self._callbacks: list[Callable[[str], None]] = []
        self._erasure = Erasure(self._segments)
        for log in self._logs.values():
            if log.deleted:
                self._erasure.add(log, clock())
        self._timer: asyncio.TimerHandle | None = None
        self._next_sweep = 0.0
        self._set_bounds()
        self._set_timer()

    @property
    def unreachable(self) -> bool:
        """False: it is in this process."""
        return False

    @property
    def disk_bytes(self) -> int:
        """As in EventLog."""
        return self._segments.bytes if self._segments is not None else 0

    def writer(self, thread_id: str, snapshot: Callable[[], MessageSnapshot] | None = None) -> EmbeddedWriter:
        """As in EventLog."""
        return EmbeddedWriter(self, thread_id, snapshot)

    async def tail(self, thread_id: str) -> str:
        """As in EventLog."""
        log = self._open(thread_id)
        self.flush()
        return text_of(log.last)

    def cursor(self, thread_id: str, after: str) -> Cursor:
        """As in EventLog."""
        log = self._open(thread_id)
        self.flush()
        buffer = log.buffer or self._add_buffer(log, text_of(log.last))
        return Cursor(buffer, after, lambda: self._release(log))

    async def backwards(self, thread_id: str, position: str | None = None) -> AsyncGenerator[Entry]:
        """As in EventLog."""
        log = self._open(thread_id)
        self.flush()
        begin = log.last if position is None else parse(position)
        if begin is None:
            raise Gap(position or "")
        for entry in newest_first(self._segments, log, begin):
            yield entry
        if begin < log.evicted_at:
            raise Gap(text_of(begin))

    async def reset(self, thread_id: str) -> None:
        """As in EventLog."""
        log = self._logs.get(thread_id)
        if log is None or log.deleted:
            return
        self.flush()
        log.restart()
        self._lose_buffer(log)
        self._append(log, LogOpened())
        log.evicted_at = log.last

    async def signal(self, run_id: str) -> None:
        """As in EventLog."""
        for callback in self._callbacks:
            callback(run_id)

    def on_signal(self, callback: Callable[[str], None]) -> None:
        """As in EventLog."""
        self._callbacks.append(callback)

    async def close(self) -> None:
        """As in EventLog."""
        self.flush()
        if self._timer is not None:
            self._timer.cancel()
        for log in self._logs.values():
            self._lose_buffer(log)
        self._logs.clear()
        if self._segments is not None:
            self._segments.close()
            self._segments = None

    def append(self, thread_id: str, event: Event) -> int:
        """Append one event; return its position. It is written and published in the next iteration of the loop.

        Raises: LogDeleted.
        """
        log = self._logs.get(thread_id) or self._open(thread_id)
        if log.deleted:
            raise LogDeleted(thread_id)  # I17
        return self._append(log, event)

    def is_last(self, thread_id: str, position: int) -> bool:
        """Return True if the log ends with that entry, and nothing was evicted since."""
        log = self._logs.get(thread_id)
        return log is not None and log.last == position and position > log.evicted_at

    def contains(self, thread_id: str, position: int) -> bool:
        """Return True if that entry is still in the log, and nothing was evicted since."""
        self.flush()
        log = self._logs.get(thread_id)
        if log is None or position <= log.evicted_at:
            return False
        if log.is_indexed:
            return log.positions[log.first] <= position
        return log.buffer is not None and log.buffer.index_after(text_of(position)) is not None

    def has_ended(self, thread_id: str, run_id: str | None, since: int) -> bool:
        """Return True if the run's terminal event follows that entry, evicted or not, and is still in the log."""
        self.flush()
        log = self._logs.get(thread_id)
        if run_id is None or log is None or log.last == since:
            return False
        for entry in newest_first(self._segments, log, log.last):
            if (parse(entry.position) or 0) <= since:
                return False
            if entry.type in TERMINAL_TYPES and run_id_of(decode(entry.data)) == run_id:
                return True
        return False

    def flush(self) -> None:
        """Write what is pending, and publish it."""
        if not self._pending:
            return
        pending, lines = self._pending, b"".join(self._lines)
        self._pending, self._lines, self._pending_bytes = [], [], 0
        written = self._write(lines, pending[-1][1])
        for log, position, text, data, offset in pending:
            if written is not None:
                segment, begin = written
                segment.add(log, position, begin + offset, len(data))
            elif log.buffer is None:
                self._add_buffer(log, None)
            if log.buffer is not None:
                log.buffer.push(Entry(text, data))

    def _write(self, lines: bytes, last: int) -> tuple[Segment, int] | None:
        """Write the lines; return where they are, or None if they are published all the same, in memory only."""
        before, self._written = self._written, last
        if self._segments is None or (self.volatile and self._clock() < self._retry_at):
            return None
        try:
            written = self._segments.append(lines, before, last, self._now())
        except OSError as error:
            self.failures += 1
            self._retry_at = self._clock() + _RETRY_SECONDS
            if not self.volatile:
                logger.warning("events cannot be written to disk and would not survive a crash: %s", error)
                self._set_volatile(True)
            return None
        if self.volatile:
            logger.info("events are written to disk again")
            self._set_volatile(False)
        return written

    def _set_volatile(self, volatile: bool) -> None:
        """Begin or end the time in which the buffers are the log: in both cases what follows has no beginning there."""
        self.volatile = volatile
        self._set_bounds()
        for log in self._logs.values():
            log.evicted_at = log.last
            if not volatile:
                self._release(log)

    def _set_bounds(self) -> None:
        self._bounds.events = RETAINED_EVENTS if self.volatile else _BUFFERED_EVENTS
        self._bounds.bytes = RETAINED_BYTES if self.volatile else _BUFFERED_BYTES

    def _append(self, log: ThreadLog, event: Event) -> int:
        """Append an event, at a position of the form of Redis' stream ids, never used before (I12)."""
        now, last = at_milliseconds(int(self._clock() * 1000)), self._last
        self._last = log.last = position = now if now > last else last + 1
        data, text = encode(event), text_of(position)
        start = f"{text} {log.thread_id} ".encode()
        if not self._pending:
            asyncio.get_running_loop().call_soon(self.flush)
        self._pending.append((log, position, text, data, self._pending_bytes + len(start)))
        self._lines += (start, data, b"\n")
        self._pending_bytes += len(start) + len(data) + 1
        if event.closes_log:
            log.deleted = True
            self._erasure.add(log, self._clock())
        if self._pending_bytes > _PENDING_BYTES:
            self.flush()
        return position

    def _now(self) -> int:
        return int(self._clock() * 1000)

    def _open(self, thread_id: str) -> ThreadLog:
        log = self._logs.get(thread_id)
        if log is None:
            log = self._logs[thread_id] = ThreadLog(thread_id)
            self._set_timer()
            self._append(log, LogOpened())
        return log

    def _add_buffer(self, log: ThreadLog, before: str | None) -> Buffer:
        buffer = _LogBuffer(self, log, before)
        buffer.pages = partial(self._read_page, log, buffer)
        log.buffer = buffer
        return buffer

    async def _read_page(self, log: ThreadLog, buffer: Buffer, position: str) -> list[Entry]:
        self.flush()
        return read_page(self._segments, log, buffer, position)

    def _lose_buffer(self, log: ThreadLog) -> None:
        buffer, log.buffer = log.buffer, None
        if buffer is not None:
            buffer.lose()

    def _release(self, log: ThreadLog) -> None:
        """Release the buffer, unless it has cursors or is the log."""
        if log.buffer is not None and not log.buffer.cursors and not self.volatile:
            self._lose_buffer(log)

    def _evict(self, log: ThreadLog) -> None:
        """Release the buffer, and the log with it if it is nowhere else."""
        self._lose_buffer(log)
        if not log.positions:
            self._logs.pop(log.thread_id, None)

    def _tick(self) -> None:
        """Release what has expired, though no log is appended to or read."""
        self._timer = None
        erased_all = True
        try:
            self.flush()
            now = self._clock()
            erased_all = self._erasure.advance(now)
            if self._segments is not None:
                self._segments.age(self._now())
            if now >= self._next_sweep:
                self._next_sweep = now + _SWEEP_SECONDS
                self._sweep(now)
        finally:
            self._set_timer(_TICK_SECONDS if erased_all else _TICK_SECONDS / 100)

    def _set_timer(self, seconds: float | None = None) -> None:
        if self._timer is None and self._logs:
            self._timer = asyncio.get_running_loop().call_later(seconds or _TICK_SECONDS, self._tick)

    def _sweep(self, now: float) -> None:
        """Release the logs that have no entries any more, and those in memory that are too old."""
        for log in list(self._logs.values()):
            if log.positions:
                continue
            age = now - milliseconds_of(log.last) / 1000
            if age >= (_DELETED_SECONDS if log.deleted else RETAINED_SECONDS) if self.volatile else not log.buffer:
                self._evict(log)


class _LogBuffer(Buffer):
    """The buffer of one log. While that log is in memory only, an eviction is one of the log."""

    def __init__(self, owner: EmbeddedLog, log: ThreadLog, before: str | None) -> None:
        super().__init__(budget=owner.budget, evicted=lambda: owner._evict(log), bounds=owner._bounds, before=before)
        self._owner = owner
        self._log = log

    def evict(self, *, keep_last: bool) -> bool:
        """As in BudgetedLog."""
        if self._owner.volatile:
            self._log.evicted_at = self._log.last
        return super().evict(keep_last=keep_last)


class EmbeddedWriter:
    """A LogWriter of one thread. `_last`: the position of its last entry."""

    def __init__(self, log: EmbeddedLog, thread_id: str, snapshot: Callable[[], MessageSnapshot] | None) -> None:
        self._log = log
        self._thread_id = thread_id
        self._snapshot = snapshot
        self._last: int | None = None

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
        """As in LogWriter."""
        self._log.flush()


async def open_embedded_log(
    folder: Path,
    *,
    disk_bytes: int = DISK_BYTES,
    budget: LogBudget | None = None,
    clock: Callable[[], float] = time.time,
    files: Files | None = None,
) -> EmbeddedLog:
    """Open the log in a folder, of which this process has the lock.

    Args:
        disk_bytes: how much all files may take together.
        budget: how much memory all buffers may take.
        clock: seconds since the epoch.
        files: the system calls.

    Raises: DataFolderUnusable.
    """
    recovered = await asyncio.to_thread(recover, folder, files or Files(), disk_bytes, int(clock() * 1000))
    return EmbeddedLog(recovered, budget=budget, clock=clock)
