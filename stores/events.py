"""Every event of a thread's log, in the form that clients get.

An event is encoded when it is appended, and its readers get those bytes (I20). The names and the fields are the API's:
adding one is a change of the API. What the rest of the server has to know of a kind of event are attributes of its
class; nothing else lists event names.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import ClassVar, get_args

import msgspec

from agent_chat.stores.models import Id, JSONObject, Message, Thread, Timestamp, ToolCall


class RunError(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a run failed, in words for a client. `retry_after` is in seconds, and absent where it is unknown."""

    code: str
    detail: str
    retryable: bool
    retry_after: float | None = None


class _Event(msgspec.Struct, frozen=True):
    """What holds for all events of a class.

    Attributes:
        about_run: it belongs to a run, whose id is the id of the message that it is about.
        whole_message: it contains the run's whole message, so that no earlier event of the run is needed.
        superseded_by_snapshot: a later message.snapshot of the message contains it.
        terminal: it is the last event of its run.
        turn: it begins or ends the turn of a user message.
        closes_log: nothing is appended after it (I17).
    """

    about_run: ClassVar[bool] = False
    whole_message: ClassVar[bool] = False
    superseded_by_snapshot: ClassVar[bool] = False
    terminal: ClassVar[bool] = False
    turn: ClassVar[bool] = False
    closes_log: ClassVar[bool] = False


class MessageEvent(_Event, frozen=True):
    """An event that contains a message."""

    message: Message


class PartEvent(_Event, frozen=True):
    """An event that contains a part of a run's message."""

    about_run = True
    superseded_by_snapshot = True

    message_id: Id


class TerminalEvent(MessageEvent, frozen=True):
    """The last event of a run, with its message as stored (I21)."""

    about_run = True
    whole_message = True
    terminal = True
    turn = True


class MessageCreated(MessageEvent, frozen=True, tag="message.created"):
    """A message was stored. A user message may start a run."""

    turn = True


class RunStarted(MessageEvent, frozen=True, tag="run.started"):
    """The run's message: the assistant's, empty, in progress."""

    about_run = True
    whole_message = True
    turn = True


class MessageDelta(PartEvent, frozen=True, tag="message.delta"):
    """More text. `offset` is the number of characters (Unicode code points) of the message before `text`."""

    offset: int
    text: str


class ReasoningDelta(PartEvent, frozen=True, tag="reasoning.delta"):
    """More text of the message's block of reasoning number `index`.

    A block stands after the first `after` characters of the message's text, and after the tool calls that were started
    before it. `offset` is the number of characters of the block before `text`. The message stores it if its
    `metadata.run` has `reasoning`.
    """

    index: int
    after: int
    offset: int
    text: str


class ToolCallStarted(PartEvent, frozen=True, tag="tool_call.started"):
    """The message's tool call number `index` was started. `id` is unique within the message."""

    id: str
    index: int
    tool_name: str
    arguments: JSONObject
    start_time: Timestamp


class ToolCallProgress(PartEvent, frozen=True, tag="tool_call.progress"):
    """The progress that a tool reports, which is shown but not stored. `total` and `message` may be unknown."""

    id: str
    index: int
    progress: float
    total: float | None
    message: str | None


class ToolCallCompleted(PartEvent, frozen=True, tag="tool_call.completed"):
    """The message's tool call number `index`, with its result or error."""

    id: str
    index: int
    tool_call: ToolCall


class MessageSnapshot(MessageEvent, frozen=True, tag="message.snapshot"):
    """A run's whole message: in place of parts that a lost log did not get, and when the answer gets a file."""

    about_run = True
    whole_message = True
    superseded_by_snapshot = True


class RunCompleted(TerminalEvent, frozen=True, tag="run.completed"):
    """The run is complete."""


class RunFailed(TerminalEvent, frozen=True, tag="run.failed"):
    """The run failed; its message contains what there was until then."""

    error: RunError


class RunCancelled(TerminalEvent, frozen=True, tag="run.cancelled"):
    """The run was cancelled; its message contains what there was until then."""


class ThreadUpdated(_Event, frozen=True, tag="thread.updated"):
    """The thread without its messages (`messages: []`)."""

    thread: Thread


class ThreadDeleted(_Event, frozen=True, tag="thread.deleted"):
    """The thread was deleted."""

    closes_log = True

    thread_id: Id


class ThreadSnapshot(_Event, frozen=True, tag="thread.snapshot"):
    """The thread with its latest 50 messages; made for one reader, never in the log."""

    thread: Thread


class LogOpened(_Event, frozen=True, tag="log.opened"):
    """The hidden first entry of a log, so that an empty log has a position. No client gets it."""


