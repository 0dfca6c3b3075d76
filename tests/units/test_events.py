"""Events: decoding returns what was encoded, under the names of the API; the properties of their classes."""

from __future__ import annotations

import json
from typing import get_args

import msgspec
import pytest

from agent_chat.stores.events import (
    RUN_TYPES,
    TERMINAL_TYPES,
    TURN_TYPES,
    WHOLE_TYPES,
    Event,
    LogOpened,
    MessageCreated,
    MessageDelta,
    MessageSnapshot,
    ReasoningDelta,
    RunCancelled,
    RunCompleted,
    RunError,
    RunFailed,
    RunStarted,
    ThreadDeleted,
    ThreadSnapshot,
    ThreadUpdated,
    ToolCallCompleted,
    ToolCallProgress,
    ToolCallStarted,
    decode,
    encode,
    join_deltas,
    message_id_of,
    run_id_of,
    terminal_event,
    type_of,
)
from agent_chat.stores.models import Message, Thread, ToolCall, new_answer
from tests.support.samples import new_file

NOW = "2026-01-31T12:00:00.000Z"
ANSWER = new_answer("thread", "question", "model", NOW)
CALL = ToolCall("look", {"$a.b": 2**70, "": None}, {"x": 0.1}, None, NOW, NOW)
FILE = new_file("thread", filename="ü 😀.txt").attachment
QUESTION = Message("question", "thread", 'a\nb "\\ 😀 \u2028', "", "user", [CALL], [FILE], {"k": [None]}, NOW)
THREAD = Thread("thread", "agent", "user", "organization", "", {"m": {}}, NOW, NOW, False)
ERROR = RunError("agent_failed", "It broke.", True)

SAMPLES: dict[str, Event] = {
    "message.created": MessageCreated(QUESTION),
    "run.started": RunStarted(ANSWER),
    "message.delta": MessageDelta("m", 0, "déjà 😀\r\n"),
    "reasoning.delta": ReasoningDelta("m", 0, 0, 7, "hm"),
    "tool_call.started": ToolCallStarted("m", "call_0", 0, "look", {"big": 2**70}, NOW),
    "tool_call.progress": ToolCallProgress("m", "call_0", 0, 0.5, None, None),
    "tool_call.completed": ToolCallCompleted("m", "call_0", 0, CALL),
    "message.snapshot": MessageSnapshot(ANSWER),
    "run.completed": RunCompleted(ANSWER.with_run(status="completed")),
    "run.failed": RunFailed(ANSWER, ERROR),
    "run.cancelled": RunCancelled(ANSWER),
    "thread.updated": ThreadUpdated(THREAD),
    "thread.deleted": ThreadDeleted("thread"),
    "thread.snapshot": ThreadSnapshot(THREAD),
    "log.opened": LogOpened(),
}

by_type = pytest.mark.parametrize("name", SAMPLES)


def test_every_event_has_a_sample_under_its_name() -> None:
    assert {type(event) for event in SAMPLES.values()} == set(get_args(Event))
    assert all(json.loads(encode(event))["type"] == name for name, event in SAMPLES.items())


@by_type
def test_decode_returns_the_event_that_was_encoded(name: str) -> None:
    event = SAMPLES[name]
    assert decode(encode(event)) == event
    assert encode(decode(encode(event))) == encode(event)


@pytest.mark.parametrize("name", ["tool_call.started", "tool_call.progress", "tool_call.completed"])
def test_tool_events_of_version_0_1_0_get_an_id(name: str) -> None:
    body = json.loads(encode(SAMPLES[name]))
    del body["id"]
    assert decode(json.dumps(body).encode()) == SAMPLES[name]


def test_reasoning_of_version_0_1_0_is_decoded() -> None:
    old = b'{"type":"reasoning.delta","message_id":"m","offset":7,"text":"hm"}'
    assert decode(old) == ReasoningDelta("m", 0, 0, 7, "hm")


def test_an_event_that_is_none_is_refused() -> None:
    for data in (b'{"type":"tool_call.started","message_id":"m"}', b'{"type":"message.delta"}'):
        with pytest.raises(msgspec.ValidationError):
            decode(data)


