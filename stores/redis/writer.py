"""A writer of one thread's log in Redis: the events that are pending, and the append that is in flight.

A writer never waits. Events that are written while its append is in flight, or while Redis is unreachable, are pending;
deltas among them are joined, and all go out as one append. A pipeline or a connection per writer was refused: an append
then costs several times as much, and a writer's events could overtake each other.

An append that failed may have been executed though its reply was lost. It is sent again as it was, and the script
checks for it first (I14).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

import msgspec

from agent_chat.stores.errors import LogDeleted, LogUnavailable
from agent_chat.stores.events import (
    Delta,
    Event,
    MessageEvent,
    MessageSnapshot,
    RunStarted,
    encode,
    join_deltas,
    run_id_of,
)

logger = logging.getLogger(__name__)

_APPEND_EVENTS = 500
_APPEND_BYTES = 2**20
_COMPACT_EVENTS = 256
_PENDING_EVENTS = 2000
_PENDING_BYTES = 2**20
_EVENT_BYTES = 500


class Append:
    """One append, sent again as it was until Redis replies.

    Attributes:
        batch: its id, never used by another append.
        after: the position of the writer's last entry; "" if it has none.
        events: as they were written.
        data: the events, encoded.
        retry: it was sent before.
    """

    def __init__(self, batch: str, after: str, events: list[Event], data: list[bytes]) -> None:
        self.batch = batch
        self.after = after
        self.events = events
        self.data = data
        self.size = sum(map(len, data))
        self.retry = False

    def arguments(self, seed: str) -> list[str | bytes]:
        """Return the ARGV of `append.lua`; `seed` is a random number."""
        run_id = run_id_of(self.events[0]) or ""
        lasts: list[str] = []
        for number, event in enumerate(self.events, 1):
            if event.terminal:
                lasts += (str(number), run_id_of(event) or "")
            elif event.closes_log:
                lasts += (str(number), "log")
        retry = "1" if self.retry else ""
        return [self.batch, retry, self.after, seed, run_id, str(len(self.data)), *self.data, *lasts]


class Outlet(Protocol):
    """What a writer needs of the flusher that sends its appends."""

    pending_bytes: int

    @property
    def unreachable(self) -> bool:
        """True while Redis accepts no events."""
        ...

    def enqueue(self, writer: RedisWriter) -> None:
        """Send the writer's pending events soon."""
        ...


def _size_of(event: Event) -> int:
    """Return about how many bytes an event takes. Of a delta only the text counts."""
    if isinstance(event, Delta):
        return len(event.text)
    if isinstance(event, MessageEvent):
        message = event.message
        calls = len(msgspec.json.encode(message.tool_calls)) if message.tool_calls else 0
        reasoning = sum(len(block["text"]) for block in message.reasoning or ())
        return len(message.content) + len(message.content_html) + calls + reasoning + _EVENT_BYTES
    return len(encode(event))


