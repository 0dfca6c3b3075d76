"""Every event of a thread's log, in the form that clients get.

An event is encoded once (`encode`) when it is appended; what readers hand on are those bytes. The names and the
fields are the API's: adding one is a change of the API.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import get_args

import msgspec

from agent_chat.stores.models import Id, JSONObject, Message, Thread, Timestamp, ToolCall


class RunError(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a run failed, in words for a client. `retry_after` is in seconds, and only there where it is known."""

    code: str
    detail: str
    retryable: bool
    retry_after: float | None = None


class MessageCreated(msgspec.Struct, frozen=True, tag="message.created"):
    message: Message


class RunStarted(msgspec.Struct, frozen=True, tag="run.started"):
    """The run's message: the assistant's, empty, in progress."""

    message: Message


class MessageDelta(msgspec.Struct, frozen=True, tag="message.delta"):
    """`offset` is how many characters (Unicode code points) the message had before `text`."""

    message_id: Id
    offset: int
    text: str


class ReasoningDelta(msgspec.Struct, frozen=True, tag="reasoning.delta"):
    """`offset` counts the characters of the reasoning alone. Reasoning is shown, not kept."""

    message_id: Id
    offset: int
    text: str


class ToolCallStarted(msgspec.Struct, frozen=True, tag="tool_call.started"):
    message_id: Id
    index: int
    tool_name: str
    arguments: JSONObject
    start_time: Timestamp


class ToolCallProgress(msgspec.Struct, frozen=True, tag="tool_call.progress"):
    message_id: Id
    index: int
    progress: float
    total: float | None
    message: str | None


class ToolCallCompleted(msgspec.Struct, frozen=True, tag="tool_call.completed"):
    message_id: Id
    index: int
    tool_call: ToolCall


class MessageSnapshot(msgspec.Struct, frozen=True, tag="message.snapshot"):
    """A running message, whole: said in place of deltas that a lost log swallowed."""

    message: Message


class RunCompleted(msgspec.Struct, frozen=True, tag="run.completed"):
    message: Message


class RunFailed(msgspec.Struct, frozen=True, tag="run.failed"):
    message: Message
    error: RunError


class RunCancelled(msgspec.Struct, frozen=True, tag="run.cancelled"):
    message: Message


class ThreadUpdated(msgspec.Struct, frozen=True, tag="thread.updated"):
    """The thread without its messages (`messages: []`)."""

    thread: Thread


class ThreadDeleted(msgspec.Struct, frozen=True, tag="thread.deleted"):
    thread_id: Id


class ThreadSnapshot(msgspec.Struct, frozen=True, tag="thread.snapshot"):
    """The thread with its latest 50 messages; made for one reader, never in the log."""

    thread: Thread


class LogOpened(msgspec.Struct, frozen=True, tag="log.opened"):
    """The hidden first entry of a log, so that an empty one has a position. No client sees it."""


Delta = MessageDelta | ReasoningDelta
Terminal = RunCompleted | RunFailed | RunCancelled
Fact = MessageCreated | ThreadUpdated | ThreadDeleted
"""What a write that starts no run publishes: the outbox holds these until they are in the log."""

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

TERMINAL_TYPES = frozenset({"run.completed", "run.failed", "run.cancelled"})

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)
_type_start = len(b'{"type":"')
_types = {str(event.__struct_config__.tag).encode(): str(event.__struct_config__.tag) for event in get_args(Event)}


def encode(event: Event) -> bytes:
    """The event as JSON, its `type` first."""
    return _encoder.encode(event)


def decode(data: bytes) -> Event:
    return _decoder.decode(data)


def type_of(data: bytes) -> str:
    """Read the type off an encoded event without decoding it: `encode` puts it first. Equal types are one object."""
    name = data[_type_start : data.index(b'"', _type_start)]
    return _types.get(name) or sys.intern(name.decode())


def message_id_of(event: Event) -> str | None:
    """The message that the event is about; null for events about the thread."""
    match event:
        case MessageCreated() | RunStarted() | MessageSnapshot() | RunCompleted() | RunFailed() | RunCancelled():
            return event.message.id
        case MessageDelta() | ReasoningDelta() | ToolCallStarted() | ToolCallProgress() | ToolCallCompleted():
            return event.message_id
        case ThreadUpdated() | ThreadDeleted() | ThreadSnapshot() | LogOpened():
            return None


def fact_id(fact: Fact) -> str:
    """The id of a fact in its thread's outbox, the same in every process; two facts of one installation differ."""
    match fact:
        case MessageCreated(message=message):
            return message.id
        case ThreadUpdated(thread=thread):
            return f"{thread.id}@{thread.updated_at}"
        case ThreadDeleted(thread_id=thread_id):
            return thread_id


def partial_only(event: Event) -> bool:
    """True for what a message.snapshot of the running message makes superfluous."""
    return isinstance(
        event,
        MessageDelta | ReasoningDelta | ToolCallStarted | ToolCallProgress | ToolCallCompleted | MessageSnapshot,
    )


def terminal_event(message: Message) -> Terminal:
    """The terminal event of a finished message, as its `metadata["run"]` tells it."""
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
    """The same events with each stretch of consecutive deltas of one message and kind as one delta."""
    out: list[Event] = []
    stretch: list[Delta] = []

    def close() -> None:
        if stretch:
            out.append(msgspec.structs.replace(stretch[0], text="".join(delta.text for delta in stretch)))
            stretch.clear()

    for event in events:
        if isinstance(event, MessageDelta | ReasoningDelta):
            if stretch and (type(event) is not type(stretch[0]) or event.message_id != stretch[0].message_id):
                close()
            stretch.append(event)
        else:
            close()
            out.append(event)
    close()
    return out
