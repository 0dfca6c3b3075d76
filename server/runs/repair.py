"""The repair of orphaned runs: those whose process died, or whose process could not renew their lease in time.

A run's record is deleted only after its terminal event is in the log, so a crash at any point leaves a record whose
lease expires. Any process takes it over, stores the longer of the last checkpoint and what the log holds, and publishes
the terminal event. If the dead process had stored the finished message already, only the event is published.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from msgspec.structs import replace

from agent_chat.server.reading.queries import read_run_events
from agent_chat.server.runs.contact import StoreContact
from agent_chat.server.runs.finisher import Finisher
from agent_chat.server.runs.live_run import CANCELLED, INTERRUPTED
from agent_chat.server.timing import Timing
from agent_chat.stores.contracts import EventLog, Store
from agent_chat.stores.errors import Gap, LogDeleted, LogUnavailable, NotFound, StoreUnavailable
from agent_chat.stores.events import Event, MessageCreated, MessageSnapshot, Terminal, terminal_event
from agent_chat.stores.fold import fold
from agent_chat.stores.models import Message, Principal, RunRecord

logger = logging.getLogger(__name__)


class Repairer:
    """Ends the runs of dead processes.

    Args:
        worker: the id under which this process holds leases.
        is_live: whether a run is one of this process, which must never be repaired by it.
    """

    def __init__(
        self,
        store: Store,
        log: EventLog,
        finisher: Finisher,
        contact: StoreContact,
        worker: str,
        is_live: Callable[[str], bool],
        timing: Timing,
    ) -> None:
        self._store = store
        self._log = log
        self._finisher = finisher
        self._contact = contact
        self._worker = worker
        self._is_live = is_live
        self._timing = timing
        self._closed = False
        self._orphans: dict[str, dict[str, RunRecord]] = {}
        """Records of runs to repair, by organization and run; an organization's runs are repaired one after another."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def sweep_forever(self) -> None:
        """Sweep at each interval; failures are logged."""
        while True:
            await asyncio.sleep(self._timing.sweep)
            try:
                await self.sweep()
            except StoreUnavailable as error:
                logger.warning("orphaned runs could not be looked for: %s", error)
                self._contact.lose()
            except Exception:
                logger.exception("the sweep for orphaned runs failed")

    async def sweep(self) -> None:
        """Repair every orphaned run. After an outage of the database only check whether it is reachable again.

        Returns when they are repaired, or after one interval: the rest continues in the background. Organizations are
        repaired concurrently, so that one whose answers wait long to be rendered delays no other one.

        Raises: StoreUnavailable.
        """
        if self._closed:
            return
        if not self._contact.is_stable:
            if not await self._store.ready():
                self._contact.lose()
            return
        for record in await self._store.take_orphans(self._worker):
            if not self._is_live(record.id):
                self._schedule(record)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._timing.sweep)

    async def repair_if_orphaned(self, principal: Principal, run_id: str) -> bool:
        """End that run if its process died; True if it did. Raises: StoreUnavailable."""
        if self._is_live(run_id) or not self._contact.is_stable:
            return False
        record = await self._store.take_orphan(principal, run_id, self._worker)
        if record is not None:
            await self.repair(record)
        return record is not None

    async def repair(self, record: RunRecord) -> None:
        """End a run in place of its process.

        Safe while its process, or another repairer, ends it too: whichever stores the finished message publishes the
        terminal event. If that one dies in between, the process that takes the record over publishes it.

        Raises: StoreUnavailable.
        """
        principal, thread_id = record.principal, record.thread_id
        try:
            stored = await self._store.get_message(principal, thread_id, record.id)
            question = await self._store.get_message(principal, thread_id, (record.partial.run or {})["in_reply_to"])
        except NotFound:  # the thread was deleted, or the claim was refused
            await self._store.delete_record(principal, record.id)
            return
        ending = CANCELLED if record.cancelled else INTERRUPTED
        events = await self._read_log(record)
        if events is None:  # nothing can be published now; the record stays, so a later sweep publishes it
            if stored.in_progress:
                await self._finisher.finish(principal, record.partial, ending, lambda event: None)
            return
        writer = self._log.writer(thread_id)
        finished = stored
        with contextlib.suppress(LogDeleted):
            if stored.in_progress:
                partial = _longer(record.partial, fold(events, onto=record.partial))
                publish = _after_snapshot(question, partial, writer.write)
                outcome = await self._finisher.finish(principal, partial, ending, publish)
                if outcome is not None and not outcome.won:
                    return  # the winner publishes it
                finished = outcome.message if outcome else partial.with_run(status=ending.status)
            elif not (events and isinstance(events[-1], Terminal)):
                if record.worker != self._worker or self._is_live(record.id):
                    return  # its process is alive and about to publish it
                unfinished = replace(stored, content_html="").with_run(status="in_progress", error=None)
                _after_snapshot(question, unfinished, writer.write)(terminal_event(stored))
            try:
                async with asyncio.timeout(self._timing.checkpoint):
                    await writer.flush()
            except TimeoutError:
                return
        await self._delete_record(principal, finished)

    async def _delete_record(self, principal: Principal, finished: Message) -> None:
        """Store the run's usage, then delete its record. Without the thread nothing tells which agent it had."""
        try:
            agent_id = (await self._store.get(principal, finished.thread_id, message_limit=0)).agent_id
        except NotFound:
            return await self._store.delete_record(principal, finished.id)
        usage = self._finisher.build_usage(principal, agent_id, finished)
        await self._store.delete_record(principal, finished.id, usage)

    async def close(self) -> None:
        """Repair nothing more; other processes, or the next start, repair the rest."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._timing.agent_stop)

    def _schedule(self, record: RunRecord) -> None:
        organization_id = record.organization_id
        if organization_id not in self._orphans:
            self._orphans[organization_id] = {}
            task = asyncio.create_task(self._repair_all(organization_id), name=f"repair runs of {organization_id}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self._orphans[organization_id][record.id] = record

    async def _repair_all(self, organization_id: str) -> None:
        """Repair the organization's runs; one that a later sweep takes over again meanwhile is repaired once."""
        orphans = self._orphans[organization_id]
        try:
            while orphans:
                record = next(iter(orphans.values()))
                try:
                    await self.repair(record)
                except Exception:
                    logger.exception("run %s could not be repaired", record.id)
                del orphans[record.id]
        finally:
            del self._orphans[organization_id]

    async def _read_log(self, record: RunRecord) -> list[Event] | None:
        """The run's events in the log; None while the log is unreachable."""
        try:
            return await read_run_events(self._log, record.thread_id, record.id, await self._log.tail(record.thread_id))
        except Gap:
            return []
        except LogUnavailable:
            return None


def _longer(checkpoint: Message, logged: Message) -> Message:
    """The message with more text, then more tool calls, then more reasoning; with the files of both."""

    def extent(message: Message) -> tuple[int, int, int, int]:
        completed = sum(call.end_time is not None for call in message.tool_calls)
        reasoning = sum(len(block["text"]) for block in message.reasoning or ())
        return len(message.content), len(message.tool_calls), completed, reasoning

    longer = logged if extent(logged) > extent(checkpoint) else checkpoint
    return replace(longer, attachments=max(checkpoint.attachments, logged.attachments, key=len))


def _after_snapshot(question: Message, answer: Message, write: Callable[[Event], None]) -> Callable[[Event], None]:
    """`write`, which first writes the question and a snapshot of the answer.

    A log that was lost no longer has the question. Readers can have less of the answer than is stored, if its process
    died before it published the rest, or more, if that process is still alive or the log has evicted events that no
    checkpoint contains. So the snapshot is published in any case.
    """
    first: list[Event] = [MessageCreated(question), MessageSnapshot(answer)]

    def publish(event: Event) -> None:
        while first:
            write(first.pop(0))
        write(event)

    return publish
