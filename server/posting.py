"""Posting messages, waiting for their answers, and cancelling runs.

The order of a post decides what a client can rely on: a retry with the same Idempotency-Key is recognized before any
limit; whatever refuses the post cheaply comes before files are stored; and the claim is one atomic write, after which
nothing can fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Sequence

from msgspec import UNSET
from msgspec.structs import replace

from agent_chat.server.errors import AnswerUnknown, Draining, InvalidRequest
from agent_chat.server.facts import FactPublisher
from agent_chat.server.files.attachments import Attachments
from agent_chat.server.files.content_html import Renderer
from agent_chat.server.inputs import FILES, IfBusy, MessageCreate, Upload, make_idempotency
from agent_chat.server.limits import Slots
from agent_chat.server.lookup import Lookup
from agent_chat.server.quota import Quota, size_of
from agent_chat.server.runs.runner import Runner
from agent_chat.server.timing import Timing
from agent_chat.stores.contracts import EventLog, Posted, Store
from agent_chat.stores.contracts.storage import RECORD_BYTES
from agent_chat.stores.errors import (
    Gap,
    LogUnavailable,
    StoreDamaged,
    StoreUnavailable,
    ThreadArchived,
    ThreadBusy,
)
from agent_chat.stores.events import CLOSING_TYPES, TERMINAL_TYPES, MessageCreated
from agent_chat.stores.models import (
    Agent,
    Attachment,
    Clock,
    Idempotency,
    Message,
    Principal,
    Thread,
    new_id,
    timestamp,
)

_RUN_ENDS = TERMINAL_TYPES | CLOSING_TYPES


class Posting:
    """Stores messages and starts the runs that answer them.

    Args:
        run_slots: reserved by each run that is started.
    """

    def __init__(
        self,
        store: Store,
        log: EventLog,
        runner: Runner,
        facts: FactPublisher,
        lookup: Lookup,
        *,
        attachments: Attachments,
        renderer: Renderer,
        quota: Quota,
        run_slots: Slots,
        timing: Timing,
        clock: Clock,
    ) -> None:
        self._store = store
        self._log = log
        self._runner = runner
        self._facts = facts
        self._lookup = lookup
        self._attachments = attachments
        self._renderer = renderer
        self._quota = quota
        self._run_slots = run_slots
        self._timing = timing
        self._clock = clock

    async def post(
        self,
        principal: Principal,
        agent_ref: str,
        thread_id: str,
        body: MessageCreate,
        *,
        idempotency_key: str | None,
        if_busy: IfBusy,
        files: Sequence[Upload],
        stream: bool,
    ) -> Posted:
        """Store the message; a user's message claims the thread and starts its run. See AIChatService.post_message."""
        part = await self._lookup.thread(principal, agent_ref, thread_id, message_limit=1 if files else 0)
        thread = part.thread
        idempotency = make_idempotency(idempotency_key, body, files)
        if idempotency and (replayed := await self._replay(principal, thread_id, idempotency)):
            return replayed
        agent = await self._lookup.agent_of(principal, thread)
        if thread.archived:
            raise ThreadArchived(thread_id)
        attachments = await self._attachments.get_referenced(principal, thread_id, [ref.id for ref in body.attachments])
        if len(attachments) + len(files) > FILES:
            raise InvalidRequest("files", f"A message may have at most {FILES} attachments.")
        if files and body.role == "user":
            await self._refuse_early(principal, thread, if_busy)
        added = await self._attachments.add(principal, thread_id, files)
        try:
            message = await self._build_message(principal, thread_id, body, attachments + added)
            position = await self._tail(thread_id) if stream else None
            async with self._quota.spending(principal.organization_id, RECORD_BYTES + size_of(message)) as spent:
                posted = await self._store_message(principal, agent, message, idempotency, if_busy)
                if posted.replayed:
                    spent.give_back()
        except StoreUnavailable:  # the message may be stored all the same
            raise
        except Exception:
            await self._attachments.remove(principal, thread_id, added)
            raise
        # a replay or a retry of a failed run has the attachments of its first attempt
        superfluous = [each for each in added if each not in posted.message.attachments]
        await self._attachments.remove(principal, thread_id, superfluous)
        return replace(posted, position=position)

    def check_capacity(self, principal: Principal) -> None:
        """Raises: Draining or RateLimited if no run of this organization can start here now."""
        if self._runner.draining:
            raise Draining
        self._run_slots.check(principal.organization_id)

    async def wait(self, principal: Principal, thread_id: str, run_id: str, seconds: float | None = None) -> Message:
        """Return the run's message once it is finished, or as it is after so many seconds.

        The run itself, or the log if another process has it, indicates when to read the message. It is also read at
        each poll interval, since the log may be lost.

        Raises: ThreadNotFound, MessageNotFound; AnswerUnknown if the database has been unreachable for 30 seconds,
        has refused for 30 seconds to store the finished message (a full disk), or is unreachable at the end.
        """
        patience = self._timing.answer_patience
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while True:
                    is_ours = self._runner.has(run_id)
                    if is_ours:
                        left = patience - self._runner.unstored_seconds(run_id)
                        await self._runner.wait_until_stored(run_id, max(0.0, min(left, self._timing.poll)))
                    position = None if is_ours else await self._tail(thread_id)
                    message = await self._get_with_retries(principal, thread_id, run_id, patience)
                    if not message.in_progress:
                        return message
                    if self._runner.unstored_seconds(run_id) >= patience:
                        raise AnswerUnknown(thread_id, run_id)
                    if not is_ours:
                        await self._wait_for_terminal_event(thread_id, position)
        return await self._get_with_retries(principal, thread_id, run_id, 0.0)

    async def cancel(self, principal: Principal, thread_id: str, run_id: str) -> Message:
        """Cancel the run through its process; if that does not end it within five seconds, end it here."""
        await self._store.cancel(principal, thread_id, run_id)
        await self._log.signal(run_id)
        message = await self.wait(principal, thread_id, run_id, self._timing.cancel)
        if message.in_progress and (record := await self._store.find_record(principal, run_id)):
            await self._runner.repairer.repair(record)
            message = await self._store.get_message(principal, thread_id, run_id)
        return message

    async def _replay(self, principal: Principal, thread_id: str, idempotency: Idempotency) -> Posted | None:
        """What the key has stored before; None if it is new, or if its run has died and may be started again."""
        posted = await self._store.replay(principal, thread_id, idempotency)
        if posted is None:
            return None
        if posted.unpublished:
            self._facts.publish(principal, thread_id, MessageCreated(posted.message))
        run = posted.answer
        if run and run.in_progress and await self._runner.repairer.repair_if_orphaned(principal, run.id):
            return None
        return posted

    async def _refuse_early(self, principal: Principal, thread: Thread, if_busy: IfBusy) -> None:
        """Raise before files are stored what the claim would raise after that, as far as it is known.

        Raises: Draining, RateLimited, ThreadBusy.
        """
        self.check_capacity(principal)
        if if_busy == "interrupt":  # the claim cancels the run, once nothing else can refuse this message
            return
        for message in thread.messages:
            if message.in_progress and not await self._runner.repairer.repair_if_orphaned(principal, message.id):
                raise ThreadBusy(message.id)

    async def _store_message(
        self, principal: Principal, agent: Agent, message: Message, idempotency: Idempotency | None, if_busy: IfBusy
    ) -> Posted:
        if message.role == "user":
            return await self._claim(principal, agent, message, idempotency, if_busy)
        posted = await self._store.append_message(principal, message, idempotency)
        if not posted.replayed or posted.unpublished:
            self._facts.publish(principal, message.thread_id, MessageCreated(posted.message))
        return posted

    async def _claim(
        self, principal: Principal, agent: Agent, question: Message, idempotency: Idempotency | None, if_busy: IfBusy
    ) -> Posted:
        """Store the user's message, claim the thread for its run, and start the run."""
        if self._runner.draining:
            raise Draining
        answer = self._runner.new_answer(question, agent)

        def claim() -> Awaitable[Posted]:
            return self._store.claim(principal, question, answer, worker=self._runner.worker, idempotency=idempotency)

        with self._run_slots.starting(principal.organization_id) as slot:
            try:
                posted = await claim()
            except ThreadBusy as busy:
                if not await self._free_thread(principal, question.thread_id, busy.message_id, if_busy):
                    raise
                posted = await claim()
            if posted.replayed:
                slot.release()
            else:
                self._runner.start(principal, agent, posted, slot)
        return posted

    async def _free_thread(self, principal: Principal, thread_id: str, run_id: str, if_busy: IfBusy) -> bool:
        """End the run that has the thread: always if its process died, with `interrupt` also a live one.

        Returns: whether the run was ended.
        """
        if await self._runner.repairer.repair_if_orphaned(principal, run_id):
            return True
        if if_busy == "interrupt":
            await self.cancel(principal, thread_id, run_id)
            return True
        return False

    async def _build_message(
        self, principal: Principal, thread_id: str, body: MessageCreate, attachments: list[Attachment]
    ) -> Message:
        if body.content_html is UNSET:
            html = await self._renderer.render_markdown(principal.organization_id, body.content)
        else:
            html = await self._renderer.sanitize(principal.organization_id, body.content_html)
        return Message(
            id=new_id(),
            thread_id=thread_id,
            content=body.content,
            content_html=html,
            role=body.role,
            tool_calls=[],
            attachments=attachments,
            metadata={} if body.metadata is UNSET else body.metadata,
            created_at=timestamp(self._clock()),
        )

    async def _get_with_retries(self, principal: Principal, thread_id: str, run_id: str, patience: float) -> Message:
        """The run's message. Raises: AnswerUnknown if the database is unreachable for `patience` seconds."""
        until = time.monotonic() + patience
        while True:
            try:
                return await self._store.get_message(principal, thread_id, run_id)
            except StoreDamaged:
                raise
            except StoreUnavailable as error:
                if time.monotonic() >= until:
                    raise AnswerUnknown(thread_id, run_id) from error
                await asyncio.sleep(self._timing.unreachable_pause)

    async def _tail(self, thread_id: str) -> str | None:
        """The log's last position; None while the log is unreachable."""
        try:
            return await self._log.tail(thread_id)
        except LogUnavailable:
            return None

    async def _wait_for_terminal_event(self, thread_id: str, position: str | None) -> None:
        """Read the log until a run ends; return earlier at the poll interval, or if the log cannot be followed."""
        if position is None:
            await asyncio.sleep(self._timing.unreachable_pause)
            return
        cursor = self._log.cursor(thread_id, position)
        try:
            async with asyncio.timeout(self._timing.poll):
                while not any(entry.type in _RUN_ENDS for entry in await cursor.next()):
                    pass
        except (Gap, LogUnavailable, TimeoutError):
            pass
        finally:
            cursor.close()
