"""Reasoning: streamed, stored with its place, and the same for every viewer; or only streamed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec

from agent_chat.agents.answer import REASONING_CUT
from agent_chat.stores.events import TERMINAL_TYPES, ReasoningDelta, decode
from agent_chat.stores.fold import fold
from agent_chat.stores.message_parts import MessagePart, ReasoningPart, TextPart, ToolCallPart, message_parts
from agent_chat.stores.models import REASONING_BYTES, Message
from tests.support.client import Frame
from tests.support.gates import critical, no_runs
from tests.support.servers import Live, live_server
from tests.support.shapes import RUN_KEYS, is_message
from tests.support.thread_view import status
from tests.support.viewers import watcher

SCRIPT = """think Hm, 🎈
think well.
say Let me look.
think Which one?
result oven {"warm": true}
think And the other?
result fridge {"cold": true}
hold here
think So.
say Both work.
think Anything else?"""
BLOCKS = [
    {"index": 0, "after": 0, "calls": 0, "text": "Hm, 🎈well."},
    {"index": 1, "after": 12, "calls": 0, "text": "Which one?"},
    {"index": 2, "after": 12, "calls": 1, "text": "And the other?"},
    {"index": 3, "after": 12, "calls": 2, "text": "So."},
    {"index": 4, "after": 24, "calls": 2, "text": "Anything else?"},
]


def message_of(body: dict[str, Any]) -> Message:
    return msgspec.convert(body, Message)


def brief(part: MessagePart) -> str:
    match part:
        case TextPart(text=text) | ReasoningPart(text=text):
            return text
        case ToolCallPart(tool_call=call):
            return call.tool_name


def reasoning_of(stream: list[Frame]) -> list[ReasoningDelta]:
    return [event for frame in stream if isinstance(event := data_of(frame), ReasoningDelta)]


def data_of(frame: Frame) -> Any:
    return decode(frame.raw.split(b"\n")[1].removeprefix(b"data: "))


def folded(stream: list[Frame]) -> Message:
    """Fold a run's events without its terminal event."""
    started = next(frame for frame in stream if frame.event == "run.started")
    parts = [data_of(frame) for frame in stream if frame.event not in TERMINAL_TYPES]
    return fold(parts, message_of(started.data["message"]))


async def test_a_late_viewer_a_resumed_one_and_the_stored_message_have_the_same_reasoning(live: Live) -> None:
    thread = await live.scripted_thread()
    streaming = asyncio.create_task(live.streamed(thread, SCRIPT))
    await live.gates.reached("here")
    async with watcher(live, thread) as late:
        (joined,) = [each for each in late.view.messages.values() if each["role"] == "assistant"]
        assert joined["metadata"]["run"]["reasoning"] == BLOCKS[:3]
        live.gates.release("here")
        answer = await late.finishes(joined["id"])
    stream = await streaming
    async with watcher(live, thread, next(frame.id for frame in stream if frame.event == "reasoning.delta")) as resumed:
        await resumed.sees("run.completed")
        assert [frame.raw for frame in resumed.frames] == [frame.raw for frame in stream[3:]]
    assert is_message(answer)["metadata"]["run"]["reasoning"] == BLOCKS
    assert (await live.get(thread))["messages"][-1] == answer
    assert folded(stream).reasoning == BLOCKS
    order = ["Hm, 🎈well.", "Let me look.", "Which one?", "oven", "And the other?", "fridge", "So.", "\n\nBoth work."]
    assert [brief(part) for part in message_parts(message_of(answer))] == [*order, "Anything else?"]


async def test_a_cancelled_answer_keeps_its_reasoning(live: Live) -> None:
    thread = await live.scripted_thread()
    run = await live.start_run(thread, "think half a thought\nhold thinking")
    await live.gates.reached("thinking")
    answer = (await live.cancel(thread, run)).json()
    assert (status(answer), answer["metadata"]["run"]["reasoning"][0]["text"]) == ("cancelled", "half a thought")


async def test_reasoning_that_is_not_stored_is_streamed_to_those_who_are_there(tmp_path: Path) -> None:
    async with live_server(tmp_path, keep_reasoning=False) as live:
        thread = await live.scripted_thread()
        streaming = asyncio.create_task(live.streamed(thread, SCRIPT))
        await live.gates.reached("here")
        async with watcher(live, thread) as late:
            (joined,) = [each for each in late.view.messages.values() if each["role"] == "assistant"]
            live.gates.release("here")
            answer = await late.finishes(joined["id"])
        stream = await streaming
        told = [(delta.index, delta.after, delta.text) for delta in reasoning_of(stream)]
        assert told[1:] == [(0, 0, "well."), *((block["index"], block["after"], block["text"]) for block in BLOCKS[1:])]
        assert set(joined["metadata"]["run"]) == set(answer["metadata"]["run"]) == RUN_KEYS - {"reasoning"}
        assert (await live.get(thread))["messages"][-1] == answer
        message = folded(stream)
        assert (message.content, message.reasoning) == (answer["content"], None)


async def test_reasoning_beyond_its_bound_ends_with_a_note_and_the_answer_goes_on(live: Live) -> None:
    thread = await live.scripted_thread()
    thought = "€" * 50_000
    stream = await live.streamed(thread, f"think {thought}\nthink {thought}\nsay So.\nthink {thought}\nsay Done.")
    answer = stream[-1].data["message"]
    (block,) = answer["metadata"]["run"]["reasoning"]
    assert (answer["content"], status(answer)) == ("So.Done.", "completed")
    assert block["text"] == "€" * (REASONING_BYTES // 3) + REASONING_CUT
    assert folded(stream).reasoning == [block]


async def test_a_repaired_run_has_the_reasoning_since_its_last_checkpoint(tmp_path: Path) -> None:
    async with critical(tmp_path, lease=0.0) as race:
        kept, death = race.store.hold("checkpoint", "after"), race.store.hold("finish", "before")
        thread = await race.live.scripted_thread()
        run = await race.live.start_run(thread, "think one\nhold start\nopen oven\nhold end\nthink two")
        race.live.gates.release("start")
        await kept.passed()  # before a call that must not be repeated
        await race.live.gates.reached("end")
        race.live.gates.release("end")
        await death.reached()
        death.kill()
        await no_runs()
        await race.runner.repairer.sweep()
        answer = await race.live.get(f"{thread}/messages/{run}")
        assert answer["metadata"]["run"]["reasoning"] == [
            {"index": 0, "after": 0, "calls": 0, "text": "one"},
            {"index": 1, "after": 0, "calls": 1, "text": "two"},
        ]
