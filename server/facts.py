"""Publishes facts: what is stored without starting a run, such as messages, changes of a thread and deletions.

The store adds each fact to the thread's outbox in the same write (the outbox contract has the rules). A FactPublisher
appends it to the thread's log, and removes it from the outbox once the log has acknowledged it. What a dead process
left there, or one that could not reach the log for long, is published by the process that sweeps first. No request
waits for any of this.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from agent_chat.server.timing import Timing
from agent_chat.stores.contracts import EventLog, LogWriter, Outbox, ThreadStore
from agent_chat.stores.errors import LogDeleted, LogUnavailable, StoreUnavailable
from agent_chat.stores.events import Fact, fact_id
from agent_chat.stores.models import Principal

logger = logging.getLogger(__name__)

_MAX_ROUNDS = 100
"""How many times one sweep reads the outboxes again, so that it ends though new facts keep coming."""


class _Publication:
    """The facts of one thread that this process is publishing, through one writer, so that they stay in order."""

    def __init__(self, principal: Principal, thread_id: str, writer: LogWriter) -> None:
        self.principal = principal
        self.thread_id = thread_id
        self.writer = writer
        self.facts: dict[str, Fact] = {}
        """By their ids, in order; each stays until the log has acknowledged it and it is out of the outbox."""


class FactPublisher:
    """Publishes the facts that this process stores, and those left over in outboxes."""

    def __init__(self, store: ThreadStore, log: EventLog, timing: Timing = Timing()) -> None:
        self._store = store
        self._log = log
        self._timing = timing
        self._publications: dict[str, _Publication] = {}
        """By thread; each exists while its task `_confirm` runs."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._left_over: dict[str, int] = {}
        """How many facts of this process stayed in the outbox of each thread since one could not be published."""

    @property
    def pending(self) -> int:
        """How many facts of this process the log has not acknowledged yet."""
        return sum(len(publication.facts) for publication in self._publications.values())

    def publish(self, principal: Principal, thread_id: str, fact: Fact) -> None:
        """Publish a fact that is stored. Returns immediately; the work is done in the background.

        While earlier facts of the thread are left over in its outbox this one stays there too, to keep the order.
        """
        if thread_id in self._left_over:
            self._left_over[thread_id] += 1
            return
        publication = self._publications.get(thread_id)
        if publication is None:
            publication = _Publication(principal, thread_id, self._log.writer(thread_id))
            self._publications[thread_id] = publication
            task = asyncio.create_task(self._confirm(publication), name=f"facts {thread_id}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if fact_id(fact) not in publication.facts:
            publication.facts[fact_id(fact)] = fact
            with contextlib.suppress(LogDeleted):
                publication.writer.write(fact)

    async def sweep(self) -> None:
        """Publish what is left over in outboxes; the next sweep repeats what fails. Raises: StoreUnavailable."""
        for thread_id in list(self._left_over):
            await self._publish_own(thread_id)
        for _ in range(_MAX_ROUNDS):
            if self._log.unreachable:
                return
            outboxes = await self._store.take_outboxes()
            for outbox in outboxes:
                if outbox.thread_id not in self._publications and not self._log.unreachable:
                    await self._publish_left_over(outbox)
            if not outboxes:
                break

    async def sweep_forever(self) -> None:
        """Sweep immediately, then at each interval; failures are logged."""
        while True:
            try:
                await self.sweep()
            except StoreUnavailable as error:
                logger.warning("outboxes could not be read: %s", error)
            except Exception:
                logger.exception("outboxes could not be published")
            await asyncio.sleep(self._timing.sweep)

    async def close(self) -> None:
        """Wait two seconds for what is being published; the outbox holds the rest."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._timing.fact_flush)
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _confirm(self, publication: _Publication) -> None:
        """Remove from the outbox what the log has acknowledged, until nothing is pending."""
        try:
            while publication.facts:
                facts = list(publication.facts.values())
                with contextlib.suppress(LogDeleted):
                    await publication.writer.flush()
                await self._store.mark_published(publication.principal, publication.thread_id, facts)
                for fact in facts:
                    del publication.facts[fact_id(fact)]
        except LogUnavailable as error:
            self._left_over[publication.thread_id] = len(publication.facts)
            logger.info("facts of thread %s stay in the outbox: %s", publication.thread_id, error)
        except StoreUnavailable as error:
            logger.info("facts of thread %s stay in the outbox: %s", publication.thread_id, error)
        except Exception:
            logger.exception("facts of thread %s stay in the outbox", publication.thread_id)
        finally:
            del self._publications[publication.thread_id]

    async def _publish_own(self, thread_id: str) -> None:
        """Publish what this process left in the thread's outbox, until no fact was added meanwhile.

        Raises: StoreUnavailable.
        """
        for _ in range(_MAX_ROUNDS):
            if self._log.unreachable:
                return
            before = self._left_over[thread_id]
            outboxes = await self._store.take_outboxes(thread_id)
            for outbox in outboxes:
                if not await self._publish_left_over(outbox):
                    return
            if not outboxes and self._left_over[thread_id] == before:
                del self._left_over[thread_id]
                return

    async def _publish_left_over(self, outbox: Outbox) -> bool:
        """Publish the facts and remove them from the outbox; False if that failed, which delays no other thread."""
        try:
            if outbox.cut:
                await self._log.reset(outbox.thread_id)
            writer = self._log.writer(outbox.thread_id)
            with contextlib.suppress(LogDeleted):
                for fact in outbox.facts:
                    writer.write(fact)
                async with asyncio.timeout(self._timing.fact_flush):
                    await writer.flush()
            await self._store.mark_published(outbox.principal, outbox.thread_id, outbox.facts)
        except (LogUnavailable, StoreUnavailable, TimeoutError) as error:
            reason = error or "the log did not answer in time"
            logger.warning("facts of thread %s could not be published yet: %s", outbox.thread_id, reason)
            return False
        return True
