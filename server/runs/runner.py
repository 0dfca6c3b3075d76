"""The runs of this process.

A run belongs to no request: it starts when its thread has been claimed, and ends when its agent has finished, when it
is cancelled, at its time limit, or with the process. Its message is stored before its terminal event is published, and
only the process that stored it publishes it. Its record is deleted last, so that a crash at any point leaves something
for the repair (runs/repair.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator

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
from agent_chat.server.inputs import FILES
from agent_chat.server.limits import Slot
from agent_chat.server.log_lines import RUN_ID, THREAD_ID
from agent_chat.server.loop_share import begin_streaming, measured
from agent_chat.server.runs.contact import StoreContact
from agent_chat.server.runs.finisher import Charge, Finisher, Render
from agent_chat.server.runs.live_run import CANCELLED, COMPLETED, INTERRUPTED, Ending, LiveRun
from agent_chat.server.runs.repair import Repairer
from agent_chat.server.statistics import RunStatistics
from agent_chat.server.timing import Timing
from agent_chat.stores.contracts import EventLog, Posted, Store
from agent_chat.stores.errors import BlobUnavailable, LogDeleted, LogUnavailable, StoreUnavailable, ThreadNotFound
from agent_chat.stores.events import RunError
from agent_chat.stores.models import Agent, Attachment, Clock, Message, Principal, new_answer, new_id, utcnow

logger = logging.getLogger(__name__)

HISTORY = 100
"""How many of a thread's latest messages an agent is given; fewer where they would exceed READ_BYTES."""
_PARTS_PER_TURN = 64
"""After so many parts other tasks get a turn: an agent whose parts are ready would never suspend."""

MakeToolbox = Callable[[Agent, Principal, Callable[[bool], None]], Toolbox]
StoreFile = Callable[[Principal, str, File], Awaitable[Attachment]]


async def _store_no_file(principal: Principal, thread_id: str, file: File) -> Attachment:
    raise AgentError("This server stores no files of agents.")


