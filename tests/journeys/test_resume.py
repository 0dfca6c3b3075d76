"""The promise that the project is named for: every answer is a reading of one log."""

from __future__ import annotations

import msgspec

from stores.events import TERMINAL_TYPES, decode
from stores.fold import fold
from stores.models import Message
from tests.journeys.live import Frame, Live, frames

SCRIPT = """say # Title 🎈
count 120
tool calculate {"expression": "2*(3+4)"}
think hm
count 120
tool roll_dice {}
say done"""


def folded(stream: list[Frame]) -> Message:
    """Fold a run's events without looking into its terminal event."""
    started = next(frame for frame in stream if frame.event == "run.started")
    message = msgspec.convert(started.data["message"], Message)
    raw = [frame.raw.split(b"\n")[1].removeprefix(b"data: ") for frame in stream]
    return fold(
        (decode(data) for data, frame in zip(raw, stream, strict=True) if frame.event not in TERMINAL_TYPES), message
    )


async def test_resuming_at_every_event_gives_exactly_the_missing_frames_byte_for_byte(live: Live) -> None:
    thread = await live.scripted_thread(mcp_servers=["demo"])
    whole = await live.streamed(thread, SCRIPT)
    assert len(whole) >= 200
    assert whole[-1].event == "run.completed"
    for index, frame in enumerate(whole):
        headers = {"Accept": "text/event-stream", "Last-Event-ID": frame.id}
        async with live.http.stream("POST", f"{thread}/messages", headers=headers) as response:
            assert [rest.raw async for rest in frames(response)] == [rest.raw for rest in whole[index + 1 :]]


async def test_the_fold_of_the_stream_is_the_stored_message_and_the_json_answer(live: Live) -> None:
    thread = await live.scripted_thread(mcp_servers=["demo"])
    whole = await live.streamed(thread, SCRIPT)
    message = folded(whole)
    stored = (await live.get(thread))["messages"][-1]
    assert whole[-1].data["message"] == stored
    assert message.content == stored["content"]
    assert msgspec.to_builtins(message.tool_calls) == stored["tool_calls"]
    assert [call["result"] is not None for call in stored["tool_calls"]] == [True, True]
    answer = await live.say(thread, SCRIPT)
    assert answer.status_code == 201
    assert answer.json()["content"] == stored["content"]


async def test_a_watcher_who_joins_anywhere_ends_with_the_stored_thread(live: Live) -> None:
    thread = await live.scripted_thread(mcp_servers=["demo"])
    async with live.posting(thread, "count 60\nhold here\ncount 60") as posting:
        stream = frames(posting)
        positions = [(await anext(stream)).id for _ in range(50)]
        await live.gates.reached("here")
        watched: list[list[Frame]] = []
        for after in [None, *positions]:
            async with live.watching(thread, after) as watcher:
                watched.append([await anext(watcher)])
        live.gates.release("here")
        _ = [frame async for frame in stream]
    stored = (await live.get(thread))["messages"][-1]
    for after in [None, *positions]:
        async with live.watching(thread, after) as watcher:
            async for frame in watcher:
                last = frame
                if frame.event in TERMINAL_TYPES or frame.event == "thread.snapshot":
                    break
        final = last.data["message"] if "message" in last.data else last.data["thread"]["messages"][-1]
        assert final == stored
