"""The runs of this process, and the repair of runs whose process died.

A run belongs to no request: it is started by whoever claimed the thread and ends by itself, by cancel, by the time
limit or with the process. Its message is stored before its terminal event is said, and only whoever stored it says
it; its record is deleted last, so that a crash anywhere between leaves something for a sweeper to finish.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import TypeVar

from msgspec.structs import replace

from agent_chat.agents import (
    AgentError,
    File,
    Files,
    NoFiles,
    Part,
    Run,
    RunTools,
    Text,
    Toolbox,
    ToolPart,
    ToolStarted,
)
from agent_chat.agents.answer import TooLong
from agent_chat.agents.registry import Registry
from agent_chat.server.files.content_html import escape_text
from agent_chat.server.inputs import FILES
from agent_chat.server.limits import Slot
from agent_chat.server.log_lines import RUN_ID, THREAD_ID
from agent_chat.server.loop_share import begin_streaming, measured
from agent_chat.server.quota import size_of
from agent_chat.server.runs.live_run import CANCELLED, COMPLETED, INTERRUPTED, Ending, LiveRun, finished
from agent_chat.server.statistics import RunStatistics
from agent_chat.stores.contracts import LEASE_SECONDS, EventLog, Finished, LogWriter, Posted, Store
from agent_chat.stores.errors import (
    BlobUnavailable,
    Gap,
    LogDeleted,
    LogUnavailable,
    NotFound,
    StoreDamaged,
    StoreUnavailable,
    ThreadNotFound,
)
from agent_chat.stores.events import Event, MessageCreated, MessageSnapshot, RunError, Terminal, terminal_event
from agent_chat.stores.fold import fold
from agent_chat.stores.models import Agent, Attachment, Clock, Message, Principal, RunRecord, new_id, timestamp, utcnow

logger = logging.getLogger(__name__)

HISTORY = 100
"""How many of a thread's latest messages an agent is given; fewer where they would exceed READ_BYTES."""

CHECKPOINT_SECONDS = 2.0
SWEEP_SECONDS = 5.0
_STUBBORN_SECONDS = 5.0
_BREATH = 64

R = TypeVar("R")
StoreFile = Callable[[Principal, str, File], Awaitable[Attachment]]


async def _store_no_file(principal: Principal, thread_id: str, file: File) -> Attachment:
    raise AgentError("This server stores no files of agents.")


