"""The parts of a stored message are in the order in which a viewer of its run saw them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec
import pytest
from msgspec.structs import replace

from agent_chat.agents import Reasoning, Text, ToolCompleted, ToolProgress, ToolStarted
from agent_chat.agents.answer import AnswerBuilder
from agent_chat.agents.parts import InlinePart
from agent_chat.stores.events import (
    Event,
    MessageDelta,
    ReasoningDelta,
    ToolCallCompleted,
    ToolCallStarted,
    decode,
    encode,
    join_deltas,
)
from agent_chat.stores.fold import fold
from agent_chat.stores.message_parts import MessagePart, ReasoningPart, TextPart, ToolCallPart, message_parts
from agent_chat.stores.models import Message, ToolCall, utcnow
from tests.support.run_events import ALPHABET, EMPTY, NOT_STORING, NOW, a_run, without_snapshots


def seen(events: Sequence[Event]) -> list[MessagePart]:
    """The parts as a viewer of the run sees them, one after another, without looking at any offset but the first."""
    parts: list[MessagePart] = []
    for event in events:
        last = parts[-1] if parts else None
        match event, last:
            case MessageDelta(text=text), TextPart():
                parts[-1] = replace(last, text=last.text + text)
            case MessageDelta(offset=offset, text=text), _:
                parts.append(TextPart(offset, text))
            case ReasoningDelta(text=text), ReasoningPart(index=index):
                assert event.index == index, "a block continues until something else comes"
                parts[-1] = replace(last, text=last.text + text)
            case ReasoningDelta(index=index, text=text), _:
                parts.append(ReasoningPart(index, text))
            case ToolCallStarted(), _:
                call = ToolCall(event.tool_name, event.arguments, start_time=event.start_time)
                parts.append(ToolCallPart(event.index, event.id, call))
            case ToolCallCompleted(), _:
                calls = [part.id if isinstance(part, ToolCallPart) else None for part in parts]
                parts[calls.index(event.id)] = ToolCallPart(event.index, event.id, event.tool_call)
    return parts


def text_of(chance: random.Random) -> str:
    return "".join(chance.choices(ALPHABET, k=chance.randrange(4)))


def yielded(chance: random.Random) -> list[InlinePart]:
    """What an agent yields: text, reasoning and concurrent calls in any order, some of them empty."""
    parts: list[InlinePart] = []
    started: list[str] = []
    running: list[str] = []
    for number in range(chance.randrange(40)):
        match chance.choice(["text", "text", "reasoning", "reasoning", "start", "start", "progress", "complete"]):
            case "text":
                parts.append(Text(text_of(chance)))
            case "reasoning":
                parts.append(Reasoning(text_of(chance)))
            case "start":
                started.append("" if "" not in running and chance.random() < 0.3 else f"id {number}")
                running.append(started[-1])
                parts.append(ToolStarted(started[-1], "look", {"n": number}, chance.randrange(3)))
            case "progress" if running:
                parts.append(ToolProgress(chance.choice(running), 0.5))
            case "complete" if running:
                parts.append(ToolCompleted(running.pop(chance.randrange(len(running))), {"n": number}))
    return parts


def published(parts: Sequence[InlinePart], message: Message) -> tuple[list[Event], Message]:
    """The events of a run that yields these parts, and its message."""
    builder = AnswerBuilder(message, utcnow)
    events = [event for part in parts if (event := builder.take(part)) is not None]
    return [decode(encode(event)) for event in events], builder.message()


@pytest.mark.parametrize("seed", range(300))
def test_a_stored_message_has_the_parts_that_a_viewer_saw_at_every_moment_of_its_run(seed: int) -> None:
    chance = random.Random(seed)
    events, message = published(yielded(chance), EMPTY)
    stored = msgspec.json.decode(msgspec.json.encode(message), type=Message)
    assert message_parts(stored) == seen(events) == seen(join_deltas(events))
    assert "".join(part.text for part in message_parts(stored) if isinstance(part, TextPart)) == stored.content
    for end in range(len(events)):
        assert message_parts(fold(events[:end], EMPTY)) == seen(events[:end])


@pytest.mark.parametrize("seed", range(50))
def test_events_that_no_agent_ordered_have_the_same_parts_after_the_fold(seed: int) -> None:
    events = without_snapshots(a_run(random.Random(seed)))
    assert message_parts(fold(events, EMPTY)) == seen(events)


@pytest.mark.parametrize("seed", range(50))
def test_without_stored_reasoning_the_other_parts_are_the_same(seed: int) -> None:
    events, message = published(yielded(random.Random(seed)), NOT_STORING)
    others = [event for event in events if not isinstance(event, ReasoningDelta)]
    assert message.reasoning is None
    assert message_parts(message) == seen(others)


@pytest.mark.parametrize("metadata", [{}, {"run": {"status": "completed", "tool_calls": []}}], ids=["no run", "0.1.0"])
def test_calls_without_a_stored_place_come_before_the_text(metadata: dict[str, object]) -> None:
    call = ToolCall("look", {}, {"n": 1}, None, NOW, NOW)
    message = replace(EMPTY, content="Done.", tool_calls=[call], metadata=metadata)
    assert message_parts(message) == [ToolCallPart(0, "call_0", call), TextPart(0, "Done.")]


def test_places_beyond_the_text_are_at_its_end() -> None:
    call = ToolCall("look", {}, {"n": 1}, None, NOW, NOW)
    run = {"tool_calls": [{"id": "a", "round": 0, "offset": 9}, {"id": "b", "round": 0, "offset": 2}]}
    message = replace(EMPTY, content="Done.", tool_calls=[call, call]).with_run(**run)
    assert message_parts(message) == [TextPart(0, "Done."), ToolCallPart(0, "a", call), ToolCallPart(1, "b", call)]


def test_an_empty_message_has_no_parts() -> None:
    assert message_parts(EMPTY) == []