class Runner:
    """Starts and ends the runs of this process.

    Args:
        toolbox: makes the tools of an agent for one run of a principal. Its last argument is called with True while the
            run waits for tool servers, then with False.
        render: renders an organization's Markdown to sanitized HTML.
        files: gives access to the attachments of a thread.
        store_file: stores a file of an answer in its thread. Raises: AgentError if the file cannot be stored.
        permitted: the agent within the operator's limits on models. Raises: AgentError for a model that is not allowed.
        charge: counts the bytes of an answer that was stored.
        keep_reasoning: whether the reasoning of new runs is stored with their messages.
        run_seconds: how long a run may take.

    Attributes:
        worker: the id under which this process holds leases.
        draining: True from the begin of a drain on: no more runs are started.
        started: how many runs this process has started.
        repairer: ends the runs of other processes that died.
    """

    def __init__(
        self,
        store: Store,
        log: EventLog,
        registry: Registry,
        toolbox: MakeToolbox,
        render: Render,
        *,
        files: Callable[[Principal, str], Files] = lambda principal, thread_id: NoFiles(),
        store_file: StoreFile = _store_no_file,
        permitted: Callable[[Agent], Agent] = lambda agent: agent,
        charge: Charge = lambda organization_id, count: None,
        keep_reasoning: bool = True,
        run_seconds: float = 600.0,
        timing: Timing = Timing(),
        clock: Clock = utcnow,
    ) -> None:
        self.worker = new_id()
        self.draining = False
        self.started = 0
        self._store = store
        self._log = log
        self._registry = registry
        self._toolbox = toolbox
        self._files = files
        self._store_file = store_file
        self._permitted = permitted
        self._keep_reasoning = keep_reasoning
        self._run_seconds = run_seconds
        self._timing = timing
        self._clock = clock
        self._runs: dict[str, LiveRun] = {}
        """The runs from `start` until their record is deleted or left to a sweeper."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._contact = StoreContact(timing)
        self._finisher = Finisher(
            store, self._contact, self.worker, render=render, charge=charge, timing=timing, clock=clock
        )
        self.repairer = Repairer(store, log, self._finisher, self._contact, self.worker, self.has, timing)
        log.on_signal(self._request_checkpoint)

    @property
    def count(self) -> int:
        """How many runs this process has now."""
        return len(self._runs)

    @property
    def statistics(self) -> RunStatistics:
        """What the runs that this process finished came to."""
        return self._finisher.statistics

    def has(self, run_id: str) -> bool:
        """Whether this process has the run."""
        return run_id in self._runs

    def unstored_seconds(self, run_id: str) -> float:
        """How long this process has been trying to store that run's finished message; 0 if it is not trying."""
        return self._finisher.unstored_seconds(run_id)

    async def wait_until_stored(self, run_id: str, seconds: float) -> None:
        """Wait, at most `seconds`, until the store has the message of that run, if it is one of this process."""
        if run := self._runs.get(run_id):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await run.is_stored.wait()

    def new_answer(self, question: Message, agent: Agent) -> Message:
        """Build the empty message of a run that answers `question`."""
        thread_id, created_at = question.thread_id, question.created_at
        return new_answer(thread_id, question.id, agent.model, created_at, store_reasoning=self._keep_reasoning)

    def start(self, principal: Principal, agent: Agent, posted: Posted, slot: Slot) -> None:
        """Start the run that `posted` has claimed, in a task of its own.

        `slot` is released when the agent has ended, though the message may still have to be stored and published.
        """
        run = LiveRun(principal, agent, posted, self._log, self._clock)
        self._runs[run.id] = run
        run.ending.add_done_callback(lambda _: slot.release())
        self.started += 1
        if self.draining:
            run.end(INTERRUPTED)
        task = asyncio.create_task(measured(self._run, run, run.message()), name=f"run {run.id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: slot.release())  # a run that fails unexpectedly has no ending

    def prepare(
        self,
        principal: Principal,
        agent: Agent,
        run_id: str,
        messages: list[Message],
        *,
        earlier: bool = False,
        live: LiveRun | None = None,
    ) -> Run:
        """Build what an agent is given.

        Args:
            messages: the history, oldest first.
            earlier: whether the thread has older messages than these.
            live: the run in which tools publish their calls; None where calls are not published, as for a title.

        Raises: AgentError if the agent's model is not allowed (any more).
        """
        agent = self._permitted(agent)
        thread_id = messages[-1].thread_id if messages else ""
        if live is None:
            tools = RunTools(self._toolbox(agent, principal, lambda is_waiting: None))
        else:
            tools = RunTools(
                self._toolbox(agent, principal, live.wait_for_tools), lambda part: self._publish_from_tool(live, part)
            )
        return Run(run_id, principal, agent, messages, tools, earlier, self._files(principal, thread_id))

    async def drain(self, seconds: float) -> None:
        """Start no more runs; let the present ones end for `seconds`, then store the others as interrupted.

        Answers that still wait to be rendered after that are stored as plain text. Repairs are left to other processes.
        """
        self.draining = True
        await self.repairer.close()
        await self._wait_for_tasks(seconds)
        for run in list(self._runs.values()):
            run.end(INTERRUPTED)
        await self._wait_for_tasks(self._timing.agent_stop)
        self._finisher.hurry()
        await self._wait_for_tasks(self._timing.agent_stop)
        for task in list(self._tasks):
            task.cancel()
        await self._wait_for_tasks(self._timing.agent_stop)

    async def _wait_for_tasks(self, seconds: float) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)

    def _request_checkpoint(self, run_id: str) -> None:
        """Learn without delay what another process has stored about the run, such as its cancellation."""
        if run := self._runs.get(run_id):
            run.checkpoint_due.set()

    async def _run(self, run: LiveRun, message: Message) -> None:
        """Everything from the run's first event to the deletion of its record."""
        RUN_ID.set(run.id)
        THREAD_ID.set(run.thread_id)
        finished: Message | None = None
        try:
            run.begin(message)
            ending = await self._generate_until_ended(run)
            if ending is not None:
                if run.first_text_at is not None:
                    self.statistics.first_text.add(run.first_text_at - run.started_at)
                outcome = await self._finisher.finish(run.principal, run.message(), ending, run.publish)
                run.is_stored.set()
                if outcome is None or outcome.won:
                    finished = outcome.message if outcome else run.message().with_run(status=ending.status)
                    await self._finisher.flush_terminal(run.principal, run.id, run.writer)
                    await self._finisher.delete_record(run.principal, run.agent.id, finished)
            elif await self._is_deleted(run):
                await self._finisher.delete_record(run.principal, run.agent.id, _cancelled(run))
        except LogDeleted:
            await self._finisher.delete_record(run.principal, run.agent.id, finished or _cancelled(run))
        except LogUnavailable as error:
            logger.warning("run %s is stored; a sweeper will publish its terminal event: %s", run.id, error)
        except Exception:
            logger.exception("run %s failed unexpectedly; a sweeper will end it", run.id)
        finally:
            run.is_stored.set()
            del self._runs[run.id]

    async def _is_deleted(self, run: LiveRun) -> bool:
        """Whether a run that another process ended, or that was deleted with its thread, is the latter."""
        with contextlib.suppress(StoreUnavailable):
            try:
                await self._store.get(run.principal, run.thread_id, message_limit=0)
            except ThreadNotFound:
                return True
        return False

    async def _generate_until_ended(self, run: LiveRun) -> Ending | None:
        """Let the agent generate until the run's ending is decided, at most `run_seconds`."""
        generating = asyncio.create_task(measured(self._generate, run))
        checkpointing = asyncio.create_task(measured(self._checkpoint, run))
        try:
            done, _ = await asyncio.wait({run.ending}, timeout=self._run_seconds)
            if not done:
                detail = f"The answer took longer than {self._run_seconds:g} seconds."
                run.end(Ending("failed", RunError("agent_timeout", detail, retryable=True)))
            return run.ending.result()
        finally:
            checkpointing.cancel()
            generating.cancel()
            _, still_running = await asyncio.wait({generating, checkpointing}, timeout=self._timing.agent_stop)
            if still_running:
                logger.error("run %s: its agent did not stop when it was cancelled", run.id)

    async def _generate(self, run: LiveRun) -> None:
        """Publish what the agent yields, to its end."""
        with self._end_on_failure(run):
            prepared = await self._prepare_live(run)
            parts = self._registry.kind(run.agent.kind).reply(prepared)
            try:
                count = 0
                async for part in parts:
                    if isinstance(part, Text) and run.may_publish(self._timing.lease):
                        run.take(part)  # most parts: without a coroutine for each
                    else:
                        await self._take(run, part)
                    if (count := count + 1) % _PARTS_PER_TURN == 0:
                        begin_streaming()
                        await asyncio.sleep(0)
            finally:
                try:
                    if isinstance(parts, AsyncGenerator):
                        await parts.aclose()
                finally:
                    await prepared.tools.close()
            run.end(COMPLETED)

    async def _prepare_live(self, run: LiveRun) -> Run:
        """Read the history up to the question, though newer messages may exist: the run may be a retry."""
        question = run.question
        stored = await self._contact.retry(
            f"the history of run {run.id} could not be read yet",
            lambda: self._store.list_messages(run.principal, run.thread_id, before=question.id, limit=HISTORY),
        )
        before = stored.messages[-(HISTORY - 1) :]
        earlier = stored.cut or len(stored.messages) > len(before)
        return self.prepare(run.principal, run.agent, run.id, [*before, question], earlier=earlier, live=run)

    async def _take(self, run: LiveRun, part: Part) -> None:
        """Publish one part. Raises: CancelledError if the run has ended, and what LiveRun.take raises."""
        if time.monotonic() - run.checkpointed_at > self._timing.lease:
            # the process was paused for a lease: the run may belong to another process by now
            run.checkpointed.clear()
            await run.checkpointed.wait()
        if run.ending.done():  # the agent goes on although it was cancelled
            raise asyncio.CancelledError("the run has ended")
        if isinstance(part, File):
            return await self._attach(run, part)
        run.take(part)
        if isinstance(part, ToolStarted):
            await run.wait_for_final_call_stored()

    async def _attach(self, run: LiveRun, file: File) -> None:
        """Store a file of the answer, then publish it."""
        if len(run.message().attachments) >= FILES:
            raise AgentError(f"An answer may have at most {FILES} files.")
        attachment = await self._store_file(run.principal, run.thread_id, file)
        if not run.ending.done():  # else the file stays in the thread, without a message
            run.attach(attachment)

    async def _publish_from_tool(self, run: LiveRun, part: ToolPart) -> None:
        """Publish a part of a call that the agent's framework makes while the generator waits.

        A failure ends the run as if the generator had yielded the part, though the framework may suppress it.

        Raises: CancelledError if the run has ended.
        """
        with self._end_on_failure(run):
            await self._take(run, part)
            return
        raise asyncio.CancelledError("the run has ended")

    @contextlib.contextmanager
    def _end_on_failure(self, run: LiveRun) -> Iterator[None]:
        """End the run according to what the block raises, and suppress that."""
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
            logger.exception("run %s: its agent failed unexpectedly", run.id)
            run.end(Ending("failed", RunError("agent_failed", "The agent failed.", retryable=False)))

    async def _checkpoint(self, run: LiveRun) -> None:
        """Checkpoint at each interval and whenever one is due, until the store answers that the run must end."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._timing.checkpoint):
                    await run.checkpoint_due.wait()
            run.checkpoint_due.clear()
            partial = run.message() if run.changed else None
            calls = run.answer.tool_call_count
            run.changed = False
            began = time.monotonic()  # the lease counts from here: the process may be paused before the answer arrives
            try:
                lease = await self._store.checkpoint(run.principal, run.id, worker=self.worker, partial=partial)
            except StoreUnavailable as error:
                logger.warning("run %s could not be checkpointed: %s", run.id, error)
                self._contact.lose()
                run.changed = run.changed or partial is not None
                continue
            finally:
                run.checkpointed_at = began
            run.record_checkpoint(calls)
            if lease != "held":
                run.end(CANCELLED if lease == "cancelled" else None)
                return


def _cancelled(run: LiveRun) -> Message:
    """The message of a run whose thread was deleted: what it consumed counts all the same."""
    return run.message().with_run(status="cancelled")