class RedisWriter:
    """A LogWriter of one thread.

    Attributes:
        _snapshot: builds the run's whole message; None if no run writes.
        _last_position: of this writer's last entry in the log; "" if there is none, or it is lost.
        _pending: events not sent yet.
        _append: what was sent, or is to be sent next; None once Redis has replied.
        _snapshot_due: a snapshot goes in place of the parts that were pending.
        _deleted: the log has had its last entry; _refused: an event of this writer came after it.
        _failure: why this writer was given up; _pending is dropped then.
        _compact_at: the number of pending events at which they are compacted.
        _size: the bytes of this writer in `Outlet.pending_bytes`.
        _flushes: calls of `flush` that wait.
    """

    def __init__(self, outlet: Outlet, thread_id: str, snapshot: Callable[[], MessageSnapshot] | None) -> None:
        self.thread_id = thread_id
        self._outlet = outlet
        self._snapshot = snapshot
        self._last_position = ""
        self._pending: list[Event] = []
        self._append: Append | None = None
        self._snapshot_due = False
        self._deleted = False
        self._refused = False
        self._failure: LogUnavailable | None = None
        self._compact_at = _COMPACT_EVENTS
        self._size = 0
        self._flushes: list[asyncio.Future[None]] = []

    @property
    def idle(self) -> bool:
        """True if nothing is pending or in flight."""
        return not (self._pending or self._append or self._snapshot_due)

    @property
    def is_run(self) -> bool:
        """True if it can replace parts by a snapshot."""
        return self._snapshot is not None

    @property
    def has_ended(self) -> bool:
        """True if the last pending event is a terminal event: nothing more will be written."""
        return bool(self._pending) and self._pending[-1].terminal

    def write(self, event: Event) -> None:
        """As in LogWriter."""
        if self._deleted:
            raise LogDeleted(self.thread_id)
        if not (self._snapshot_due and event.superseded_by_snapshot):
            self._pending.append(event)
            if len(self._pending) >= self._compact_at:
                self._compact()
            elif not isinstance(event, Delta):
                self._set_size(self._size + _size_of(event))
        self._outlet.enqueue(self)

    async def flush(self) -> None:
        """As in LogWriter. Raises LogUnavailable if this writer was given up, or the log was closed."""
        if not self.idle:
            self._outlet.enqueue(self)
            flushed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._flushes.append(flushed)
            await flushed
        if self._failure:
            raise self._failure
        if self._refused:
            raise LogDeleted(self.thread_id)

    def replace_parts(self) -> None:
        """Replace the pending parts of the run's message by a snapshot."""
        self._pending = [event for event in self._pending if not event.superseded_by_snapshot]
        self._snapshot_due = True
        self._measure()

    def next_append(self, new_batch: Callable[[], str]) -> Append | None:
        """Return the append to send: the one without a reply, else a new one of what is pending, or None."""
        if self._append is None:
            events, data = list[Event](), list[bytes]()
            for event in self._take_pending():
                try:
                    data.append(encode(event))
                    events.append(event)
                except Exception:
                    logger.exception("an event of thread %s cannot be encoded", self.thread_id)
            if data:
                self._append = Append(new_batch(), self._last_position, events, data)
                self._measure()
            elif self.idle:
                self._resolve_flushes(None)
        return self._append

    def accept_reply(self, reply: bytes) -> None:
        """Take the reply to the append."""
        append, self._append = self._append, None
        if append is None:  # this writer was given up meanwhile
            return
        if reply == b"LOST":
            self._last_position = ""
            self._pending = append.events + self._pending
            if self._snapshot:
                self.replace_parts()  # I15
        elif reply == b"ENDED":
            self._pending, self._snapshot_due = [], False  # I16
        elif reply == b"DELETED":
            self._close(refused=True)
        else:
            self._last_position = reply.decode()
            if append.events[-1].closes_log:
                self._close(refused=bool(self._pending))
        self._measure()
        if self.idle:
            self._resolve_flushes(None)

    def give_up(self, reason: str) -> None:
        """Drop what is pending."""
        self._pending, self._append, self._snapshot_due = [], None, False
        self._set_size(0)
        self._failure = LogUnavailable(reason)
        self._resolve_flushes(self._failure)

    def _take_pending(self) -> list[Event]:
        """Remove and return the events of the next append."""
        events = join_deltas(self._pending)
        if self._snapshot_due and self._snapshot:
            # after run.started, which would reset the message to an empty one
            started = (number for number, event in enumerate(events, 1) if isinstance(event, RunStarted))
            events.insert(next(started, 0), self._snapshot())
        self._snapshot_due = False
        size = 0
        for number, event in enumerate(events, 1):
            size += len(getattr(event, "text", ""))
            if number == _APPEND_EVENTS or size > _APPEND_BYTES or event.closes_log:
                self._pending = events[number:]
                return events[:number]
        self._pending = []
        return events

    def _compact(self) -> None:
        """Join the pending deltas; while Redis is unreachable, replace many or large parts by a snapshot."""
        self._pending = join_deltas(self._pending)
        size = sum(map(_size_of, self._pending))
        self._set_size(size + (self._append.size if self._append else 0))
        too_much = len(self._pending) > _PENDING_EVENTS or size > _PENDING_BYTES
        if self._snapshot and too_much and self._outlet.unreachable:
            self.replace_parts()
        self._compact_at = len(self._pending) + _COMPACT_EVENTS

    def _measure(self) -> None:
        if self._size:
            self._set_size(sum(map(_size_of, self._pending)) + (self._append.size if self._append else 0))

    def _set_size(self, size: int) -> None:
        self._outlet.pending_bytes += size - self._size
        self._size = size

    def _close(self, *, refused: bool) -> None:
        self._deleted, self._refused = True, refused
        self._pending, self._snapshot_due = [], False

    def _resolve_flushes(self, error: LogUnavailable | None) -> None:
        flushes, self._flushes = self._flushes, []
        for flushed in flushes:
            if not flushed.done():
                if error:
                    flushed.set_exception(error)
                else:
                    flushed.set_result(None)
