"""Events of one run, made by hand or at random, and the ways in which a client may receive them."""

from __future__ import annotations

import random
from collections import defaultdict

from msgspec.structs import replace

from agent_chat.stores.events import (
    Event,
    MessageDelta,
    MessageSnapshot,
    ReasoningDelta,
    RunStarted,
    ToolCallCompleted,
    ToolCallStarted,
)
from agent_chat.stores.fold import fold
from agent_chat.stores.models import ToolCall, new_answer

NOW = "2026-01-31T12:00:00.000Z"


EMPTY = new_answer("thread", "question", "model", NOW)
NOT_STORING = replace(new_answer("thread", "question", "model", NOW, store_reasoning=False), id=EMPTY.id)
"""The same message of a server that stores no reasoning."""


ALPHABET = "ab é漢😀👩‍👧\n"


def delta(offset: int, text: str) -> MessageDelta:
    return MessageDelta(EMPTY.id, offset, text)


def started(index: int, name: str = "look") -> ToolCallStarted:
    return ToolCallStarted(EMPTY.id, f"call_{index}", index, name, {"n": index}, NOW)


def ended(index: int, result: int = 1, name: str = "look") -> ToolCallCompleted:
    return ToolCallCompleted(
        EMPTY.id, f"call_{index}", index, ToolCall(name, {"n": index}, {"r": result}, None, NOW, NOW)
    )


def think(index: int, text: str, *, after: int = 0, offset: int = 0) -> ReasoningDelta:
    return ReasoningDelta(EMPTY.id, index, after, offset, text)


def a_run(chance: random.Random) -> list[Event]:
    """What a run says, text, reasoning and tool calls in any order, and perhaps a snapshot in its middle."""
    events: list[Event] = [RunStarted(EMPTY)]
    text, calls, open_calls = "", 0, []
    blocks: list[tuple[int, int]] = []
    thought = ""
    for _ in range(chance.randrange(5, 40)):
        kind = chance.choice(["text", "text", "text", "reasoning", "start", "end", "snapshot"])
        if kind == "text":
            more = "".join(chance.choices(ALPHABET, k=chance.randrange(1, 6)))
            events.append(delta(len(text), more))
            text += more
        elif kind == "reasoning":
            if blocks[-1:] != [(len(text), calls)]:
                blocks.append((len(text), calls))
                thought = ""
            more = "".join(chance.choices(ALPHABET, k=chance.randrange(1, 6)))
            events.append(think(len(blocks) - 1, more, after=len(text), offset=len(thought)))
            thought += more
        elif kind == "start":
            events.append(started(calls))
            open_calls.append(calls)
            calls += 1
        elif kind == "end" and open_calls:
            events.append(ended(open_calls.pop(chance.randrange(len(open_calls))), chance.randrange(9)))
        elif kind == "snapshot" and chance.random() < 0.3:
            events.append(MessageSnapshot(fold(events, EMPTY)))
    return events


def read_again(events: list[Event], chance: random.Random) -> list[Event]:
    """The events as a reader gets them who goes back to an earlier position now and then."""
    seen: list[Event] = []
    at = 0
    while at < len(events):
        seen.append(events[at])
        at = at + 1 if chance.random() < 0.8 else chance.randrange(at + 1)
    return seen


def repeated(events: list[Event], chance: random.Random) -> list[Event]:
    """The events with single ones said again at any later time."""
    seen: list[Event] = []
    for event in events:
        seen.append(event)
        seen += chance.choices(seen, k=chance.randrange(3))
    return seen


def in_other_pieces(events: list[Event], chance: random.Random) -> list[Event]:
    """The events with every delta cut and overlapping what was said before it."""
    seen: list[Event] = []
    texts: defaultdict[int | None, str] = defaultdict(str)
    for event in events:
        if not isinstance(event, MessageDelta | ReasoningDelta):
            seen.append(event)
            continue
        block = event.index if isinstance(event, ReasoningDelta) else None
        said, text = len(texts[block]), texts[block] + event.text
        texts[block] = text
        while said < len(text):
            begin, said = chance.randrange(said + 1), chance.randrange(said + 1, len(text) + 1)
            seen.append(replace(event, offset=begin, text=text[begin:said]))
    return seen


def without_snapshots(events: list[Event]) -> list[Event]:
    return [event for event in events if not isinstance(event, RunStarted | MessageSnapshot)]
