"""web_demo/client.js in Node: its reducer gives what stores/fold.py gives, and its connection heals."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from agent_chat.stores.events import (
    Event,
    MessageCreated,
    MessageDelta,
    MessageSnapshot,
    RunCompleted,
    RunStarted,
    ThreadDeleted,
    ThreadSnapshot,
    ThreadUpdated,
    ToolCallProgress,
)
from agent_chat.stores.fold import fold
from agent_chat.stores.models import Message, Thread
from tests.support.client import KEY
from tests.support.node import node, scripted_stream
from tests.support.proxy import BreakingProxy
from tests.support.run_events import (
    EMPTY,
    NOT_STORING,
    NOW,
    a_run,
    delta,
    ended,
    in_other_pieces,
    read_again,
    repeated,
    started,
    think,
    without_snapshots,
)
from tests.support.servers import Live

CLIENT = Path(__file__).parents[2] / "web_demo" / "client.js"
THREAD = Thread(EMPTY.thread_id, "agent", "user", "organization", "", {}, NOW, NOW, False, [EMPTY])
DONE = replace(EMPTY, content="Hello").with_run(status="completed")


def case(events: Sequence[Event], messages: Sequence[Message] = (EMPTY,)) -> Any:
    state = {"thread": replace(THREAD, messages=[]), "messages": list(messages)}
    return msgspec.to_builtins({"state": state, "events": list(events)})


async def reduced_all(cases: list[Any]) -> list[dict[str, Any]]:
    """The state after each case's events."""
    states: list[dict[str, Any]] = await node("reduce.mjs", stdin=msgspec.json.encode(cases))
    return states


async def reduced(events: Sequence[Event], messages: Sequence[Message] = (EMPTY,)) -> dict[str, Any]:
    return (await reduced_all([case(events, messages)]))[0]


def test_the_client_is_short_enough_to_be_read() -> None:
    assert len(CLIENT.read_text(encoding="utf-8").splitlines()) < 200


async def test_the_reducer_gives_what_fold_gives_for_any_events_in_any_pieces_any_number_of_times() -> None:
    lists: list[list[Event]] = []
    for seed in range(200):
        chance = random.Random(seed)
        events = a_run(chance)
        bare = without_snapshots(events)
        holed = [event for event in events if chance.random() < 0.8]
        lists += [events, read_again(events, chance), repeated(bare, chance), in_other_pieces(events, chance), holed]
    states = await reduced_all([case(events) for events in lists])
    for events, state in zip(lists, states, strict=True):
        expected = fold(events, EMPTY)
        (message,) = state["messages"]
        assert message["content"] == expected.content
        assert message["tool_calls"] == msgspec.to_builtins(expected.tool_calls)
        assert message["metadata"]["run"]["reasoning"] == expected.reasoning


@pytest.mark.parametrize(
    "events",
    [
        [delta(0, "😀"), delta(2, "!")],
        [started(1)],
        [started(0), ended(1)],
        [think(1, "hm")],
        [think(0, "hm", offset=1)],
        [think(0, "hm", after=1)],
    ],
    ids=["delta", "tool call", "completed tool call", "reasoning", "part of reasoning", "text before reasoning"],
)
async def test_a_hole_is_seen_and_a_snapshot_closes_it(events: list[Event]) -> None:
    assert (await reduced(events))["hole"] is True
    healed = await reduced([*events, ThreadSnapshot(THREAD), delta(0, "😀"), delta(1, "!")])
    assert healed["hole"] is False
    assert healed["messages"][0]["content"] == "😀!"


@pytest.mark.parametrize(
    "late",
    [delta(5, "!"), started(0), ended(0), RunStarted(EMPTY), MessageSnapshot(EMPTY), think(0, "hm")],
    ids=lambda event: type(event).__name__,
)
async def test_a_finished_message_is_never_opened_again(late: Event) -> None:
    state = await reduced([RunCompleted(DONE), late])
    assert state["messages"] == [msgspec.to_builtins(DONE)]
    assert (state["hole"], state["reasoning"]) == (False, {})


async def test_messages_are_appended_once_and_replaced_after_that() -> None:
    question = replace(EMPTY, id="question", role="user", content="Hi", metadata={})
    created = MessageCreated(question)
    state = await reduced([created, RunStarted(EMPTY), created, delta(0, "Hello"), RunCompleted(DONE)], [])
    assert state["messages"] == msgspec.to_builtins([question, DONE])


async def test_messages_published_out_of_order_stand_in_the_order_in_which_they_were_created() -> None:
    """Facts of two processes about one thread may be published in another order than they were stored in."""
    first, second, third = [
        replace(EMPTY, id=name, role="system", created_at=f"2026-01-31T12:00:0{number}.000Z", metadata={})
        for number, name in enumerate(("first", "second", "third"))
    ]
    for order in ([third, first, second], [second, third, first, second]):
        state = await reduced([MessageCreated(message) for message in order], [])
        assert state["messages"] == msgspec.to_builtins([first, second, third])


