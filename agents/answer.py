"""The message that a run generates: parts become events, and events become the message.

The server publishes the events; `agent_chat.agents.testing` uses the same class without a server. Every reader that
folds the published events gets the same message (stores/fold.py).
"""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from agent_chat.agents.parts import (
    Ended,
    InlinePart,
    Reasoning,
    Text,
    ToolCompleted,
    ToolPart,
    ToolProgress,
    ToolStarted,
)
from agent_chat.agents.rounds import separator
from agent_chat.stores.events import (
    Event,
    MessageDelta,
    MessageSnapshot,
    ReasoningDelta,
    ToolCallCompleted,
    ToolCallProgress,
    ToolCallStarted,
)
from agent_chat.stores.fold import Fold
from agent_chat.stores.models import (
    MESSAGE_BYTES,
    NESTING,
    REASONING_BYTES,
    Attachment,
    Clock,
    JSONObject,
    Message,
    depth,
    new_id,
    timestamp,
)
from agent_chat.stores.text import without_surrogates

REASONING_CUT = "\n\n[The rest of the reasoning is left out.]"
"""What stored reasoning ends with where it exceeds its bound."""


class TooLong(Exception):
    """The message exceeds MESSAGE_BYTES."""


class AnswerBuilder:
    """Builds one run's message.

    Args:
        message: the run's message as it was claimed: empty, in progress.

    Attributes:
        facts: what is known about the run besides its tool calls; part of `metadata["run"]`.
        first_final: the index of the first tool call that is not repeatable; None if there is none.
    """

    def __init__(self, message: Message, clock: Clock) -> None:
        self.facts: JSONObject = {}
        self.first_final: int | None = None
        self._id = message.id
        self._fold = Fold(message)
        self._clock = clock
        self._calls: list[JSONObject] = []
        self._unnamed: int | None = None
        self._block = (-1, -1, -1)
        self._block_length = 0
        self._reasoning_size = 0
        self._size = 0

    @property
    def stores_reasoning(self) -> bool:
        """Whether reasoning becomes part of the message."""
        return self._fold.reasoning is not None

    @property
    def tool_call_count(self) -> int:
        """How many tool calls the answer has."""
        return len(self._fold.tool_calls)

    def message(self) -> Message:
        """The message so far."""
        return self._fold.message().with_run(tool_calls=list(self._calls), **self.facts)

    def take(self, part: InlinePart) -> Event | None:
        """Add a part. Returns the event to publish; None if the part is empty or adds facts only.

        Raises:
            TooLong: the message would exceed its bound.
            TypeError: this is not a part.
            ValueError: a tool call is started twice, or is not started.
        """
        match part:
            case Text(text=text):
                if not text:
                    return None
                text = self._separator() + _without_lone_surrogates(text)
                self._grow(len(text.encode()))
                delta = MessageDelta(self._id, self._fold.length, text)
                self._fold.apply(delta)
                return delta
            case Reasoning(text=text):
                if not text:
                    return None
                return self._take_reasoning(_without_lone_surrogates(text))
            case ToolStarted() | ToolProgress() | ToolCompleted():
                return self._take_tool_part(part)
            case Ended():
                known = {name: value for name, value in msgspec.structs.asdict(part).items() if value is not None}
                self.facts |= known
                return None
            case _:
                raise TypeError(f"an agent must yield parts, not {part!r:.200}")

    def attach(self, attachment: Attachment) -> MessageSnapshot:
        """Add a stored file. Returns the event to publish: a snapshot, since no other event has attachments."""
        message = self._fold.message()
        self.apply(MessageSnapshot(replace(message, attachments=[*message.attachments, attachment])))
        return MessageSnapshot(self.message())

    def apply(self, event: Event) -> Event:
        """Apply an event that is about to be published; the same event."""
        self._fold.apply(event)
        return event

    def _take_reasoning(self, text: str) -> ReasoningDelta | None:
        """A block of reasoning ends with the next text or the next call. Returns None beyond the bound."""
        if self.stores_reasoning and not (text := self._within_bound(text)):
            return None
        index, *place = self._block
        if place != [self._fold.length, len(self._calls)]:
            self._block = (index + 1, self._fold.length, len(self._calls))
            self._block_length = 0
        index, after, _ = self._block
        delta = ReasoningDelta(self._id, index, after, self._block_length, text)
        self._block_length += len(text)
        self._fold.apply(delta)
        return delta

    def _within_bound(self, text: str) -> str:
        """The text, cut and marked where the reasoning exceeds its bound; "" after that."""
        encoded = text.encode()
        room = REASONING_BYTES - self._reasoning_size
        self._reasoning_size += len(encoded)
        if room < 0:
            return ""
        if len(encoded) > room:
            text = encoded[:room].decode(errors="ignore") + REASONING_CUT
        self._grow(len(text.encode()))
        return text

    def _take_tool_part(self, part: ToolPart) -> Event:
        if not isinstance(part, ToolProgress):
            part = _bounded(part)
            self._grow(len(msgspec.json.encode(part)))
        index = self._index(part.id)
        match part:
            case ToolStarted():
                if index is not None and part.id:
                    raise ValueError(f"tool call {part.id!r} was started twice")
                return self._start_call(part)
            case ToolProgress() if index is not None:
                return ToolCallProgress(
                    self._id, self._calls[index]["id"], index, part.progress, part.total, part.message
                )
            case ToolCompleted() if index is not None:
                call = self._fold.tool_calls[index]
                call = replace(call, result=part.result, error=part.error, end_time=timestamp(self._clock()))
                return self.apply(ToolCallCompleted(self._id, self._calls[index]["id"], index, call))
            case _:
                raise ValueError(f"tool call {part.id!r} was never started")

    def _start_call(self, part: ToolStarted) -> Event:
        index = len(self._calls)
        if not part.id:
            self._unnamed = index
        call_id = part.id or new_id()
        call: JSONObject = {"id": call_id, "round": part.round, "offset": self._fold.length}
        if part.repeatable:
            call["repeatable"] = True
        elif self.first_final is None:
            self.first_final = index
        self._calls.append(call)
        now = timestamp(self._clock())
        return self.apply(ToolCallStarted(self._id, call_id, index, part.tool_name, part.arguments, now))

    def _separator(self) -> str:
        """What to insert before text: a blank line where the text follows a tool call."""
        if not self._calls or self._calls[-1]["offset"] < self._fold.length:
            return ""
        return separator(self._fold.message().content)

    def _index(self, call_id: str) -> int | None:
        if not call_id:
            return self._unnamed
        return next((index for index, call in enumerate(self._calls) if call["id"] == call_id), None)

    def _grow(self, size: int) -> None:
        self._size += size
        if self._size > MESSAGE_BYTES:
            raise TooLong


def _without_lone_surrogates(text: str) -> str:
    """The same text without lone surrogates, which JSON cannot carry."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return without_surrogates(text)
    return text


def _bounded(part: ToolStarted | ToolCompleted) -> ToolStarted | ToolCompleted:
    """The same part; arguments or a result that nest too deep for a store to read back are replaced by a sentence."""
    match part:
        case ToolStarted() if depth(part.arguments) > NESTING:
            return replace(part, arguments={"unreadable": f"Nested deeper than {NESTING} levels."})
        case ToolCompleted(result=result) if result is not None and depth(result) > NESTING:
            return ToolCompleted(part.id, error=f"The result was nested deeper than {NESTING} levels.")
    return part
