"""Writing a log that lies in Redis: what each writer has pending, and the one flusher that sends it.

A writer never waits. What it says while its last call is in flight, or while Redis is away, is kept and joined, and
goes out as one call; the flusher sends what all writers of the process have pending in one pipeline, the first at
once. A pool of connections or a pipeline per writer was refused: the cost per append is then several times as high,
and a writer's events could overtake each other.

A call that failed may have been carried out, its answer lost: it is sent again as it was, and the script looks first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import count

import msgspec

from agent_chat.stores.errors import LogDeleted, LogUnavailable
from agent_chat.stores.events import (
    Delta,
    Event,
    MessageDelta,
    MessageEvent,
    MessageSnapshot,
    ReasoningDelta,
    RunStarted,
    encode,
    join_deltas,
)

logger = logging.getLogger(__name__)

Command = tuple[str | bytes, ...]
Answer = object

_CALL_EVENTS = 500
_CALL_BYTES = 2**20
_PIPELINE_CALLS = 500
_PIPELINE_BYTES = 4 * 2**20
_SHRINK_EVENTS = 256
_PENDING_EVENTS = 2000
_PENDING_BYTES = 2**20
_EVENT_BYTES = 500
PENDING_BYTES = 64 * 2**20
"""What all writers of a process may hold while Redis is unreachable, but for the deltas of runs (1 MB each)."""

_SILENT_SECONDS = 2.0
_WAITS = (0.0, 0.05, 0.1, 0.2, 0.5)


class Away(Exception):
    """Redis did not answer all of a pipeline: `answers` are those to its first commands."""

    def __init__(self, answers: Sequence[Answer], reason: str) -> None:
        super().__init__(reason)
        self.answers = answers


class Refusal(msgspec.Struct, frozen=True):
    """An answer that is an error: nothing was done, or a part of a command that may be sent again.

    `full`: because Redis' memory is used up.
    """

    reason: str
    full: bool = False


Exchange = Callable[[Sequence[Command]], Awaitable[list[Answer]]]
"""Send commands in one write, answer in their order. Raises: Away."""


class Backoff:
    """How long to wait before the next try: not at all after the first failure, then longer and longer."""

    def __init__(self) -> None:
        self._failures = 0

    def reset(self) -> None:
        self._failures = 0

    async def wait(self) -> None:
        self._failures += 1
        await asyncio.sleep(_WAITS[min(self._failures, len(_WAITS)) - 1])


class _Call:
    """One append on its way: sent again as it was until it is answered."""

    def __init__(self, batch: str, mine: str, events: list[Event], data: list[bytes]) -> None:
        self.batch = batch
        self.mine = mine
        self.events = events
        self.data = data
        self.size = sum(map(len, data))
        self.retry = False


def _weight(event: Event) -> int:
    """About how many bytes an event takes; of a delta only its text is counted, where that is asked for."""
    match event:
        case MessageDelta(text=text) | ReasoningDelta(text=text):
            return len(text)
        case MessageEvent(message=message):
            calls = len(msgspec.json.encode(message.tool_calls)) if message.tool_calls else 0
            return len(message.content) + len(message.content_html) + calls + _EVENT_BYTES
        case _:
            return len(encode(event))


class RedisWriter:
    """A LogWriter of one thread. `is_run`: it has a snapshot to put in place of deltas."""

    def __init__(self, flusher: Flusher, thread_id: str, snapshot: Callable[[], MessageSnapshot] | None) -> None:
        self.thread_id = thread_id
        self._flusher = flusher
        self._snapshot = snapshot
        self._last = ""
        self._pending: list[Event] = []
        self._call: _Call | None = None
        self._whole = False
        self._deleted = False
        self._refused = False
        self._failed: LogUnavailable | None = None
        self._shrink_at = _SHRINK_EVENTS
        self._size = 0
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def idle(self) -> bool:
        return not (self._pending or self._call or self._whole)

    @property
    def is_run(self) -> bool:
        return self._snapshot is not None

    @property
    def has_ended(self) -> bool:
        """True if the last thing to send is a terminal event: nothing more is written."""
        return bool(self._pending) and self._pending[-1].terminal

    def write(self, event: Event) -> None:
        if self._deleted:
            raise LogDeleted(self.thread_id)
        if not (self._whole and event.superseded_by_snapshot):
            self._pending.append(event)
            if len(self._pending) >= self._shrink_at:
                self._shrink()
            elif not isinstance(event, Delta):
                self._count(self._size + _weight(event))
        self._flusher.want(self)

    def _count(self, size: int) -> None:
        """Say how much is pending now."""
        self._flusher.pending_bytes += size - self._size
        self._size = size

    def _recount(self) -> None:
        if self._size:
            self._count(sum(map(_weight, self._pending)) + (self._call.size if self._call else 0))

    async def flush(self) -> None:
        """Raises: LogDeleted; LogUnavailable once the log of this process is closed."""
        if not self.idle:
            self._flusher.want(self)
            waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(waiting)
            await waiting
        if self._failed:
            raise self._failed
        if self._refused:
            raise LogDeleted(self.thread_id)

    def _shrink(self) -> None:
        """Keep what is pending small while Redis is away: a snapshot stands for any number of parts."""
        self._pending = join_deltas(self._pending)
        size = sum(map(_weight, self._pending))
        self._count(size + (self._call.size if self._call else 0))
        if (
            self._snapshot
            and self._flusher.unreachable
            and (len(self._pending) > _PENDING_EVENTS or size > _PENDING_BYTES)
        ):
            self.make_whole()
        self._shrink_at = len(self._pending) + _SHRINK_EVENTS

    def make_whole(self) -> None:
        """Send a snapshot in place of the parts that are pending."""
        self._pending = [event for event in self._pending if not event.superseded_by_snapshot]
        self._whole = True
        self._recount()

    def call(self, new_batch: Callable[[], str]) -> _Call | None:
        """What to send: the call that was not answered, else one of what is pending."""
        if self._call is None:
            events, data = list[Event](), list[bytes]()
            for event in self._taken():
                try:
                    data.append(encode(event))
                    events.append(event)
                except Exception:
                    logger.exception("an event of thread %s can't be encoded", self.thread_id)
            if data:
                self._call = _Call(new_batch(), self._last, events, data)
                self._recount()
            elif self.idle:
                self._wake(None)
        return self._call

    def _taken(self) -> list[Event]:
        events = join_deltas(self._pending)
        if self._whole and self._snapshot:
            # behind the run's beginning, which would set the message back to nothing
            started = (n for n, event in enumerate(events, 1) if isinstance(event, RunStarted))
            events.insert(next(started, 0), self._snapshot())
        self._whole = False
        size = 0
        for n, event in enumerate(events, 1):
            size += len(getattr(event, "text", ""))
            if n == _CALL_EVENTS or size > _CALL_BYTES or event.closes_log:
                self._pending = events[n:]
                return events[:n]
        self._pending = []
        return events

    def settle(self, answer: bytes) -> None:
        """Take the answer to the call."""
        call, self._call = self._call, None
        if call is None:  # it was given up meanwhile
            return
        if answer == b"LOST":
            self._last = ""
            self._pending = call.events + self._pending
            if self._snapshot:
                self.make_whole()
        elif answer == b"ENDED":
            self._pending, self._whole = [], False
        elif answer == b"DELETED":
            self._delete(refused=True)
        else:
            self._last = answer.decode()
            if call.events[-1].closes_log:
                self._delete(refused=bool(self._pending))
        self._recount()
        if self.idle:
            self._wake(None)

    def fail(self, reason: str) -> None:
        """Give up: what is pending is dropped."""
        self._pending, self._call, self._whole = [], None, False
        self._count(0)
        self._failed = LogUnavailable(reason)
        self._wake(self._failed)

    def _delete(self, *, refused: bool) -> None:
        self._deleted, self._refused = True, refused
        self._pending, self._whole = [], False

    def _wake(self, error: LogUnavailable | None) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                if error:
                    future.set_exception(error)
                else:
                    future.set_result(None)


class Flusher:
    """Sends what the writers of this process have pending, one call per writer and pipeline.

    Args:
        process: an id of this process, never used by another.
        append: makes the command for KEYS[1] = the thread's key and these ARGV.
        spacing: seconds between the ends and starts of two pipelines; the first goes at once.
        full: called with the exchange where Redis refuses an append because its memory is used up.
    """

    def __init__(
        self,
        exchange: Exchange,
        process: str,
        append: Callable[[str, Sequence[str | bytes]], Command],
        seed: Callable[[], str],
        *,
        spacing: float = 0.0,
        full: Callable[[Exchange], Awaitable[None]] | None = None,
    ) -> None:
        self.pending_bytes = 0
        self.failures = 0
        self._full = full
        self._failing = False
        self._sent_at: float | None = None
        self._closed = False
        self._exchange = exchange
        self._batches = count()
        self._process = process
        self._append = append
        self._seed = seed
        self._spacing = spacing
        self._wanting: dict[RedisWriter, None] = {}
        self._some = asyncio.Event()
        self._none = asyncio.Event()
        self._none.set()
        self._task = asyncio.create_task(self._flush_forever(), name="log flusher")

    @property
    def unreachable(self) -> bool:
        """True while Redis takes no events: the last pipeline failed, or has waited for two seconds."""
        return self._failing or (self._sent_at is not None and time.monotonic() - self._sent_at > _SILENT_SECONDS)

    def want(self, writer: RedisWriter) -> None:
        if self._closed:
            writer.fail("it is closed")
            return
        self._wanting[writer] = None
        if self.pending_bytes > PENDING_BYTES and self.unreachable:
            self._relieve()
        if not self._some.is_set():
            self._some.set()
            self._none.clear()

    def _relieve(self) -> None:
        """Drop what the store can provide again once Redis is back, until half of the bound is free.

        Facts come again from the outbox, a finished run's from its record; a run that goes on has a snapshot instead
        of its parts.
        """
        reason = "too much is pending"
        for droppable in (lambda writer: not writer.is_run, lambda writer: writer.has_ended):
            for writer in [writer for writer in self._wanting if droppable(writer)]:
                if self.pending_bytes <= PENDING_BYTES // 2:
                    return
                self._wanting.pop(writer)
                writer.fail(reason)
        for writer in [writer for writer in self._wanting if writer.is_run]:
            writer.make_whole()

    async def close(self, seconds: float) -> None:
        """Send for so long what can be sent, then stop."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._none.wait()
        self._closed = True
        self._task.cancel()
        await asyncio.wait({self._task})
        for writer in self._wanting:
            writer.fail("it is closed")

    def _batch(self) -> str:
        return f"{self._process}:{next(self._batches)}"

    async def _flush_forever(self) -> None:
        backoff = Backoff()
        while True:
            await self._some.wait()
            try:
                self._failing = not await self._flush()
            except Exception:
                logger.exception("the log could not be flushed")
                self._failing = True
            if not self._wanting:
                self._some.clear()
                self._none.set()
            if self._failing:
                self.failures += 1
                await backoff.wait()
            else:
                backoff.reset()
                if self._spacing:
                    await asyncio.sleep(self._spacing)

    async def _flush(self) -> bool:
        """Send one pipeline and take its answers; false if Redis is away."""
        writers, commands = self._calls()
        reason = None
        self._sent_at = time.monotonic() if commands else None
        try:
            answers = await self._exchange(commands) if commands else []
        except Away as away:
            answers, reason = list(away.answers), str(away)
        finally:
            self._sent_at = None
        for writer, answer in zip(writers, answers, strict=False):
            if isinstance(answer, bytes):
                writer.settle(answer)
                if writer.idle:
                    self._wanting.pop(writer, None)
            else:
                reason = answer.reason if isinstance(answer, Refusal) else repr(answer)
        if self._full and any(isinstance(answer, Refusal) and answer.full for answer in answers):
            await self._full(self._exchange)
        if reason and not self._failing:
            logger.warning("Redis takes no events (%s); they are kept and sent later", reason)
        if reason is None and self._failing:
            logger.warning("Redis takes events again")
        return reason is None

    def _calls(self) -> tuple[list[RedisWriter], list[Command]]:
        """The next pipeline. Whoever was in the last one goes behind those who were not."""
        writers: list[RedisWriter] = []
        commands: list[Command] = []
        size = 0
        for writer in list(self._wanting):
            if len(writers) >= _PIPELINE_CALLS or size > _PIPELINE_BYTES:
                break
            call = writer.call(self._batch)
            del self._wanting[writer]
            if not writer.idle:
                self._wanting[writer] = None
            if call is None:
                continue
            writers.append(writer)
            size += call.size
            argv = [call.batch, "1" if call.retry else "", call.mine, self._seed(), *call.data]
            commands.append(self._append(writer.thread_id, argv))
            call.retry = True
        return writers, commands