async def test_the_later_thread_wins_and_its_messages_stay() -> None:
    later = replace(THREAD, title="later", updated_at="2026-01-31T12:00:02.000Z", messages=[])
    early = replace(later, title="early", updated_at="2026-01-31T12:00:01.000Z")
    state = await reduced([ThreadUpdated(later), ThreadUpdated(early)])
    assert state["thread"]["title"] == "later"
    assert state["messages"] == [msgspec.to_builtins(EMPTY)]
    assert (await reduced([ThreadDeleted(THREAD.id)]))["deleted"] is True


async def test_reasoning_that_the_server_does_not_store_and_progress_accumulate_aside() -> None:
    thoughts = [think(0, "h😀"), think(0, "h😀"), think(0, "😀m", offset=1)]
    progress = ToolCallProgress(EMPTY.id, "call_0", 0, 1.0, 2.0, "half")
    state = await reduced([*thoughts, delta(0, "😀"), started(0), progress], [NOT_STORING])
    assert state["reasoning"] == {EMPTY.id: [{"index": 0, "after": 0, "calls": 0, "text": "h😀m"}]}
    facts = {"id": "call_0", "offset": 1, "progress": 1, "total": 2, "message": "half"}
    assert state["calls"] == {f"{EMPTY.id}/0": facts}
    assert "reasoning" not in state["messages"][0]["metadata"]["run"]


async def test_a_late_viewer_of_reasoning_that_is_not_stored_gets_the_rest_of_it() -> None:
    rest = think(1, "ly?", offset=4)
    state = await reduced([rest, rest, think(1, "?!", offset=6)], [NOT_STORING])
    assert state["hole"] is False
    assert state["reasoning"][EMPTY.id] == [None, {"index": 1, "after": 0, "calls": 0, "text": "    ly?!"}]


async def test_an_unknown_message_and_an_unknown_event_change_nothing() -> None:
    before = await reduced([])
    assert await reduced([MessageDelta("other", 0, "x")]) == before
    unknown = {**case([]), "events": [{"type": "later.version", "message_id": EMPTY.id}]}
    assert (await reduced_all([unknown]))[0] == before


async def test_no_character_is_lost_or_doubled_over_a_network_that_breaks_repeatedly(server: Live) -> None:
    thread = await server.scripted_thread(mcp_servers=["demo"])
    script = 'think 🎈 hm\nsay # 🎈😀\ncount 150 5\nthink so\ntool calculate {"expression": "6*7"}\ncount 150 5'
    async with BreakingProxy(server.port, random.Random(1)) as proxy:
        seen = await node("watch.mjs", proxy.url, KEY, thread, script)
    stored = (await server.get(thread))["messages"][-1]
    assert seen["before"]["content"] == stored["content"]
    assert seen["before"]["tool_calls"] == stored["tool_calls"]
    assert seen["before"]["metadata"]["run"]["reasoning"] == stored["metadata"]["run"]["reasoning"]
    assert [block["text"] for block in stored["metadata"]["run"]["reasoning"]] == ["🎈 hm", "so"]
    assert proxy.cuts >= 2
    assert seen["snapshots"] == 1
    assert {"live", "reconnecting"} <= set(seen["statuses"])
    assert len((await server.get(thread))["messages"]) == 2


async def test_cancel_stops_the_run(server: Live) -> None:
    thread = await server.scripted_thread()
    await node("watch.mjs", server.url, KEY, thread, "count 10000 5", "cancel")
    assert (await server.get(thread))["messages"][-1]["metadata"]["run"]["status"] == "cancelled"


async def test_no_key_and_no_thread_are_final(server: Live) -> None:
    thread = await server.thread()
    missing = thread[:-1] + ("0" if thread[-1] != "0" else "1")
    refused, lost = await asyncio.gather(
        node("watch.mjs", server.url, "wrong-key", thread), node("watch.mjs", server.url, KEY, missing)
    )
    assert (refused["error"], refused["statuses"]) == ("unauthenticated", ["ended"])
    assert (lost["error"], lost["statuses"]) == ("thread_not_found", ["ended"])


async def test_a_broken_stream_resumes_at_its_position_and_a_gap_requests_a_snapshot() -> None:
    told = replace(EMPTY, content="Hello, wor")
    connections: list[list[tuple[str, Event]]] = [
        [("1", ThreadSnapshot(THREAD)), ("2", delta(0, "Hello"))],
        [("3", delta(7, "world"))],
        [("4", ThreadSnapshot(replace(THREAD, messages=[told]))), ("5", delta(10, "ld!"))],
        [("6", RunCompleted(DONE))],
    ]
    async with scripted_stream(connections) as (url, asked):
        seen = await node("watch.mjs", url, KEY, "/thread")
    assert asked == ["/thread/events", "/thread/events?after=2", "/thread/events", "/thread/events?after=5"]
    assert seen["before"]["content"] == "Hello, world!"
    assert seen["snapshots"] == 2
    assert (seen["statuses"][-1], seen["error"]) == ("live", None)
