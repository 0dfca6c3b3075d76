"""The EventLog: what follows a position is read whole, byte for byte, or it is a gap (I12, I13, I18)."""

from __future__ import annotations

import asyncio
import gc
import random
import weakref

import pytest

from agent_chat.server.reading.dialects.native import sse_frame, websocket_frame
from agent_chat.server.reading.queries import is_in_run, read_run_events
from agent_chat.stores.buffer import Entry
from agent_chat.stores.contracts import EventLog
from agent_chat.stores.errors import Gap
from agent_chat.stores.events import (
    MessageDelta,
    ToolCallProgress,
)
from agent_chat.stores.models import new_id
from tests.support.log_reading import (
    MEGABYTE,
    build_turn,
    decoded,
    frames_of,
    message_of,
    publish_all,
    raises_gap,
)
from tests.support.samples import (
    Lose,
    publish,
    read,
    rest,
)


async def test_a_position_consists_of_characters_that_headers_and_urls_allow(log: EventLog) -> None:
    thread_id = new_id()
    assert set(await log.tail(thread_id)) <= set("0123456789-")


async def test_a_cursor_replays_and_then_follows(log: EventLog) -> None:
    thread_id = new_id()
    question, _, events = build_turn(thread_id)
    start = await log.tail(thread_id)
    await publish(log, thread_id, *events[:4])
    cursor = log.cursor(thread_id, start)
    async with asyncio.timeout(5):
        replayed = await read(cursor, await log.tail(thread_id))
        following = asyncio.create_task(cursor.next())
        await asyncio.sleep(0)
        assert not following.done()
        await publish(log, thread_id, *events[4:])
        followed = await following
        followed += await read(cursor, await log.tail(thread_id))
    cursor.close()
    assert decoded(replayed + followed) == events
    assert message_of(replayed[0]) == question


async def test_next_waits_while_there_is_nothing_new(log: EventLog) -> None:
    thread_id = new_id()
    cursor = log.cursor(thread_id, await log.tail(thread_id))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await cursor.next()
    await publish(log, thread_id, MessageDelta("m", 0, "a"))
    async with asyncio.timeout(5):
        assert decoded(await cursor.next()) == [MessageDelta("m", 0, "a")]
    cursor.close()


async def test_resuming_at_every_position_gives_exactly_the_rest_byte_for_byte(log: EventLog) -> None:
    thread_id = new_id()
    events = [event for _ in range(5) for event in build_turn(thread_id, words=20)[2]]
    start, entries = await publish_all(log, thread_id, *events)
    assert decoded(entries) == events
    for n, position in enumerate([start] + [entry.position for entry in entries]):
        async with asyncio.timeout(5):
            assert frames_of(await rest(log, thread_id, position)) == frames_of(entries[n:])


async def test_another_cursor_can_continue_at_a_cursors_position(log: EventLog) -> None:
    thread_id = new_id()
    start, entries = await publish_all(log, thread_id, *build_turn(thread_id)[2])
    cursor = log.cursor(thread_id, start)
    assert cursor.position == start
    async with asyncio.timeout(5):
        while cursor.position != entries[-1].position:
            taken = await cursor.next()
            assert cursor.position == taken[-1].position
    cursor.close()


async def test_readers_that_join_during_writing_all_read_the_same(log: EventLog) -> None:
    thread_id, chance = new_id(), random.Random(1)
    start = await log.tail(thread_id)
    events = [MessageDelta("m", n, "x") for n in range(500)]
    readers: list[asyncio.Task[list[Entry]]] = []

    async def reader(after: str) -> list[Entry]:
        cursor, entries = log.cursor(thread_id, after), list[Entry]()
        while sum(len(getattr(event, "text", "")) for event in decoded(entries)) < len(events):
            entries += await cursor.next()
            if chance.random() < 0.3:
                cursor.close()
                cursor = log.cursor(thread_id, entries[-1].position)
        cursor.close()
        return entries

    writer = log.writer(thread_id)
    for n, event in enumerate(events):
        writer.write(event)
        if n % 25 == 0:
            readers.append(asyncio.create_task(reader(start)))
        if chance.random() < 0.2:
            await asyncio.sleep(0)
    async with asyncio.timeout(20):
        texts = {b"".join(entry.encoded(sse_frame) for entry in await task) for task in readers}
    assert texts == {b"".join(entry.encoded(sse_frame) for entry in await rest(log, thread_id, start))}


async def test_several_cursors_share_the_encoded_entries(log: EventLog) -> None:
    thread_id = new_id()
    start = await log.tail(thread_id)
    one, two = log.cursor(thread_id, start), log.cursor(thread_id, start)
    await publish(log, thread_id, *build_turn(thread_id)[2])
    upto = await log.tail(thread_id)
    async with asyncio.timeout(5):
        for a, b in zip(await read(one, upto), await read(two, upto), strict=True):
            assert a.encoded(sse_frame) is b.encoded(sse_frame)
            assert a.encoded(websocket_frame) is b.encoded(websocket_frame)
    one.close()
    two.close()