def test_events_have_the_fields_of_the_api_in_its_order() -> None:
    fields = {name: list(json.loads(encode(event)))[1:] for name, event in SAMPLES.items()}
    assert fields["message.delta"] == ["message_id", "offset", "text"]
    assert fields["reasoning.delta"] == ["message_id", "index", "after", "offset", "text"]
    assert fields["tool_call.started"] == ["message_id", "id", "index", "tool_name", "arguments", "start_time"]
    assert fields["tool_call.progress"] == ["message_id", "id", "index", "progress", "total", "message"]
    assert fields["tool_call.completed"] == ["message_id", "id", "index", "tool_call"]


@by_type
def test_type_of_reads_the_type_of_an_encoded_event(name: str) -> None:
    assert type_of(encode(SAMPLES[name])) == name


@by_type
def test_an_encoded_event_is_one_line(name: str) -> None:
    assert b"\n" not in encode(SAMPLES[name])
    assert b"\r" not in encode(SAMPLES[name])


@by_type
def test_message_id_of_returns_the_message_that_an_event_is_about(name: str) -> None:
    body = json.loads(encode(SAMPLES[name]))
    about = body["message_id"] if "message_id" in body else body["message"]["id"] if "message" in body else None
    assert message_id_of(SAMPLES[name]) == about


def test_a_snapshot_supersedes_the_parts_of_its_message() -> None:
    superseded = {name for name, event in SAMPLES.items() if event.superseded_by_snapshot}
    assert superseded == {
        "message.delta",
        "reasoning.delta",
        "tool_call.started",
        "tool_call.progress",
        "tool_call.completed",
        "message.snapshot",
    }


def test_the_sets_of_types_follow_from_the_properties_of_the_classes() -> None:
    terminal = {"run.completed", "run.failed", "run.cancelled"}
    assert terminal == TERMINAL_TYPES
    assert terminal | {"message.created", "run.started"} == TURN_TYPES
    assert terminal | {"run.started", "message.snapshot"} == WHOLE_TYPES
    assert {name for name, event in SAMPLES.items() if event.superseded_by_snapshot} | terminal | {
        "run.started"
    } == RUN_TYPES
    assert {name for name, event in SAMPLES.items() if run_id_of(event)} == RUN_TYPES
    assert [name for name, event in SAMPLES.items() if event.closes_log] == ["thread.deleted"]


def test_the_terminal_event_follows_from_the_status_of_the_message() -> None:
    done, stopped = ANSWER.with_run(status="completed"), ANSWER.with_run(status="cancelled")
    broken = ANSWER.with_run(status="failed", error={"code": "agent_failed", "detail": "It broke.", "retryable": True})
    events = [terminal_event(done), terminal_event(stopped), terminal_event(broken)]
    assert events == [RunCompleted(done), RunCancelled(stopped), RunFailed(broken, ERROR)]
    assert {type_of(encode(event)) for event in events} == TERMINAL_TYPES


@pytest.mark.parametrize("message", [ANSWER, QUESTION], ids=["running", "no run"])
def test_there_is_no_terminal_event_for_a_message_that_is_not_finished(message: Message) -> None:
    with pytest.raises(ValueError, match="not finished"):
        terminal_event(message)


def test_consecutive_deltas_of_one_message_and_class_are_joined() -> None:
    deltas = [MessageDelta("m", 3, "a"), MessageDelta("m", 4, "😀"), MessageDelta("m", 5, "cd")]
    assert join_deltas(deltas) == [MessageDelta("m", 3, "a😀cd")]


def test_other_deltas_and_other_events_are_not_joined() -> None:
    call = ToolCallStarted("m", "call_0", 0, "look", {}, NOW)
    events: list[Event] = [
        MessageDelta("m", 0, "a"),
        ReasoningDelta("m", 0, 0, 0, "b"),
        ReasoningDelta("m", 0, 0, 1, "c"),
        ReasoningDelta("m", 1, 0, 0, "of another block"),
        MessageDelta("m", 1, "d"),
        MessageDelta("n", 0, "e"),
        call,
        MessageDelta("n", 1, "f"),
        MessageDelta("n", 2, "g"),
    ]
    assert join_deltas(events) == [
        MessageDelta("m", 0, "a"),
        ReasoningDelta("m", 0, 0, 0, "bc"),
        ReasoningDelta("m", 1, 0, 0, "of another block"),
        MessageDelta("m", 1, "d"),
        MessageDelta("n", 0, "e"),
        call,
        MessageDelta("n", 1, "fg"),
    ]


def test_joining_nothing_gives_nothing() -> None:
    assert join_deltas([]) == []