Delta = MessageDelta | ReasoningDelta
Terminal = RunCompleted | RunFailed | RunCancelled
Fact = MessageCreated | ThreadUpdated | ThreadDeleted
"""What a write that starts no run publishes: the outbox holds these until they are in the log (I8)."""

Event = (
    MessageCreated
    | RunStarted
    | MessageDelta
    | ReasoningDelta
    | ToolCallStarted
    | ToolCallProgress
    | ToolCallCompleted
    | MessageSnapshot
    | RunCompleted
    | RunFailed
    | RunCancelled
    | ThreadUpdated
    | ThreadDeleted
    | ThreadSnapshot
    | LogOpened
)


def type_name(event: type[_Event]) -> str:
    """Return the `type` under which events of this class are encoded."""
    return str(event.__struct_config__.tag)


EVENT_CLASSES: tuple[type[_Event], ...] = get_args(Event)
TERMINAL_TYPES = frozenset(type_name(event) for event in EVENT_CLASSES if event.terminal)
TURN_TYPES = frozenset(type_name(event) for event in EVENT_CLASSES if event.turn)
RUN_TYPES = frozenset(type_name(event) for event in EVENT_CLASSES if event.about_run)
WHOLE_TYPES = frozenset(type_name(event) for event in EVENT_CLASSES if event.whole_message)
CLOSING_TYPES = frozenset(type_name(event) for event in EVENT_CLASSES if event.closes_log)

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)
_type_start = len(b'{"type":"')
_types = {type_name(event).encode(): type_name(event) for event in EVENT_CLASSES}


def encode(event: Event) -> bytes:
    """Encode the event as JSON, its `type` first."""
    return _encoder.encode(event)


def decode(data: bytes) -> Event:
    """Decode what `encode` returned, in this version or an earlier one: logs in Redis survive an upgrade."""
    try:
        return _decoder.decode(data)
    except msgspec.ValidationError:
        event: Event = msgspec.convert(_with_later_fields(msgspec.json.decode(data)), Event)
        return event


def _with_later_fields(fields: JSONObject) -> JSONObject:
    """Add the fields that events of version 0.1.0 do not have. Messages of that version store no reasoning."""
    match fields.get("type", "").partition("."):
        case ("tool_call", *_):
            return {"id": f"call_{fields.get('index')}", **fields}
        case ("reasoning", *_):
            return {"index": 0, "after": 0, **fields}
    return fields


def type_of(data: bytes) -> str:
    """Return the type of an encoded event without decoding it. Equal types are the same object."""
    name = data[_type_start : data.index(b'"', _type_start)]
    return _types.get(name) or sys.intern(name.decode())


def message_id_of(event: Event) -> str | None:
    """Return the id of the message that the event is about; None for events about the thread."""
    if isinstance(event, PartEvent):
        return event.message_id
    return event.message.id if isinstance(event, MessageEvent) else None


def run_id_of(event: Event) -> str | None:
    """Return the id of the run that the event belongs to, or None."""
    return message_id_of(event) if event.about_run else None


def fact_id(fact: Fact) -> str:
    """Return the fact's id: the same in every process, and different for any two facts of an installation."""
    match fact:
        case MessageCreated(message=message):
            return message.id
        case ThreadUpdated(thread=thread):
            return f"{thread.id}@{thread.updated_at}"
        case ThreadDeleted(thread_id=thread_id):
            return thread_id


def terminal_event(message: Message) -> Terminal:
    """Build the terminal event of a finished message from its `metadata["run"]`.

    Raises: ValueError if the message is not finished.
    """
    match message.status:
        case "completed":
            return RunCompleted(message)
        case "cancelled":
            return RunCancelled(message)
        case "failed":
            return RunFailed(message, msgspec.convert((message.run or {})["error"], RunError))
        case status:
            raise ValueError(f"message {message.id} is {status}, not finished")


def join_deltas(events: Iterable[Event]) -> list[Event]:
    """Return the same events with each group of consecutive deltas of one text or block of reasoning as one delta."""
    joined: list[Event] = []
    deltas: list[Delta] = []

    def close() -> None:
        if deltas:
            joined.append(msgspec.structs.replace(deltas[0], text="".join(delta.text for delta in deltas)))
            deltas.clear()

    for event in events:
        if isinstance(event, Delta):
            if deltas and (
                type(event) is not type(first := deltas[0])
                or event.message_id != first.message_id
                or (
                    isinstance(event, ReasoningDelta)
                    and isinstance(first, ReasoningDelta)
                    and event.index != first.index
                )
            ):
                close()
            deltas.append(event)
        else:
            close()
            joined.append(event)
    close()
    return joined