async def test_wake_makes_next_return_nothing_once(log: EventLog) -> None:
    thread_id = new_id()
    cursor = log.cursor(thread_id, await log.tail(thread_id))
    async with asyncio.timeout(5):
        cursor.wake()
        assert await cursor.next() == []
        waiting = asyncio.create_task(cursor.next())
        await asyncio.sleep(0)
        cursor.wake()
        assert await waiting == []
        waiting = asyncio.create_task(cursor.next())
        await asyncio.sleep(0)
        await publish(log, thread_id, MessageDelta("m", 0, "a"))
        assert decoded(await waiting) == [MessageDelta("m", 0, "a")]
    cursor.close()


async def test_a_wake_neither_delays_nor_loses_events(log: EventLog) -> None:
    thread_id = new_id()
    begin = await log.tail(thread_id)
    cursor, other = log.cursor(thread_id, begin), log.cursor(thread_id, begin)
    async with asyncio.timeout(5):
        await publish(log, thread_id, MessageDelta("m", 0, "a"))
        assert decoded(await other.next()) == [MessageDelta("m", 0, "a")]  # so it has arrived, for this one too
        cursor.wake()
        assert decoded(await cursor.next()) == [MessageDelta("m", 0, "a")]
        await publish(log, thread_id, MessageDelta("m", 1, "b"))
        assert decoded(await read(cursor, await log.tail(thread_id))) == [MessageDelta("m", 1, "b")]
    cursor.close()
    other.close()


async def test_a_cancelled_next_loses_nothing(log: EventLog) -> None:
    thread_id = new_id()
    cursor = log.cursor(thread_id, await log.tail(thread_id))
    waiting = asyncio.create_task(cursor.next())
    await asyncio.sleep(0)
    await publish(log, thread_id, MessageDelta("m", 0, "a"))
    waiting.cancel()
    taken = await asyncio.gather(waiting, return_exceptions=True)
    async with asyncio.timeout(5):
        if isinstance(taken[0], BaseException):
            assert decoded(await cursor.next()) == [MessageDelta("m", 0, "a")]
        await publish(log, thread_id, MessageDelta("m", 1, "b"))
        assert decoded(await cursor.next()) == [MessageDelta("m", 1, "b")]
    cursor.close()


async def test_a_closed_cursor_is_released(log: EventLog) -> None:
    thread_id = new_id()
    cursor = log.cursor(thread_id, await log.tail(thread_id))
    forgotten = weakref.ref(cursor)
    cursor.close()
    del cursor
    gc.collect()
    assert forgotten() is None


async def test_closing_a_cursor_twice_does_no_harm(log: EventLog) -> None:
    thread_id = new_id()
    cursor = log.cursor(thread_id, await log.tail(thread_id))
    cursor.close()
    cursor.close()


async def test_no_reader_gets_the_hidden_first_entry(log: EventLog, lose: Lose) -> None:
    thread_id = new_id()
    start = await log.tail(thread_id)
    assert start == await log.tail(thread_id)
    await publish(log, thread_id, MessageDelta("m", 0, "a"))
    assert [entry.type for entry in await rest(log, thread_id, start)] == ["message.delta"]
    await lose()
    _, entries = await publish_all(log, thread_id, MessageDelta("m", 1, "b"))
    assert [entry.type for entry in entries] == ["message.delta"]


async def test_the_logs_of_two_threads_are_separate(log: EventLog) -> None:
    one, two = new_id(), new_id()
    start_one, start_two = await log.tail(one), await log.tail(two)
    await publish(log, one, MessageDelta("m", 0, "one"))
    await publish(log, two, MessageDelta("m", 0, "two"))
    assert decoded(await rest(log, one, start_one)) == [MessageDelta("m", 0, "one")]
    assert decoded(await rest(log, two, start_two)) == [MessageDelta("m", 0, "two")]


@pytest.mark.parametrize(
    "position",
    ["", "0-0", "99999999999999-0", "nonsense", "-", "1-", "-1", "1e3-0", "$", "+", ">", "*", "1-1\n", "😀", "9" * 400],
)
async def test_an_invalid_position_is_a_gap(log: EventLog, position: str) -> None:
    thread_id = new_id()
    await publish(log, thread_id, MessageDelta("m", 0, "a"))
    assert await raises_gap(log.cursor(thread_id, position))
    with pytest.raises(Gap):
        await is_in_run(log, thread_id, position)
    with pytest.raises(Gap):
        await read_run_events(log, thread_id, "m", position)


async def test_a_position_of_another_thread_is_a_gap(log: EventLog) -> None:
    one, two = new_id(), new_id()
    await publish(log, one, MessageDelta("m", 0, "a"))
    await publish(log, two, MessageDelta("m", 0, "a"))
    elsewhere = await log.tail(two)
    assert await raises_gap(log.cursor(one, elsewhere))
    with pytest.raises(Gap):
        await is_in_run(log, one, elsewhere)
    with pytest.raises(Gap):
        await read_run_events(log, one, "m", elsewhere)