class Runner:
    """Starts, keeps, ends and repairs runs.

    Args:
        toolbox: makes the tools of an agent for one run of a principal; what it is given last is called with True while
            the run waits for tool servers, then with False.
        permitted: the agent within the operator's limits on models. Raises: AgentError for a model that is not allowed.
        render: an organization's Markdown to sanitized HTML.
        files: gives the attachments of a thread.
        store_file: stores a file of an answer in its thread. Raises: AgentError if the file cannot be stored.
        charge: counts the bytes of an answer that was stored.
        run_seconds: how long a run may take.
    """

    def __init__(
        self,
        store: Store,
        log: EventLog,
        registry: Registry,
        toolbox: Callable[[Agent, Principal, Callable[[bool], None]], Toolbox],
        render: Callable[[str, str], Awaitable[str]],
        *,
        files: Callable[[Principal, str], Files] = lambda who, thread_id: NoFiles(),
        store_file: StoreFile = _store_no_file,
        permitted: Callable[[Agent], Agent] = lambda agent: agent,
        charge: Callable[[str, int], None] = lambda organization_id, count: None,
        run_seconds: float = 600.0,
        clock: Clock = utcnow,
    ) -> None:
        self.worker = new_id()
        self.draining = False
        self.started = 0
        self.statistics = RunStatistics()
        self._store = store
        self._log = log
        self._registry = registry
        self._toolbox = toolbox
        self._files = files
        self._store_file = store_file
        self._permitted = permitted
        self._charge = charge
        self._render = render
        self._run_seconds = run_seconds
        self._clock = clock
        self._lost_at = -math.inf
        self._unstored: dict[str, float] = {}
        self._runs: dict[str, LiveRun] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._hurry = asyncio.Event()
        self._orphans: dict[str, dict[str, RunRecord]] = {}
        """Runs to repair, by organization, which are being repaired one after another."""
        self._repairs: set[asyncio.Task[None]] = set()
        log.on_signal(self._look)

    @property
    def count(self) -> int:
        """How many runs this process has."""
        return len(self._runs)

    def unstored_seconds(self, run_id: str) -> float:
        """For how long this process has tried in vain to store the end of that run; 0 if it does not."""
        since = self._unstored.get(run_id)
        return 0.0 if since is None else time.monotonic() - since

    def has(self, run_id: str) -> bool:
        """Whether this process has the run."""
        return run_id in self._runs

    async def until_stored(self, run_id: str, seconds: float) -> None:
        """Wait until the store has that run's finished message, or this process has no such run, or for so long."""
        if run := self._runs.get(run_id):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await run.stored.wait()

    def start(self, who: Principal, agent: Agent, posted: Posted, slot: Slot) -> None:
        """Begin the run that `posted` claimed; it goes on in a task of its own.

        `slot` is released when the agent has ended, though the message may still have to be stored and published.
        """
        run = LiveRun(who, agent, posted, self._log, self._clock)
        self._runs[run.id] = run
        run.ending.add_done_callback(lambda _: slot.release())
        self.started += 1
        if self.draining:
            run.end(INTERRUPTED)
        task = asyncio.create_task(measured(self._live, run, run.message()), name=f"run {run.id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: slot.release())  # a run that broke has no ending

    def prepared(
        self,
        who: Principal,
        agent: Agent,
        run_id: str,
        messages: list[Message],
        *,
        earlier: bool = False,
        live: LiveRun | None = None,
    ) -> Run:
        """What an agent is given. Raises: AgentError if its model is not allowed (any more).

        `live`: the run in which its tools publish their calls; None where there is none, as for a title.
        """
        agent = self._permitted(agent)
        thread_id = messages[-1].thread_id if messages else ""
        if live is None:
            tools = RunTools(self._toolbox(agent, who, lambda is_waiting: None))
        else:
            tools = RunTools(
                self._toolbox(agent, who, live.wait_for_tools), lambda part: self._publish_from_tool(live, part)
            )
        return Run(run_id, who, agent, messages, tools, earlier, self._files(who, thread_id))

    def _look(self, run_id: str) -> None:
        if run := self._runs.get(run_id):
            run.look.set()

    async def _live(self, run: LiveRun, answer: Message) -> None:
        RUN_ID.set(run.id)
        THREAD_ID.set(run.thread_id)
        try:
            run.begin(answer)
            ending = await self._answered(run)
            if ending is not None:
                if run.first_text_at is not None:
                    self.statistics.first_text.add(run.first_text_at - run.started_at)
                outcome = await self._end(run.who, run.message(), ending, run.publish)
                run.stored.set()
                if outcome is None or outcome.won:
                    await self._said(run.who, run.id, run.writer)
                    await self._forget(run.who, run.id)
        except LogDeleted:
            await self._forget(run.who, run.id)
        except LogUnavailable as error:
            logger.warning("run %s is stored, a sweeper will publish its terminal event: %s", run.id, error)
        except Exception:
            logger.exception("run %s broke; a sweeper will end it", run.id)
        finally:
            run.stored.set()
            del self._runs[run.id]

    async def _answered(self, run: LiveRun) -> Ending | None:
        """Let the agent speak until it has ended or something ended it."""
        speaking = asyncio.create_task(measured(self._speak, run))
        keeping = asyncio.create_task(measured(self._keep, run))
        try:
            done, _ = await asyncio.wait({run.ending}, timeout=self._run_seconds)
            if not done:
                detail = f"The answer took longer than {self._run_seconds:g} seconds."
                run.end(Ending("failed", RunError("agent_timeout", detail, retryable=True)))
            return run.ending.result()
        finally:
            keeping.cancel()
            speaking.cancel()
            _, stubborn = await asyncio.wait({speaking, keeping}, timeout=_STUBBORN_SECONDS)
            if stubborn:
                logger.error("run %s: its agent does not stop when cancelled", run.id)

    async def _speak(self, run: LiveRun) -> None:
        with self._failures_end(run):
            prepared = await self._prepare(run)
            parts = self._registry.kind(run.agent.kind).reply(prepared)
            try:
                breath = 0
                async for part in parts:
                    if isinstance(part, Text) and run.may_publish(LEASE_SECONDS):  # most parts: no coroutine for them
                        run.take(part)
                    else:
                        await self._take(run, part)
                    if (breath := breath + 1) % _BREATH == 0:
                        begin_streaming()
                        await asyncio.sleep(0)
            finally:
                try:
                    if isinstance(parts, AsyncGenerator):
                        await parts.aclose()
                finally:
                    await prepared.tools.close()
            run.end(COMPLETED)

    async def _take(self, run: LiveRun, part: Part) -> None:
        """Publish one part. Raises: CancelledError if the run has ended, and what LiveRun.take raises."""
        if time.monotonic() - run.looked_at > LEASE_SECONDS:
            # the process was paused: it may be another's run by now
            run.looked.clear()
            await run.looked.wait()
        if run.ending.done():  # an agent that goes on although it was cancelled
            raise asyncio.CancelledError("the run has ended")
        if isinstance(part, File):
            return await self._attach(run, part)
        run.take(part)
        if isinstance(part, ToolStarted):
            await run.final_call_stored()

    async def _attach(self, run: LiveRun, file: File) -> None:
        """Store a file of the answer, then publish it."""
        if len(run.message().attachments) >= FILES:
            raise AgentError(f"An answer may have at most {FILES} files.")
        attachment = await self._store_file(run.who, run.thread_id, file)
        if not run.ending.done():  # else the file stays in the thread, without a message
            run.attach(attachment)

    async def _publish_from_tool(self, run: LiveRun, part: ToolPart) -> None:
        """Publish a part of a call that the agent's framework makes while the generator waits.

        What fails here ends the run as if the generator had yielded the part, whatever the framework makes of it.
        """
        with self._failures_end(run):
            await self._take(run, part)
            return
        raise asyncio.CancelledError("the run has ended")

    @contextlib.contextmanager
    def _failures_end(self, run: LiveRun) -> Iterator[None]:
        """End the run as what is raised in the block requires."""
        try:
            yield
        except AgentError as error:
            run.end(Ending("failed", RunError(error.code, error.detail, error.retryable, error.retry_after)))
        except (LogDeleted, ThreadNotFound):
            run.end(None)
        except TooLong:
            run.end(Ending("failed", RunError("agent_failed", "The answer grew larger than a message may be.", False)))
        except (StoreUnavailable, BlobUnavailable):
            run.end(Ending("failed", RunError("store_unavailable", "The storage did not answer.", retryable=True)))
        except Exception:
            logger.exception("run %s: its agent raised", run.id)
            run.end(Ending("failed", RunError("agent_failed", "The agent failed.", retryable=False)))

    async def _prepare(self, run: LiveRun) -> Run:
        """Read the history up to the question, however many newer messages exist: the run may be a retry."""
        question = run.question
        stored = await self._until_answered(
            f"the history of run {run.id} could not be read yet",
            lambda: self._store.list_messages(run.who, run.thread_id, before=question.id, limit=HISTORY),
        )
        before = stored.messages[-(HISTORY - 1) :]
        earlier = stored.cut or len(stored.messages) > len(before)
        history = [*before, question]
        return self.prepared(run.who, run.agent, run.id, history, earlier=earlier, live=run)

    async def _keep(self, run: LiveRun) -> None:
        """Checkpoint every two seconds and at each tool boundary; learn there whether the run may go on."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CHECKPOINT_SECONDS):
                    await run.look.wait()
            run.look.clear()
            partial = run.message() if run.changed else None
            calls = run.answer.tool_call_count
            run.changed = False
            asked = time.monotonic()  # not when the answer is read: the process may have been paused in between
            try:
                lease = await self._store.checkpoint(run.who, run.id, worker=self.worker, partial=partial)
            except StoreUnavailable as error:
                logger.warning("run %s could not be checkpointed: %s", run.id, error)
                self._lose_contact()
                run.changed = run.changed or partial is not None
                continue
            finally:
                run.looked_at = asked
            run.looked.set()
            run.checkpointed(calls)
            if lease != "held":
                run.end(CANCELLED if lease == "cancelled" else None)
                return

    async def _end(
        self,
        who: Principal,
        partial: Message,
        ending: Ending,
        say: Callable[[Event], None],
    ) -> Finished | None:
        """Store the finished message, then say so if this call stored it. Null if the thread is gone."""
        message, closed = finished(partial, ending, timestamp(self._clock()))
        message = replace(message, content_html=await self._html(who, message))
        outcome = await self._stored(who, message)
        if outcome is not None and outcome.won:
            self.statistics.count(outcome.message, len(closed))
            self._charge(who.organization_id, size_of(outcome.message))
            for event in closed:
                say(event)
            say(terminal_event(outcome.message))
        return outcome

    async def _html(self, who: Principal, message: Message) -> str:
        """Render the answer, and renew the run's lease while that waits for other texts of the organization.

        A server that must stop now shows it as it is: what was not stored by then would be lost.
        """
        rendering = asyncio.ensure_future(self._render(who.organization_id, message.content))
        hurry = asyncio.ensure_future(self._hurry.wait())
        try:
            while True:
                await asyncio.wait({rendering, hurry}, timeout=CHECKPOINT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if rendering.done():
                    return rendering.result()
                if hurry.done():
                    return escape_text(message.content)
                with contextlib.suppress(StoreUnavailable):
                    await self._store.checkpoint(who, message.id, worker=self.worker, partial=None)
        finally:
            rendering.cancel()
            hurry.cancel()

    async def _stored(self, who: Principal, message: Message) -> Finished | None:
        reason = f"run {message.id} could not be finished yet"
        self._unstored.setdefault(message.id, time.monotonic())
        try:
            outcome = await self._until_answered(reason, lambda: self._store.finish(who, message))
        except NotFound:
            outcome = None
        except StoreDamaged:
            self._unstored[message.id] = -math.inf  # it will never be stored: its clients need not wait
            raise
        self._unstored.pop(message.id, None)
        return outcome

    async def _until_answered(self, failure: str, ask: Callable[[], Awaitable[R]]) -> R:
        """Ask the store until it answers: often enough to be well before those who sweep up after the dead."""
        wait = 0.1
        while True:
            try:
                return await ask()
            except StoreDamaged:
                raise
            except StoreUnavailable as error:
                logger.warning("%s: %s", failure, error)
                self._lose_contact()
                await asyncio.sleep(wait)
                wait = min(wait * 2, LEASE_SECONDS / 10)

    async def _said(self, who: Principal, run_id: str, writer: LogWriter) -> None:
        """Wait until the end is in the log. While that is away, keep the record from sweepers, who would say it too."""
        while True:
            try:
                async with asyncio.timeout(CHECKPOINT_SECONDS):
                    return await writer.flush()
            except TimeoutError:
                with contextlib.suppress(StoreUnavailable):
                    await self._store.checkpoint(who, run_id, worker=self.worker, partial=None)

    async def _forget(self, who: Principal, run_id: str) -> None:
        with contextlib.suppress(StoreUnavailable):
            await self._store.delete_record(who, run_id)

    def _lose_contact(self) -> None:
        self._lost_at = time.monotonic()

    @property
    def _in_contact(self) -> bool:
        """False until a full lease after the database last failed to answer.

        After an outage every lease has expired, and whoever lives is about to renew: nobody can be told to be dead.
        """
        return time.monotonic() - self._lost_at > LEASE_SECONDS

    async def sweep(self) -> None:
        """End the runs whose process died, or see whether the database is back for long enough to do so.

        Returns when they are ended, or after SWEEP_SECONDS: the rest goes on in the background, each organization's
        beside the others'. An organization whose answers wait long to be rendered delays no other one.
        """
        if self.draining:
            return
        if not self._in_contact:
            if not await self._store.ready():
                self._lose_contact()
            return
        for record in await self._store.take_orphans(self.worker):
            if not self.has(record.id):
                self._begin_repair(record)
        if self._repairs:
            await asyncio.wait(self._repairs, timeout=SWEEP_SECONDS)

    def _begin_repair(self, record: RunRecord) -> None:
        organization_id = record.organization_id
        if organization_id not in self._orphans:
            self._orphans[organization_id] = {}
            task = asyncio.create_task(self._repair_all(organization_id), name=f"repair runs of {organization_id}")
            self._repairs.add(task)
            task.add_done_callback(self._repairs.discard)
        self._orphans[organization_id][record.id] = record

    async def _repair_all(self, organization_id: str) -> None:
        """Repair the organization's runs; one that is taken over again meanwhile is repaired once."""
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

    async def sweep_forever(self) -> None:
        """Sweep every SWEEP_SECONDS."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            try:
                await self.sweep()
            except StoreUnavailable as error:
                logger.warning("could not sweep: %s", error)
                self._lose_contact()
            except Exception:
                logger.exception("could not sweep")

    async def heal(self, who: Principal, run_id: str) -> bool:
        """End that run if its process died; true if it did."""
        if self.has(run_id) or not self._in_contact:
            return False
        record = await self._store.take_orphan(who, run_id, self.worker)
        if record is not None:
            await self.repair(record)
        return record is not None

    async def repair(self, record: RunRecord) -> None:
        """End a run for its owner: keep what its checkpoint or the log holds, whichever is more, and say the end.

        Safe against the owner and against other repairers: whoever stores the message says the end. What a worker
        stored and died before saying is said by whoever has taken its record over.
        """
        who, thread_id = record.who, record.thread_id
        try:
            stored = await self._store.get_message(who, thread_id, record.id)
            question = await self._store.get_message(who, thread_id, (record.partial.run or {})["in_reply_to"])
        except NotFound:  # the thread is gone, or the claim never happened
            await self._store.delete_record(who, record.id)
            return
        ending = CANCELLED if record.cancelled else INTERRUPTED
        events = await self._logged(record)
        if events is None:  # nothing can be said now: the record stays, and brings a sweeper that says it
            if stored.in_progress:
                await self._end(who, record.partial, ending, lambda event: None)
            return
        writer = self._log.writer(thread_id)
        with contextlib.suppress(LogDeleted):
            if stored.in_progress:
                partial = _longer(record.partial, fold(events, onto=record.partial))
                outcome = await self._end(who, partial, ending, _with_snapshot(question, partial, writer.write))
                if outcome is not None and not outcome.won:
                    return  # the winner says it; should it die before that, the record brings a sweeper
            elif not (events and isinstance(events[-1], Terminal)):
                if record.worker != self.worker or self.has(record.id):
                    return  # its owner lives, and is about to say it
                unfinished = replace(stored, content_html="").with_run(status="in_progress", error=None)
                _with_snapshot(question, unfinished, writer.write)(terminal_event(stored))
            try:
                async with asyncio.timeout(CHECKPOINT_SECONDS):
                    await writer.flush()
            except TimeoutError:
                return
        await self._store.delete_record(who, record.id)

    async def _logged(self, record: RunRecord) -> list[Event] | None:
        """What the log holds of the run; null while the log is away."""
        try:
            return await self._log.run_events(record.thread_id, record.id, await self._log.tail(record.thread_id))
        except Gap:
            return []
        except LogUnavailable:
            return None

    async def drain(self, seconds: float) -> None:
        """Start nothing more; let runs end for that long, then keep what the others have said as interrupted.

        Answers that still wait to be rendered after that are stored as they are. Repairs are left to others.
        """
        self.draining = True
        for repair in self._repairs:
            repair.cancel()
        if self._repairs:
            await asyncio.wait(self._repairs, timeout=_STUBBORN_SECONDS)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)
        for run in list(self._runs.values()):
            run.end(INTERRUPTED)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_STUBBORN_SECONDS)
        self._hurry.set()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_STUBBORN_SECONDS)
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_STUBBORN_SECONDS)


def _longer(checkpoint: Message, logged: Message) -> Message:
    """Whichever holds more text, or with as much text more of its tool calls closed; with the files of both."""

    def extent(message: Message) -> tuple[int, int, int]:
        ended = sum(call.end_time is not None for call in message.tool_calls)
        return len(message.content), len(message.tool_calls), ended

    longer = logged if extent(logged) > extent(checkpoint) else checkpoint
    return replace(longer, attachments=max(checkpoint.attachments, logged.attachments, key=len))


def _with_snapshot(question: Message, answer: Message, write: Callable[[Event], None]) -> Callable[[Event], None]:
    """`write`, which publishes the question and a snapshot of the answer before its first event.

    A log that was lost has lost the question. What readers have of the answer can be less than what is stored, if its
    process died before it published the rest, or more, if that process is still alive or the log has evicted events
    that no checkpoint contains. So the snapshot is published in any case.
    """
    first: list[Event] = [MessageCreated(question), MessageSnapshot(answer)]

    def publish(event: Event) -> None:
        while first:
            write(first.pop(0))
        write(event)

    return publish
