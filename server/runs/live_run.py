"""One run: an agent's parts become events of the thread's log, and those events become the message.

The deciding half of the runner, without a single await: `LiveRun.take` turns a part into an event, applies it to the
fold and writes it. Whoever reads the log with the same fold gets the same message.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

import msgspec
from msgspec.structs import replace

from agent_chat.agents import Ended, Part, Reasoning, Text, ToolCompleted, ToolProgress, ToolStarted
from agent_chat.agents.rounds import separator
from agent_chat.stores.contracts import EventLog, Posted
from agent_chat.stores.errors import LogDeleted
from agent_chat.stores.events import (
    Event,
    MessageCreated,
    MessageDelta,
    MessageSnapshot,
    ReasoningDelta,
    RunError,
    RunStarted,
    ToolCallCompleted,
    ToolCallProgress,
    ToolCallStarted,
)
from agent_chat.stores.fold import Fold
from agent_chat.stores.models import (
    ACTIVITY,
    MESSAGE_BYTES,
    NESTING,
    Agent,
    Clock,
    JSONObject,
    Message,
    Principal,
    Status,
    depth,
    timestamp,
)
from agent_chat.stores.text import without_surrogates


class Ending(msgspec.Struct, frozen=True):
    """How a run ends: its status, why if it failed, and what its open tool calls get as their error."""

    status: Status
    error: RunError | None = None
    open_calls: str = "The call was interrupted."


COMPLETED = Ending("completed", open_calls="The agent did not wait for this call.")
CANCELLED = Ending("cancelled", open_calls="The run was cancelled.")
INTERRUPTED = Ending(
    "failed", RunError("interrupted", "The server stopped before the answer was complete.", retryable=True)
)


CONNECTING_TO_TOOLS = "connecting_to_tools"


class TooLong(Exception):
    """The message has grown past what one message may take."""


class LiveRun:
    """A run of this process."""

    def __init__(self, who: Principal, agent: Agent, posted: Posted, log: EventLog, clock: Clock) -> None:
        assert posted.answer is not None
        self.who = who
        self.agent = agent
        self.question = posted.message
        self.id = posted.answer.id
        self.thread_id = posted.answer.thread_id
        self.fold = Fold(posted.answer)
        self.writer = log.writer(self.thread_id, lambda: MessageSnapshot(self.message()))
        self.ending: asyncio.Future[Ending | None] = asyncio.get_running_loop().create_future()
        self.started_at = time.monotonic()
        self.first_text_at: float | None = None
        self.look = asyncio.Event()
        self.stored = asyncio.Event()
        self.changed = False
        self.looked = asyncio.Event()
        self.looked_at = time.monotonic()
        self._clock = clock
        self._calls: list[JSONObject] = []
        self._first_final: int | None = None
        self._stored_calls = 0
        self._calls_stored = asyncio.Event()
        self._reasoned = 0
        self._size = 0
        self._facts: JSONObject = {}

    def begin(self, answer: Message) -> None:
        """Say what the claim stored."""
        self.writer.write(MessageCreated(self.question))
        self.writer.write(RunStarted(answer))

    def end(self, ending: Ending | None) -> None:
        """Settle how the run ends; the first word counts. Null: somebody else ends it, this process says nothing."""
        if not self.ending.done():
            self.ending.set_result(ending)

    def message(self) -> Message:
        """The message as far as it has come."""
        return self.fold.message().with_run(tool_calls=list(self._calls), **self._facts)

    def wait_for_tools(self, waiting: bool) -> None:
        """Publish that the run waits for tool servers, or no longer does: as a snapshot with that in its metadata."""
        if waiting:
            self._facts[ACTIVITY] = CONNECTING_TO_TOOLS
        else:
            self._facts.pop(ACTIVITY, None)
        if not self.ending.done():
            with suppress(LogDeleted):
                self.writer.write(MessageSnapshot(self.message()))

    def take(self, part: Part) -> None:
        """Turn one part into an event, keep it, say it. Raises: TooLong, LogDeleted, and ValueError on nonsense."""
        match part:
            case Text(text=text):
                if text:
                    if self.first_text_at is None:
                        self.first_text_at = time.monotonic()
                    text = self._separator() + _clean(text)
                    self._grow(len(text.encode()))
                    self.publish(MessageDelta(self.id, self.fold.length, text))
            case Reasoning(text=text):
                if text:
                    text = _clean(text)
                    self.writer.write(ReasoningDelta(self.id, self._reasoned, text))
                    self._reasoned += len(text)
            case ToolStarted() | ToolProgress() | ToolCompleted():
                self._take_tool_part(part)
            case Ended():
                self._facts |= {
                    name: value for name, value in msgspec.structs.asdict(part).items() if value is not None
                }

    def _take_tool_part(self, part: ToolStarted | ToolProgress | ToolCompleted) -> None:
        if not isinstance(part, ToolProgress):
            part = _shallow(part)
            self._grow(len(msgspec.json.encode(part)))
        index = self._index(part.id)
        match part:
            case ToolStarted():
                if index is not None:
                    raise ValueError(f"tool call {part.id!r} was started twice")
                call_info: JSONObject = {"id": part.id, "round": part.round, "offset": self.fold.length}
                index = len(self.fold.tool_calls)
                if part.repeatable:
                    call_info["repeatable"] = True
                elif self._first_final is None:
                    self._first_final = index
                self._calls.append(call_info)
                self.publish(ToolCallStarted(self.id, index, part.tool_name, part.arguments, timestamp(self._clock())))
                self.look.set()
            case ToolProgress() if index is not None:
                self.writer.write(ToolCallProgress(self.id, index, part.progress, part.total, part.message))
            case ToolCompleted() if index is not None:
                call = self.fold.tool_calls[index]
                call = replace(call, result=part.result, error=part.error, end_time=timestamp(self._clock()))
                self.publish(ToolCallCompleted(self.id, index, call))
                self.look.set()
            case _:
                raise ValueError(f"tool call {part.id!r} was never started")

    def publish(self, event: Event) -> None:
        """Apply an event to the message, then write it: a snapshot that the log takes instead contains it."""
        self.fold.apply(event)
        self.writer.write(event)
        self.changed = True

    async def final_call_stored(self) -> None:
        """Wait until a checkpoint has stored the first call that must not be made twice.

        Without the wait a process that is killed after the call and before the next checkpoint would leave a run that
        looks as if no tool had been called. One such call decides: those after it need not wait.
        """
        while self._first_final is not None and self._stored_calls <= self._first_final:
            self._calls_stored.clear()
            await self._calls_stored.wait()

    def checkpointed(self, calls: int) -> None:
        """Report that the store has the message with this many tool calls."""
        self._stored_calls = max(self._stored_calls, calls)
        self._calls_stored.set()

    def _separator(self) -> str:
        """What to put before text: a blank line where the text follows a tool call."""
        if not self._calls or self._calls[-1]["offset"] < self.fold.length:
            return ""
        return separator(self.fold.message().content)

    def _index(self, call_id: str) -> int | None:
        return next((index for index, call in enumerate(self._calls) if call["id"] == call_id), None)

    def _grow(self, size: int) -> None:
        self._size += size
        if self._size > MESSAGE_BYTES:
            raise TooLong


def _clean(text: str) -> str:
    """The same text without lone surrogates, which JSON cannot carry."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return without_surrogates(text)
    return text


