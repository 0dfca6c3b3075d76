"""Sends what all writers of a process have pending: one task, one pipeline at a time, the first event immediately."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import count

from agent_chat.stores.redis.connection import Backoff, Command, ErrorReply, Exchange, RedisUnreachable, Reply
from agent_chat.stores.redis.writer import RedisWriter

logger = logging.getLogger(__name__)

_PIPELINE_APPENDS = 500
_PIPELINE_BYTES = 4 * 2**20
PENDING_BYTES = 64 * 2**20
"""How much all writers of a process hold while Redis is unreachable, besides the deltas of runs (1 MB each)."""

_UNREACHABLE_SECONDS = 2.0


class Flusher:
    """Sends the pending events of all writers of a process, one append per writer and pipeline.

    Args:
        exchange: sends a pipeline.
        process: an id of this process, never used by another.
        command: builds the append command for a thread's id and its ARGV.
        seed: returns a random number.
        spacing: seconds between the end of a pipeline and the start of the next; the first is sent immediately.
        full: called with `exchange` when Redis refuses an append because its memory is used up.

    Attributes:
        pending_bytes: what the writers hold, besides the deltas of runs.
        failures: the number of pipelines that were not completed.
        _failing: the last pipeline was not completed.
        _sent_at: when the pipeline in flight was sent; None if there is none.
        _queue: the writers with pending events; those that wait longest first.
        _queued: set while the queue is not empty; _empty: set while it is.
    """

    def __init__(
        self,
        exchange: Exchange,
        process: str,
        command: Callable[[str, Sequence[str | bytes]], Command],
        seed: Callable[[], str],
        *,
        spacing: float = 0.0,
        full: Callable[[Exchange], Awaitable[None]] | None = None,
    ) -> None:
        self.pending_bytes = 0
        self.failures = 0
        self._exchange = exchange
        self._process = process
        self._command = command
        self._seed = seed
        self._spacing = spacing
        self._full = full
        self._failing = False
        self._sent_at: float | None = None
        self._closed = False
        self._batches = count()
        self._queue: dict[RedisWriter, None] = {}
        self._queued = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._task = asyncio.create_task(self._flush_forever(), name="log flusher")

    @property
    def unreachable(self) -> bool:
        """True while Redis accepts no events: the last pipeline failed, or has waited for two seconds."""
        waited = 0.0 if self._sent_at is None else time.monotonic() - self._sent_at
        return self._failing or waited > _UNREACHABLE_SECONDS

    def enqueue(self, writer: RedisWriter) -> None:
        """Send the writer's pending events soon."""
        if self._closed:
            writer.give_up("it is closed")
            return
        self._queue[writer] = None
        if self.pending_bytes > PENDING_BYTES and self.unreachable:
            self._reduce_pending()
        if not self._queued.is_set():
            self._queued.set()
            self._empty.clear()

    async def close(self, seconds: float) -> None:
        """Send what can be sent within `seconds`, then stop."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._empty.wait()
        self._closed = True
        self._task.cancel()
        await asyncio.wait({self._task})
        for writer in self._queue:
            writer.give_up("it is closed")

    def _reduce_pending(self) -> None:
        """Drop what the store can provide again once Redis is reachable, until half of the bound is free.

        Facts are published again from the outbox, a finished run's terminal event from its record. A run in progress
        gets a snapshot in place of its parts.
        """
        for droppable in (lambda writer: not writer.is_run, lambda writer: writer.has_ended):
            for writer in [writer for writer in self._queue if droppable(writer)]:
                if self.pending_bytes <= PENDING_BYTES // 2:
                    return
                self._queue.pop(writer)
                writer.give_up("too much is pending")
        for writer in [writer for writer in self._queue if writer.is_run]:
            writer.replace_parts()

    def _new_batch(self) -> str:
        return f"{self._process}:{next(self._batches)}"

    async def _flush_forever(self) -> None:
        backoff = Backoff()
        while True:
            await self._queued.wait()
            try:
                self._failing = not await self._flush()
            except Exception:
                logger.exception("the log could not be flushed")
                self._failing = True
            if not self._queue:
                self._queued.clear()
                self._empty.set()
            if self._failing:
                self.failures += 1
                await backoff.wait()
            else:
                backoff.reset()
                if self._spacing:
                    await asyncio.sleep(self._spacing)

    async def _flush(self) -> bool:
        """Send one pipeline and take its replies; False if it was not completed."""
        writers, commands = self._build_pipeline()
        reason = None
        replies: list[Reply] = []
        self._sent_at = time.monotonic() if commands else None
        try:
            replies = await self._exchange(commands) if commands else []
        except RedisUnreachable as error:
            replies, reason = list(error.replies), str(error)
        finally:
            self._sent_at = None
        for writer, reply in zip(writers, replies, strict=False):
            if isinstance(reply, bytes):
                writer.accept_reply(reply)
                if writer.idle:
                    self._queue.pop(writer, None)
            else:
                reason = reply.reason if isinstance(reply, ErrorReply) else repr(reply)
        if self._full and any(isinstance(reply, ErrorReply) and reply.full for reply in replies):
            await self._full(self._exchange)
        if reason and not self._failing:
            logger.warning("Redis accepts no events (%s); they are stored and sent later", reason)
        if reason is None and self._failing:
            logger.warning("Redis accepts events again")
        return reason is None

    def _build_pipeline(self) -> tuple[list[RedisWriter], list[Command]]:
        """Build the next pipeline. Writers of the last one that have more come after those that were not in it."""
        writers: list[RedisWriter] = []
        commands: list[Command] = []
        size = 0
        for writer in list(self._queue):
            if len(writers) >= _PIPELINE_APPENDS or size > _PIPELINE_BYTES:
                break
            append = writer.next_append(self._new_batch)
            del self._queue[writer]
            if not writer.idle:
                self._queue[writer] = None
            if append is None:
                continue
            writers.append(writer)
            size += append.size
            commands.append(self._command(writer.thread_id, append.arguments(self._seed())))
            append.retry = True
        return writers, commands
