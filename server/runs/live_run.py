"""One run of this process: an agent's parts become events of the thread's log, and those events become the message.

Taking a part awaits nothing: `agents/answer.py` turns the part into an event and applies it to the message, and the
event is written to the log.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

import msgspec
from msgspec.structs import replace

from agent_chat.agents import Reasoning, Text, ToolCompleted, ToolStarted
from agent_chat.agents.answer import AnswerBuilder
from agent_chat.agents.parts import InlinePart
from agent_chat.stores.contracts import EventLog, Posted
from agent_chat.stores.errors import LogDeleted
from agent_chat.stores.events import (
    Event,
    MessageCreated,
    MessageSnapshot,
    RunError,
    RunStarted,
    ToolCallCompleted,
)
from agent_chat.stores.models import (
    ACTIVITY,
    Agent,
    Attachment,
    Clock,
    JSONObject,
    Message,
    Principal,
    Status,
)


class Ending(msgspec.Struct, frozen=True):
    """How a run ends.

    Attributes:
        status: the final status of its message.
        error: why it failed; None unless it did.
        open_calls: the error of tool calls that are still open.
    """

    status: Status
    error: RunError | None = None
    open_calls: str = "The call was interrupted."


COMPLETED = Ending("completed", open_calls="The agent did not wait for this call.")
CANCELLED = Ending("cancelled", open_calls="The run was cancelled.")
INTERRUPTED = Ending(
    "failed", RunError("interrupted", "The server stopped before the answer was complete.", retryable=True)
)

CONNECTING_TO_TOOLS = "connecting_to_tools"


class LiveRun:
    """A run of this process.

    Attributes:
        id: the run's id, which is also the id of its message.
        question: the user's message that is answered.
        answer: builds the run's message.
        writer: appends the run's events to the thread's log.
        ending: how the run ends, once that is decided; None if another process ends it. See `end`.
        started_at: when the run began, in monotonic seconds.
        first_text_at: when the first text was published; None before.
        checkpoint_due: set to request a checkpoint before the interval is over: at a tool call's start and end, and
            when another process signals the run. Cleared by the checkpoint loop.
        changed: whether the message has changed since the last checkpoint that stored it.
        checkpointed_at: when the latest attempt at a checkpoint began, in monotonic seconds. After a lease without one
            the run may belong to another process.
        checkpointed: set by each checkpoint that succeeded. Cleared by `Runner._take` to wait for the next one.
        is_stored: set once the store has the finished message, or this process has given up storing it.
    """

    def __init__(self, principal: Principal, agent: Agent, posted: Posted, log: EventLog, clock: Clock) -> None:
        assert posted.answer is not None
        self.principal = principal
        self.agent = agent
        self.question = posted.message
        self.id = posted.answer.id
        self.thread_id = posted.answer.thread_id
        self.answer = AnswerBuilder(posted.answer, clock)
        self.writer = log.writer(self.thread_id, lambda: MessageSnapshot(self.message()))
        self.ending: asyncio.Future[Ending | None] = asyncio.get_running_loop().create_future()
        self.started_at = time.monotonic()
        self.first_text_at: float | None = None
        self.checkpoint_due = asyncio.Event()
        self.changed = False
        self.checkpointed_at = time.monotonic()
        self.checkpointed = asyncio.Event()
        self.is_stored = asyncio.Event()
        self._stored_calls = 0
        self._calls_stored = asyncio.Event()

    def begin(self, message: Message) -> None:
        """Publish what the claim stored: the question, and the run's empty message."""
        self.writer.write(MessageCreated(self.question))
        self.writer.write(RunStarted(message))

    def end(self, ending: Ending | None) -> None:
        """Decide how the run ends; the first decision counts. None: another process ends it and publishes that."""
        if not self.ending.done():
            self.ending.set_result(ending)

    def message(self) -> Message:
        """The message so far."""
        return self.answer.message()

    def wait_for_tools(self, waiting: bool) -> None:
        """Publish that the run waits for tool servers, or no longer does: a snapshot with that in its metadata."""
        if waiting:
            self.answer.facts[ACTIVITY] = CONNECTING_TO_TOOLS
        else:
            self.answer.facts.pop(ACTIVITY, None)
        if not self.ending.done():
            with suppress(LogDeleted):
                self.writer.write(MessageSnapshot(self.message()))

    def may_publish(self, lease: float) -> bool:
        """False once the run has ended, and after a pause of `lease` seconds: it may be another process' run by now."""
        return not self.ending.done() and time.monotonic() - self.checkpointed_at <= lease

    def take(self, part: InlinePart) -> None:
        """Publish a part. Raises: what AnswerBuilder.take raises, and LogDeleted."""
        event = self.answer.take(part)
        if event is None:
            return
        self.writer.write(event)
        if isinstance(part, Text):
            self.changed = True
            if self.first_text_at is None:
                self.first_text_at = time.monotonic()
        elif isinstance(part, Reasoning):
            self.changed = self.changed or self.answer.stores_reasoning
        elif isinstance(part, ToolStarted | ToolCompleted):
            self.changed = True
            self.checkpoint_due.set()

    def attach(self, attachment: Attachment) -> None:
        """Publish a stored file of the answer. Raises: LogDeleted."""
        self.writer.write(self.answer.attach(attachment))
        self.changed = True
        self.checkpoint_due.set()

    def publish(self, event: Event) -> None:
        """Apply an event to the message, then write it: a snapshot that the log takes instead contains it."""
        self.writer.write(self.answer.apply(event))
        self.changed = True

    async def wait_for_final_call_stored(self) -> None:
        """Wait until a checkpoint has stored the first call that must not be made twice.

        Without the wait a process that is killed after the call and before the next checkpoint would leave a run that
        looks as if no tool had been called. One such call decides: those after it need not wait.
        """
        while self.answer.first_final is not None and self._stored_calls <= self.answer.first_final:
            self._calls_stored.clear()
            await self._calls_stored.wait()

    def record_checkpoint(self, calls: int) -> None:
        """Report that the store has the message with this many tool calls."""
        self.checkpointed.set()
        self._stored_calls = max(self._stored_calls, calls)
        self._calls_stored.set()


def finish_message(partial: Message, ending: Ending, now: str) -> tuple[Message, list[ToolCallCompleted]]:
    """The finished message as it is stored, and the events that close its open tool calls."""
    closed: list[ToolCallCompleted] = []
    calls = list(partial.tool_calls)
    infos: list[JSONObject] = (partial.run or {}).get("tool_calls", [])
    for index, call in enumerate(calls):
        if call.end_time is None:
            calls[index] = replace(call, error=ending.open_calls, end_time=now)
            call_id = infos[index]["id"] if index < len(infos) else f"call_{index}"
            closed.append(ToolCallCompleted(partial.id, call_id, index, calls[index]))
    error = msgspec.to_builtins(_final_error(ending.error, partial))
    run = {name: value for name, value in (partial.run or {}).items() if name != ACTIVITY}
    message = replace(partial, tool_calls=calls, metadata={**partial.metadata, "run": run})
    message = message.with_run(status=ending.status, error=error)
    return message, closed


def _final_error(error: RunError | None, partial: Message) -> RunError | None:
    """The error, not retryable where a retry would repeat a call that is not known to be repeatable.

    Calls that are known from the log alone count as not repeatable: only the run's record states that they are.
    """
    infos: list[JSONObject] = (partial.run or {}).get("tool_calls", [])
    repeatable = sum(info.get("repeatable") is True for info in infos[: len(partial.tool_calls)])
    if error is None or repeatable == len(partial.tool_calls):
        return error
    return replace(error, retryable=False, retry_after=None)
