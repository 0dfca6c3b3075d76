"""The promise that the project is named for: every answer is a reading of one log."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from agent_chat.stores.events import TERMINAL_TYPES, decode
from agent_chat.stores.fold import fold
from agent_chat.stores.models import Message
from tests.support.client import Frame, frames
from tests.support.servers import Live
from tests.support.sockets import socket
from tests.support.thread_view import View, status
from tests.support.viewers import Watcher, watcher

SCRIPT = """say # Title 🎈
count 98
tool calculate {"expression": "2*(3+4)"}
think hm
count 98
tool roll_dice {}
say done"""
WORDS = "all that is said in one breath comes at once"
SAID = "\n".join(f"say {word}" for word in WORDS.split())
GROUPS = [f'say 🎈\ntool calculate {{"expression": "6*{n}"}}\n{SAID}\nhold {n}' for n in range(16)]
GROUP_CHARS = len("🎈\n\n" + WORDS.replace(" ", ""))


def folded(stream: list[Frame]) -> Message:
    """Fold a run's events without looking into its terminal event."""
    started = next(frame for frame in stream if frame.event == "run.started")
    message = msgspec.convert(started.data["message"], Message)
    raw = [frame.raw.split(b"\n")[1].removeprefix(b"data: ") for frame in stream]
    return fold(
        (decode(data) for data, frame in zip(raw, stream, strict=True) if frame.event not in TERMINAL_TYPES), message
    )


@pytest.mark.slow
async def test_resuming_at_every_event_gives_exactly_the_missing_frames_byte_for_byte(live: Live) -> None:
    thread = await live.scripted_thread(mcp_servers=["demo"])
    whole = await live.streamed(thread, SCRIPT)
    assert len(whole) >= 200
    assert whole[-1].event == "run.completed"
    for index, frame in enumerate(whole):
        headers = {"Accept": "text/event-stream", "Last-Event-ID": frame.id}
        async with live.http.stream("POST", f"{thread}/messages", headers=headers) as response:
            assert [rest.raw async for rest in frames(response)] == [rest.raw for rest in whole[index + 1 :]]


@pytest.mark.slow
async def test_a_socket_resumed_at_every_event_gets_exactly_the_missing_frames(live: Live) -> None:
    thread = await live.scripted_thread(mcp_servers=["demo"])
    async with socket(live.url, thread) as connection:
        whole = [await connection.text()]
        await live.post(thread, SCRIPT)
        while '"run.completed"' not in whole[-1]:
            whole.append(await connection.text())
    assert len(whole) >= 200
    for index, frame in enumerate(whole[:-1], 1):
        async with socket(live.url, thread, after=json.loads(frame)["position"]) as resumed, asyncio.timeout(20):
            assert [await resumed.connection.recv() for _ in whole[index:]] == whole[index:]


async def test_the_fold_of_the_stream_is_the_stored_message_and_the_json_answer_of_the_same_run(live: Live) -> None:
    thread = await live.scripted_thread(mcp_servers=["demo"])
    script, key = f"{SCRIPT}\nhold here\nsay end", {"Idempotency-Key": "k"}
    streaming = asyncio.create_task(live.streamed(thread, script, **key))
    await live.gates.reached("here")
    joining = asyncio.create_task(live.post(thread, script, **key))
    live.gates.release("here")
    whole = await streaming
    message = folded(whole)
    for answer in (await joining, await live.post(thread, script, **key)):
        assert (answer.status_code, answer.headers["idempotency-replayed"]) == (201, "true")
        assert answer.json() == whole[-1].data["message"]
    asked, stored = (await live.get(thread))["messages"]
    assert (asked["content"], answer.json()) == (script, stored)
    assert (message.id, message.content) == (stored["id"], stored["content"])
    assert msgspec.to_builtins(message.tool_calls) == stored["tool_calls"]
    assert message.reasoning == stored["metadata"]["run"]["reasoning"] != []
    assert [call["result"] is not None for call in stored["tool_calls"]] == [True, True]


def ends_at(length: int) -> Callable[[dict[str, Any]], bool]:
    """True for the delta with which the text has come that far."""
    return lambda data: data["offset"] + len(data["text"]) == length


class Joined:
    """A watcher that joined during the run. `view`: the thread as it knew it then."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.frames: list[Frame] = []
        self.there = asyncio.Event()

    async def read(self, live: Live, thread: str, after: str | None) -> None:
        async with live.watching(thread, after) as stream:
            self.there.set()
            async for frame in stream:
                self.frames.append(frame)
                self.view.apply(frame)
                if frame.event in TERMINAL_TYPES:
                    return


async def joined_everywhere(live: Live, thread: str, first: Watcher) -> dict[str | None, list[Joined]]:
    """Run GROUPS; where each holds, join at each position so far, and without one; all that came, by position."""
    joined: defaultdict[str | None, list[Joined]] = defaultdict(list)
    past, said = View(), 0
    async with asyncio.timeout(40), asyncio.TaskGroup() as reading:

        async def join(view: View, after: str | None) -> None:
            joined[after].append(Joined(view))
            reading.create_task(joined[after][-1].read(live, thread, after))
            await joined[after][-1].there.wait()

        await live.post(thread, "\n".join(GROUPS), Prefer="respond-async")
        for number in range(len(GROUPS)):
            await live.gates.reached(str(number))
            await first.sees("message.delta", ends_at(GROUP_CHARS * (number + 1)))
            for frame in first.frames[said:]:
                past.apply(frame)
                await join(past.copy(), frame.id)
            await join(View(), None)
            said = len(first.frames)
            live.gates.release(str(number))
    await first.sees("run.completed")
    return joined


@pytest.mark.slow
async def test_a_viewer_that_joins_at_any_event_gets_the_rest_byte_for_byte_and_the_stored_thread(
    live: Live,
) -> None:
    thread = await live.scripted_thread(mcp_servers=["demo"])
    async with watcher(live, thread) as first:
        joined = await joined_everywhere(live, thread, first)
    stored = await live.get(thread)
    rest = {frame.id: [later.raw for later in first.frames[index:]] for index, frame in enumerate(first.frames, 1)}
    assert len(joined.keys() & rest.keys()) >= 200
    for each in joined.pop(None):
        snapshot, *frames = each.frames
        assert snapshot.event == "thread.snapshot"
        assert status(snapshot.data["thread"]["messages"][-1]) == "in_progress"
        assert [frame.raw for frame in frames] == rest[snapshot.id]
        assert each.view.shows(stored)
    for position, (each,) in joined.items():
        assert [frame.raw for frame in each.frames] == rest[str(position)]
        assert each.view.shows(stored)
