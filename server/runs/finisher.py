"""Ends runs: stores the finished message, then publishes the terminal event.

The runner uses it for its own runs and the repairer for those of dead processes. Storing is a compare-and-set: of any
number of finishers one wins, and only the winner publishes the terminal event.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable

from msgspec.structs import replace

from agent_chat.server.files.content_html import escape_text
from agent_chat.server.quota import size_of
from agent_chat.server.runs.contact import StoreContact
from agent_chat.server.runs.live_run import Ending, finish_message
from agent_chat.server.statistics import RunStatistics
from agent_chat.server.timing import Timing
from agent_chat.stores.contracts import Finished, LogWriter, Store, UsageRow
from agent_chat.stores.contracts.usage import build_usage
from agent_chat.stores.errors import NotFound, StoreDamaged, StoreUnavailable
from agent_chat.stores.events import Event, terminal_event
from agent_chat.stores.models import Clock, Message, Principal, timestamp

logger = logging.getLogger(__name__)

Render = Callable[[str, str], Awaitable[str]]
"""Renders an organization's Markdown to sanitized HTML."""
Charge = Callable[[str, int], None]
"""Counts bytes that an organization has stored."""


class Finisher:
    """Finishes runs on behalf of one worker.

    Args:
        worker: the id under which this process holds leases.
        charge: counts the bytes of each message that this process stored.

    Attributes:
        statistics: counts the runs that this process finished.
    """

    def __init__(
        self,
        store: Store,
        contact: StoreContact,
        worker: str,
        *,
        render: Render,
        charge: Charge,
        timing: Timing,
        clock: Clock,
    ) -> None:
        self.statistics = RunStatistics()
        self._store = store
        self._contact = contact
        self._worker = worker
        self._render = render
        self._charge = charge
        self._timing = timing
        self._clock = clock
        self._storing_since: dict[str, float] = {}
        """Runs whose finished message is not stored yet, and since when; -inf if it never can be."""
        self._hurried = asyncio.Event()

    def unstored_seconds(self, run_id: str) -> float:
        """How long this process has been trying to store that run's finished message; 0 if it is not trying."""
        since = self._storing_since.get(run_id)
        return 0.0 if since is None else time.monotonic() - since

    def hurry(self) -> None:
        """From now on store answers that wait to be rendered as plain text: the process is about to end."""
        self._hurried.set()

    async def finish(
        self, principal: Principal, partial: Message, ending: Ending, publish: Callable[[Event], None]
    ) -> Finished | None:
        """Store the finished message; if this call stored it, publish its terminal event.

        Args:
            partial: the run's message so far.
            publish: takes the events that close open tool calls, then the terminal event.

        Returns: what the store has; None if the thread was deleted.

        Raises: StoreDamaged.
        """
        message, closed = finish_message(partial, ending, timestamp(self._clock()))
        message = replace(message, content_html=await self._render_answer(principal, message))
        outcome = await self._store_message(principal, message)
        if outcome is not None and outcome.won:
            self.statistics.count(outcome.message, len(closed))
            self._charge(principal.organization_id, size_of(outcome.message))
            for event in closed:
                publish(event)
            publish(terminal_event(outcome.message))
        return outcome

    async def flush_terminal(self, principal: Principal, run_id: str, writer: LogWriter) -> None:
        """Wait until the terminal event is in the log, and renew the lease meanwhile.

        Without the lease a sweeper would take the record over and publish the terminal event a second time.
        """
        while True:
            try:
                async with asyncio.timeout(self._timing.checkpoint):
                    return await writer.flush()
            except TimeoutError:
                await self._renew_lease(principal, run_id)

    async def delete_record(self, principal: Principal, agent_id: str, message: Message) -> None:
        """Store the run's usage, then delete its record; if the store is unreachable, a sweeper does it later."""
        with contextlib.suppress(StoreUnavailable):
            await self._store.delete_record(principal, message.id, self.build_usage(principal, agent_id, message))

    def build_usage(self, principal: Principal, agent_id: str, message: Message) -> UsageRow:
        """Build the usage row of a run that ends now."""
        return build_usage(principal, agent_id, message, timestamp(self._clock())[:10])

    async def _render_answer(self, principal: Principal, message: Message) -> str:
        """Render the answer, and renew the run's lease while other texts of the organization are rendered first."""
        rendering = asyncio.ensure_future(self._render(principal.organization_id, message.content))
        hurried = asyncio.ensure_future(self._hurried.wait())
        try:
            while True:
                await asyncio.wait(
                    {rendering, hurried}, timeout=self._timing.checkpoint, return_when=asyncio.FIRST_COMPLETED
                )
                if rendering.done():
                    return rendering.result()
                if hurried.done():
                    return escape_text(message.content)
                await self._renew_lease(principal, message.id)
        finally:
            rendering.cancel()
            hurried.cancel()

    async def _renew_lease(self, principal: Principal, run_id: str) -> None:
        with contextlib.suppress(StoreUnavailable):
            await self._store.checkpoint(principal, run_id, worker=self._worker, partial=None)

    async def _store_message(self, principal: Principal, message: Message) -> Finished | None:
        """Store the finished message, however long that takes; None if the thread was deleted."""
        self._storing_since.setdefault(message.id, time.monotonic())
        try:
            outcome = await self._contact.retry(
                f"run {message.id} could not be finished yet", lambda: self._store.finish(principal, message)
            )
        except NotFound:
            outcome = None
        except StoreDamaged:
            self._storing_since[message.id] = -math.inf  # it can never be stored: clients need not wait for it
            raise
        self._storing_since.pop(message.id, None)
        return outcome