def _shallow(part: ToolStarted | ToolCompleted) -> ToolStarted | ToolCompleted:
    """The same part; arguments or a result that no store could read back, for they nest too deep, become words."""
    match part:
        case ToolStarted() if depth(part.arguments) > NESTING:
            return msgspec.structs.replace(part, arguments={"unreadable": f"Nested deeper than {NESTING} levels."})
        case ToolCompleted(result=result) if result is not None and depth(result) > NESTING:
            return ToolCompleted(part.id, error=f"The result was nested deeper than {NESTING} levels.")
    return part


def finished(partial: Message, ending: Ending, now: str) -> tuple[Message, list[ToolCallCompleted]]:
    """The message as it is kept, and the events that close its open tool calls."""
    closed: list[ToolCallCompleted] = []
    calls = list(partial.tool_calls)
    for index, call in enumerate(calls):
        if call.end_time is None:
            calls[index] = replace(call, error=ending.open_calls, end_time=now)
            closed.append(ToolCallCompleted(partial.id, index, calls[index]))
    error = msgspec.to_builtins(_final(ending.error, partial))
    run = {name: value for name, value in (partial.run or {}).items() if name != ACTIVITY}
    message = replace(partial, tool_calls=calls, metadata={**partial.metadata, "run": run})
    message = message.with_run(status=ending.status, error=error)
    return message, closed


def _final(error: RunError | None, partial: Message) -> RunError | None:
    """The error, not retryable where a retry would make a call again that is not known to be repeatable.

    Calls that are known from the log alone count as not repeatable: only the run's record says that they are.
    """
    infos: list[JSONObject] = (partial.run or {}).get("tool_calls", [])
    repeatable = sum(info.get("repeatable") is True for info in infos[: len(partial.tool_calls)])
    if error is None or repeatable == len(partial.tool_calls):
        return error
    return replace(error, retryable=False, retry_after=None)
