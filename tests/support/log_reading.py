"""Turns of a thread as events, and reading a log in tests."""

from __future__ import annotations

import asyncio

from agent_chat.server.reading.dialects.native import sse_frame, websocket_frame
from agent_chat.stores.buffer import Cursor, Entry
from agent_chat.stores.contracts import EventLog, LogWriter
from agent_chat.stores.errors import Gap
from agent_chat.stores.events import (
    Event,
    MessageCreated,
    MessageDelta,
    ReasoningDelta,
    RunStarted,
    ToolCallCompleted,
    ToolCallProgress,
    ToolCallStarted,
    decode,
    terminal_event,
)
from agent_chat.stores.fold import fold
from agent_chat.stores.models import Message
from tests.support.samples import (
    AWKWARD,
    awkward_call,
    publish,
    rest,
    turn,
)

NOW = "2026-01-31T12:00:00.000Z"


MEGABYTE = 2**20


def build_turn(thread_id: str, words: int = 5) -> tuple[Message, Message, list[Event]]:
    """Build a user message, its finished answer, and the events that are published for them."""
    question, answer = turn(thread_id)
    events: list[Event] = [MessageCreated(question), RunStarted(answer), ReasoningDelta(answer.id, 0, 0, 0, "hm 😀")]
    offset = 0
    for word in [f"wörd{n}😀\r\n " for n in range(words)]:
        events.append(MessageDelta(answer.id, offset, word))
        offset += len(word)
    call = awkward_call()
    events += [
        ToolCallStarted(answer.id, "call_0", 0, call.tool_name, AWKWARD, call.start_time),
        ToolCallProgress(answer.id, "call_0", 0, 1, 2.5, None),
        ToolCallCompleted(answer.id, "call_0", 0, call),
    ]
    final = fold(events, answer).with_run(status="completed")
    return question, final, [*events, terminal_event(final)]


def decoded(entries: list[Entry]) -> list[Event]:
    """Decode the entries' events."""
    return [decode(entry.data) for entry in entries]


def frames_of(entries: list[Entry]) -> list[tuple[bytes, str]]:
    """Encode the entries as clients get them."""
    return [(entry.encoded(sse_frame), entry.encoded(websocket_frame)) for entry in entries]


async def raises_gap(cursor: Cursor) -> bool:
    """Return True if the cursor's `next` raises Gap; close it."""
    try:
        async with asyncio.timeout(5):
            await cursor.next()
    except Gap:
        return True
    finally:
        cursor.close()
    return False


async def publish_all(log: EventLog, thread_id: str, *events: Event) -> tuple[str, list[Entry]]:
    """Publish the events in a new log; return the position before them, and their entries."""
    before = await log.tail(thread_id)
    await publish(log, thread_id, *events)
    return before, await rest(log, thread_id, before)


def message_of(entry: Entry) -> Message:
    """Return the message of a message.created."""
    event = decode(entry.data)
    assert isinstance(event, MessageCreated)
    return event.message


async def write_and_flush(writer: LogWriter, event: Event) -> None:
    """Write and flush: only `flush` reports a deletion that another process published."""
    writer.write(event)
    await writer.flush()