async def test_a_position_in_a_log_that_never_existed_is_a_gap(log: EventLog) -> None:
    elsewhere = await log.tail(new_id())
    assert await raises_gap(log.cursor(new_id(), elsewhere))


async def test_ten_thousand_events_are_retained_and_earlier_positions_are_a_gap(log: EventLog) -> None:
    thread_id = new_id()
    start = await log.tail(thread_id)
    writer = log.writer(thread_id)
    following, entries = log.cursor(thread_id, start), list[Entry]()
    async with asyncio.timeout(30):
        for n in range(12_000):
            writer.write(ToolCallProgress("m", "call_0", 0, n, None, None))
            if n % 1000 == 999:
                await writer.flush()
                entries += await read(following, await log.tail(thread_id))
        assert len(entries) == 12_000
        assert await raises_gap(log.cursor(thread_id, start))
        assert await raises_gap(log.cursor(thread_id, entries[0].position))
        assert frames_of(await rest(log, thread_id, entries[2001].position)) == frames_of(entries[2002:])
    following.close()
    with pytest.raises(Gap):
        await is_in_run(log, thread_id, start)
    with pytest.raises(Gap):
        await read_run_events(log, thread_id, "m", entries[0].position)


@pytest.mark.slow
async def test_a_reader_behind_what_was_trimmed_gets_a_gap(log: EventLog) -> None:
    thread_id = new_id()
    slow = log.cursor(thread_id, await log.tail(thread_id))
    await publish(log, thread_id, *[ToolCallProgress("m", "call_0", 0, n, None, None) for n in range(12_000)])
    assert await raises_gap(slow)


async def test_eight_megabytes_are_retained_and_earlier_positions_are_a_gap(log: EventLog) -> None:
    thread_id = new_id()
    start = await log.tail(thread_id)
    following, entries = log.cursor(thread_id, start), list[Entry]()
    async with asyncio.timeout(30):
        for _ in range(20):
            await publish(log, thread_id, MessageDelta("m", 0, "x" * MEGABYTE))
            entries += await following.next()
        assert len(entries) == 20
        assert await raises_gap(log.cursor(thread_id, start))
        assert await raises_gap(log.cursor(thread_id, entries[9].position))
        assert frames_of(await rest(log, thread_id, entries[-7].position)) == frames_of(entries[-6:])
    following.close()


async def test_an_expired_log_is_a_gap(log: EventLog, lose: Lose) -> None:
    thread_id = new_id()
    await publish(log, thread_id, *build_turn(thread_id)[2])
    position = await log.tail(thread_id)
    following = log.cursor(thread_id, position)
    waiting = asyncio.create_task(following.next())
    await asyncio.sleep(0)
    await lose()
    await publish(log, thread_id, MessageDelta("m", 0, "a"))
    with pytest.raises(Gap):
        async with asyncio.timeout(5):
            await waiting
    following.close()
    assert await raises_gap(log.cursor(thread_id, position))
    with pytest.raises(Gap):
        await is_in_run(log, thread_id, position)
    with pytest.raises(Gap):
        await read_run_events(log, thread_id, "m", position)


async def test_positions_are_never_used_twice(log: EventLog, lose: Lose) -> None:
    thread_id, positions = new_id(), list[str]()
    for _ in range(5):
        start, entries = await publish_all(log, thread_id, *build_turn(thread_id)[2])
        positions += [start] + [entry.position for entry in entries]
        await lose()
    assert len(set(positions)) == len(positions)


async def test_a_signal_calls_every_callback(log: EventLog) -> None:
    received: list[tuple[int, str]] = []
    both = asyncio.Event()

    def listen(listener: int, run_id: str) -> None:
        received.append((listener, run_id))
        if len(received) == 2:
            both.set()

    log.on_signal(lambda run_id: listen(1, run_id))
    log.on_signal(lambda run_id: listen(2, run_id))
    await log.signal("run")
    async with asyncio.timeout(5):
        await both.wait()
    assert sorted(received) == [(1, "run"), (2, "run")]


async def test_a_signal_without_callbacks_does_no_harm(log: EventLog) -> None:
    await log.signal("run")


async def test_backwards_yields_every_entry_from_a_position_to_the_oldest(log: EventLog) -> None:
    thread_id = new_id()
    start, entries = await publish_all(
        log, thread_id, *[ToolCallProgress("m", "call_0", 0, n, None, None) for n in range(120)]
    )
    positions = [start] + [entry.position for entry in entries]
    for number in (0, 1, 60, 120):
        found = [entry.position async for entry in log.backwards(thread_id, positions[number])]
        assert found == positions[number::-1]
    assert [entry.position async for entry in log.backwards(thread_id)] == positions[::-1]


async def test_backwards_from_a_position_that_is_not_in_the_log_is_a_gap(log: EventLog) -> None:
    thread_id = new_id()
    elsewhere = await log.tail(new_id())
    await log.tail(thread_id)
    for position in (elsewhere, "nonsense"):
        with pytest.raises(Gap):
            await anext(log.backwards(thread_id, position))
