"""The EventLog: what follows a position is given whole, byte for byte, or not at all."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import weakref

import pytest
from msgspec.structs import replace

from agent_chat.server.reading.dialects.native import sse_frame, websocket_frame
from agent_chat.server.reading.queries import find_turn, is_in_run, read_run_events
from agent_chat.stores.buffer import Cursor, Entry
from agent_chat.stores.contracts import EventLog, LogWriter
from agent_chat.stores.errors import Gap, LogDeleted
from agent_chat.stores.events import (
    Event,
    MessageCreated,
    MessageDelta,
    MessageSnapshot,
    ReasoningDelta,
    RunCompleted,
    RunError,
    RunFailed,
    RunStarted,
    ThreadDeleted,
    ThreadUpdated,
    ToolCallCompleted,
    ToolCallProgress,
    ToolCallStarted,
    decode,
    encode,
    terminal_event,
)
from agent_chat.stores.fold import Fold, fold
from agent_chat.stores.models import Message, new_id
from tests.support.samples import (
    AWKWARD,
    Lose,
    awkward_call,
    completed,
    failed,
    new_message,
    new_principal,
    new_thread,
    read,
    rest,
    say,
    turn,
)

NOW = "2026-01-31T12:00:00.000Z"
MEGABYTE = 2**20


def a_turn(thread_id: str, words: int = 5) -> tuple[Message, Message, list[Event]]:
    """A question, its finished answer, and all that the log is told about them."""
    question, answer = turn(thread_id)
    events: list[Event] = [MessageCreated(question), RunStarted(answer), ReasoningDelta(answer.id, 0, "hm 😀")]
    offset = 0
    for word in [f"wörd{n}😀\r\n " for n in range(words)]:
        events.append(MessageDelta(answer.id, offset, word))
        offset += len(word)
    call = awkward_call()
    events += [
        ToolCallStarted(answer.id, 0, call.tool_name, AWKWARD, call.start_time),
        ToolCallProgress(answer.id, 0, 1, 2.5, None),
        ToolCallCompleted(answer.id, 0, call),
    ]
    final = fold(events, answer).with_run(status="completed")
    return question, final, [*events, terminal_event(final)]


def told(entries: list[Entry]) -> list[Event]:
    return [decode(entry.data) for entry in entries]


def on_the_wire(entries: list[Entry]) -> list[tuple[bytes, str]]:
    return [(entry.encoded(sse_frame), entry.encoded(websocket_frame)) for entry in entries]


async def gap(cursor: Cursor) -> bool:
    """True if the cursor's next answer is a Gap."""
    try:
        async with asyncio.timeout(5):
            await cursor.next()
    except Gap:
        return True
    finally:
        cursor.close()
    return False


async def all_entries(log: EventLog, thread_id: str, *events: Event) -> tuple[str, list[Entry]]:
    """Say the events in a new log; the position before them, and their entries."""
    before = await log.tail(thread_id)
    await say(log, thread_id, *events)
    return before, await rest(log, thread_id, before)


# what is in a frame


async def test_an_sse_frame_is_event_data_and_id_with_lf_and_a_blank_line(log: EventLog) -> None:
    event = MessageDelta("m", 0, "a\r\nb\u2028\u0085 😀")
    _, [entry] = await all_entries(log, new_id(), event)
    data = encode(event)
    assert (
        entry.encoded(sse_frame)
        == b"event: message.delta\ndata: " + data + b"\nid: " + entry.position.encode() + b"\n\n"
    )
    assert b"\r" not in entry.encoded(sse_frame)
    assert entry.encoded(sse_frame).count(b"\n") == 4


async def test_a_websocket_frame_is_the_same_object_with_its_position_inside(log: EventLog) -> None:
    _, _, events = a_turn("thread")
    _, entries = await all_entries(log, new_id(), *events)
    for entry, event in zip(entries, events, strict=True):
        assert json.loads(entry.encoded(websocket_frame)) == {**json.loads(encode(event)), "position": entry.position}
        assert entry.encoded(websocket_frame).startswith('{"type":')


async def test_a_position_can_stand_in_a_header_and_in_a_url(log: EventLog) -> None:
    thread_id = new_id()
    assert set(await log.tail(thread_id)) <= set("0123456789-")


# replay and follow


async def test_a_cursor_replays_and_then_follows(log: EventLog) -> None:
    thread_id = new_id()
    question, _, events = a_turn(thread_id)
    start = await log.tail(thread_id)
    await say(log, thread_id, *events[:4])
    cursor = log.cursor(thread_id, start)
    async with asyncio.timeout(5):
        replayed = await read(cursor, await log.tail(thread_id))
        following = asyncio.create_task(cursor.next())
        await asyncio.sleep(0)
        assert not following.done()
        await say(log, thread_id, *events[4:])
        followed = await following
        followed += await read(cursor, await log.tail(thread_id))
    cursor.close()
    assert told(replayed + followed) == events
    assert message_of(replayed[0]) == question


def message_of(entry: Entry) -> Message:
    event = decode(entry.data)
    assert isinstance(event, MessageCreated)
    return event.message


async def test_next_waits_while_there_is_nothing_new(log: EventLog) -> None:
    thread_id = new_id()
    cursor = log.cursor(thread_id, await log.tail(thread_id))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await cursor.next()
    await say(log, thread_id, MessageDelta("m", 0, "a"))
    async with asyncio.timeout(5):
        assert told(await cursor.next()) == [MessageDelta("m", 0, "a")]
    cursor.close()


async def test_resuming_at_every_position_gives_exactly_the_rest_byte_for_byte(log: EventLog) -> None:
    thread_id = new_id()
    events = [event for _ in range(5) for event in a_turn(thread_id, words=20)[2]]
    start, entries = await all_entries(log, thread_id, *events)
    assert told(entries) == events
    for n, position in enumerate([start] + [entry.position for entry in entries]):
        async with asyncio.timeout(5):
            assert on_the_wire(await rest(log, thread_id, position)) == on_the_wire(entries[n:])


async def test_a_cursors_position_is_where_another_may_go_on(log: EventLog) -> None:
    thread_id = new_id()
    start, entries = await all_entries(log, thread_id, *a_turn(thread_id)[2])
    cursor = log.cursor(thread_id, start)
    assert cursor.position == start
    async with asyncio.timeout(5):
        while cursor.position != entries[-1].position:
            taken = await cursor.next()
            assert cursor.position == taken[-1].position
    cursor.close()


async def test_readers_that_come_while_it_is_written_all_read_the_same(log: EventLog) -> None:
    thread_id, chance = new_id(), random.Random(1)
    start = await log.tail(thread_id)
    events = [MessageDelta("m", n, "x") for n in range(500)]
    readers: list[asyncio.Task[list[Entry]]] = []

    async def reader(after: str) -> list[Entry]:
        cursor, entries = log.cursor(thread_id, after), list[Entry]()
        while sum(len(getattr(event, "text", "")) for event in told(entries)) < len(events):
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
    await say(log, thread_id, *a_turn(thread_id)[2])
    upto = await log.tail(thread_id)
    async with asyncio.timeout(5):
        for a, b in zip(await read(one, upto), await read(two, upto), strict=True):
            assert a.encoded(sse_frame) is b.encoded(sse_frame)
            assert a.encoded(websocket_frame) is b.encoded(websocket_frame)
    one.close()
    two.close()


async def test_wake_makes_next_answer_nothing_once(log: EventLog) -> None:
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
        await say(log, thread_id, MessageDelta("m", 0, "a"))
        assert told(await waiting) == [MessageDelta("m", 0, "a")]
    cursor.close()


async def test_a_wake_puts_off_nothing_and_loses_nothing(log: EventLog) -> None:
    thread_id = new_id()
    begin = await log.tail(thread_id)
    cursor, other = log.cursor(thread_id, begin), log.cursor(thread_id, begin)
    async with asyncio.timeout(5):
        await say(log, thread_id, MessageDelta("m", 0, "a"))
        assert told(await other.next()) == [MessageDelta("m", 0, "a")]  # so it has come, for this one too
        cursor.wake()
        assert told(await cursor.next()) == [MessageDelta("m", 0, "a")]
        await say(log, thread_id, MessageDelta("m", 1, "b"))
        assert told(await read(cursor, await log.tail(thread_id))) == [MessageDelta("m", 1, "b")]
    cursor.close()
    other.close()


async def test_a_next_that_was_cancelled_loses_nothing(log: EventLog) -> None:
    thread_id = new_id()
    cursor = log.cursor(thread_id, await log.tail(thread_id))
    waiting = asyncio.create_task(cursor.next())
    await asyncio.sleep(0)
    await say(log, thread_id, MessageDelta("m", 0, "a"))
    waiting.cancel()
    taken = await asyncio.gather(waiting, return_exceptions=True)
    async with asyncio.timeout(5):
        if isinstance(taken[0], BaseException):
            assert told(await cursor.next()) == [MessageDelta("m", 0, "a")]
        await say(log, thread_id, MessageDelta("m", 1, "b"))
        assert told(await cursor.next()) == [MessageDelta("m", 1, "b")]
    cursor.close()


async def test_a_closed_cursor_is_forgotten(log: EventLog) -> None:
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


async def test_the_hidden_first_entry_is_shown_to_nobody(log: EventLog, lose: Lose) -> None:
    thread_id = new_id()
    start = await log.tail(thread_id)
    assert start == await log.tail(thread_id)
    await say(log, thread_id, MessageDelta("m", 0, "a"))
    assert [entry.type for entry in await rest(log, thread_id, start)] == ["message.delta"]
    await lose()
    _, entries = await all_entries(log, thread_id, MessageDelta("m", 1, "b"))
    assert [entry.type for entry in entries] == ["message.delta"]


async def test_logs_of_other_threads_are_apart(log: EventLog) -> None:
    one, two = new_id(), new_id()
    start_one, start_two = await log.tail(one), await log.tail(two)
    await say(log, one, MessageDelta("m", 0, "one"))
    await say(log, two, MessageDelta("m", 0, "two"))
    assert told(await rest(log, one, start_one)) == [MessageDelta("m", 0, "one")]
    assert told(await rest(log, two, start_two)) == [MessageDelta("m", 0, "two")]


async def test_two_writers_interleave_each_in_its_order(log: EventLog) -> None:
    thread_id, chance = new_id(), random.Random(2)
    start = await log.tail(thread_id)
    writers = {"a": log.writer(thread_id), "b": log.writer(thread_id)}
    wanted: dict[str, list[Event]] = {"a": [], "b": []}
    for n in range(200):
        name = chance.choice("ab")
        call = ToolCallStarted(name, n, "look", {}, NOW)
        wanted[name].append(call)
        writers[name].write(call)
        if chance.random() < 0.1:
            await asyncio.sleep(0)
    for writer in writers.values():
        await writer.flush()
    said = told(await rest(log, thread_id, start))
    for name, events in wanted.items():
        assert [event for event in said if isinstance(event, ToolCallStarted) and event.message_id == name] == events
    assert len(said) == 200


# gaps


@pytest.mark.parametrize(
    "position",
    ["", "0-0", "99999999999999-0", "nonsense", "-", "1-", "-1", "1e3-0", "$", "+", ">", "*", "1-1\n", "😀", "9" * 400],
)
async def test_a_position_that_is_none_is_a_gap(log: EventLog, position: str) -> None:
    thread_id = new_id()
    await say(log, thread_id, MessageDelta("m", 0, "a"))
    assert await gap(log.cursor(thread_id, position))
    with pytest.raises(Gap):
        await is_in_run(log, thread_id, position)
    with pytest.raises(Gap):
        await read_run_events(log, thread_id, "m", position)


async def test_a_position_of_another_thread_is_a_gap(log: EventLog) -> None:
    one, two = new_id(), new_id()
    await say(log, one, MessageDelta("m", 0, "a"))
    await say(log, two, MessageDelta("m", 0, "a"))
    elsewhere = await log.tail(two)
    assert await gap(log.cursor(one, elsewhere))
    with pytest.raises(Gap):
        await is_in_run(log, one, elsewhere)
    with pytest.raises(Gap):
        await read_run_events(log, one, "m", elsewhere)


async def test_a_position_in_a_log_that_was_never_there_is_a_gap(log: EventLog) -> None:
    elsewhere = await log.tail(new_id())
    assert await gap(log.cursor(new_id(), elsewhere))


async def test_ten_thousand_events_are_kept_and_what_is_behind_them_is_a_gap(log: EventLog) -> None:
    thread_id = new_id()
    start = await log.tail(thread_id)
    writer = log.writer(thread_id)
    following, entries = log.cursor(thread_id, start), list[Entry]()
    async with asyncio.timeout(30):
        for n in range(12_000):
            writer.write(ToolCallProgress("m", 0, n, None, None))
            if n % 1000 == 999:
                await writer.flush()
                entries += await read(following, await log.tail(thread_id))
        assert len(entries) == 12_000
        assert await gap(log.cursor(thread_id, start))
        assert await gap(log.cursor(thread_id, entries[0].position))
        assert on_the_wire(await rest(log, thread_id, entries[2001].position)) == on_the_wire(entries[2002:])
    following.close()
    with pytest.raises(Gap):
        await is_in_run(log, thread_id, start)
    with pytest.raises(Gap):
        await read_run_events(log, thread_id, "m", entries[0].position)


@pytest.mark.slow
async def test_a_reader_that_lagged_behind_a_trimmed_log_gets_a_gap(log: EventLog) -> None:
    thread_id = new_id()
    slow = log.cursor(thread_id, await log.tail(thread_id))
    await say(log, thread_id, *[ToolCallProgress("m", 0, n, None, None) for n in range(12_000)])
    assert await gap(slow)


async def test_eight_megabytes_are_kept_and_what_is_behind_them_is_a_gap(log: EventLog) -> None:
    thread_id = new_id()
    start = await log.tail(thread_id)
    following, entries = log.cursor(thread_id, start), list[Entry]()
    async with asyncio.timeout(30):
        for _ in range(20):
            await say(log, thread_id, MessageDelta("m", 0, "x" * MEGABYTE))
            entries += await following.next()
        assert len(entries) == 20
        assert await gap(log.cursor(thread_id, start))
        assert await gap(log.cursor(thread_id, entries[9].position))
        assert on_the_wire(await rest(log, thread_id, entries[-7].position)) == on_the_wire(entries[-6:])
    following.close()


async def test_an_expired_log_is_a_gap(log: EventLog, lose: Lose) -> None:
    thread_id = new_id()
    await say(log, thread_id, *a_turn(thread_id)[2])
    position = await log.tail(thread_id)
    following = log.cursor(thread_id, position)
    waiting = asyncio.create_task(following.next())
    await asyncio.sleep(0)
    await lose()
    await say(log, thread_id, MessageDelta("m", 0, "a"))
    with pytest.raises(Gap):
        async with asyncio.timeout(5):
            await waiting
    following.close()
    assert await gap(log.cursor(thread_id, position))
    with pytest.raises(Gap):
        await is_in_run(log, thread_id, position)
    with pytest.raises(Gap):
        await read_run_events(log, thread_id, "m", position)


async def test_positions_are_never_repeated(log: EventLog, lose: Lose) -> None:
    thread_id, positions = new_id(), list[str]()
    for _ in range(5):
        start, entries = await all_entries(log, thread_id, *a_turn(thread_id)[2])
        positions += [start] + [entry.position for entry in entries]
        await lose()
    assert len(set(positions)) == len(positions)


# a log that was lost


async def test_a_writer_whose_log_was_lost_says_a_snapshot_in_place_of_deltas_and_goes_on(
    log: EventLog, lose: Lose
) -> None:
    thread_id = new_id()
    _, answer = turn(thread_id)
    folding = Fold(answer)
    writer = log.writer(thread_id, lambda: MessageSnapshot(folding.message()))

    async def write(*events: Event) -> None:
        for event in events:
            folding.apply(event)
            writer.write(event)
        await writer.flush()

    await write(RunStarted(answer), MessageDelta(answer.id, 0, "Hel"))
    await lose()
    start = await log.tail(thread_id)
    await write(MessageDelta(answer.id, 3, "lo"))
    so_far = replace(answer, content="Hello")
    assert told(await rest(log, thread_id, start)) == [MessageSnapshot(so_far)]
    await write(MessageDelta(answer.id, 5, "!"))
    assert told(await rest(log, thread_id, start)) == [MessageSnapshot(so_far), MessageDelta(answer.id, 5, "!")]


async def test_a_writer_whose_log_was_lost_says_its_terminal_event_behind_the_snapshot(
    log: EventLog, lose: Lose
) -> None:
    thread_id = new_id()
    _, answer = turn(thread_id)
    so_far = replace(answer, content="Hello")
    writer = log.writer(thread_id, lambda: MessageSnapshot(so_far))
    writer.write(RunStarted(answer))
    await writer.flush()
    await lose()
    final = completed(answer, "Hello")
    writer.write(RunCompleted(final))
    await writer.flush()
    assert await read_run_events(log, thread_id, answer.id, await log.tail(thread_id)) == [RunCompleted(final)]
    start = await log.tail(thread_id)
    await lose()
    start = await log.tail(thread_id)
    writer.write(RunCompleted(final))
    await writer.flush()
    assert told(await rest(log, thread_id, start)) == [MessageSnapshot(so_far), RunCompleted(final)]


@pytest.mark.slow
async def test_a_writer_whose_last_entry_was_trimmed_says_a_snapshot(log: EventLog) -> None:
    thread_id = new_id()
    _, answer = turn(thread_id)
    writer = log.writer(thread_id, lambda: MessageSnapshot(answer))
    writer.write(RunStarted(answer))
    await writer.flush()
    await say(log, thread_id, *[ToolCallProgress("m", 0, n, None, None) for n in range(12_000)])
    start = await log.tail(thread_id)
    writer.write(MessageDelta(answer.id, 0, "a"))
    await writer.flush()
    assert told(await rest(log, thread_id, start)) == [MessageSnapshot(answer)]


async def test_a_writer_that_has_not_written_yet_misses_nothing_when_the_log_is_lost(log: EventLog, lose: Lose) -> None:
    thread_id = new_id()
    _, answer = turn(thread_id)
    writer = log.writer(thread_id, lambda: MessageSnapshot(answer))
    await log.tail(thread_id)
    await lose()
    start = await log.tail(thread_id)
    writer.write(RunStarted(answer))
    await writer.flush()
    assert told(await rest(log, thread_id, start)) == [RunStarted(answer)]


async def test_a_writer_without_a_snapshot_just_goes_on(log: EventLog, lose: Lose) -> None:
    thread_id = new_id()
    updated = ThreadUpdated(new_thread(new_principal()))
    writer = log.writer(thread_id)
    writer.write(updated)
    await writer.flush()
    await lose()
    start = await log.tail(thread_id)
    writer.write(updated)
    await writer.flush()
    assert told(await rest(log, thread_id, start)) == [updated]


# a run that somebody else has ended


@pytest.mark.parametrize("late", ["part", "end"])
async def test_of_a_run_that_somebody_else_has_ended_nothing_more_is_said(log: EventLog, late: str) -> None:
    thread_id = new_id()
    asked, answer = turn(thread_id)
    paused, other = log.writer(thread_id, lambda: MessageSnapshot(answer)), log.writer(thread_id)
    await written(paused, RunStarted(answer))
    await written(other, ToolCallProgress("another run", 0, 1, None, None))
    await written(paused, MessageDelta(answer.id, 0, "in time"))
    end = RunFailed(answer, RunError("interrupted", "It stopped.", retryable=True))
    await written(other, end)
    last = await log.tail(thread_id)
    await written(paused, MessageDelta(answer.id, 7, "too late") if late == "part" else RunCompleted(answer))
    await written(paused, MessageDelta(answer.id, 15, "much too late"))
    assert await log.tail(thread_id) == last
    await written(paused, MessageCreated(asked))
    assert await log.tail(thread_id) != last


# a log that is deleted


async def written(writer: LogWriter, event: Event) -> None:
    """Write and flush: a writer far from its log learns of the deletion by the second."""
    writer.write(event)
    await writer.flush()


async def test_a_deleted_log_refuses_every_writer(log: EventLog) -> None:
    thread_id = new_id()
    before = log.writer(thread_id)
    before.write(MessageDelta("m", 0, "a"))
    await before.flush()
    await say(log, thread_id, ThreadDeleted(thread_id))
    last = await log.tail(thread_id)
    for writer in (before, log.writer(thread_id), log.writer(thread_id, lambda: MessageSnapshot(new_message("t")))):
        with pytest.raises(LogDeleted):
            await written(writer, MessageDelta("m", 1, "b"))
    assert await log.tail(thread_id) == last


async def test_the_readers_of_a_deleted_log_get_its_last_entry(log: EventLog) -> None:
    thread_id = new_id()
    start = await log.tail(thread_id)
    cursor = log.cursor(thread_id, start)
    await say(log, thread_id, MessageDelta("m", 0, "a"), ThreadDeleted(thread_id))
    async with asyncio.timeout(5):
        said = told(await read(cursor, await log.tail(thread_id)))
    cursor.close()
    assert said == [MessageDelta("m", 0, "a"), ThreadDeleted(thread_id)]
    assert told(await rest(log, thread_id, start)) == said


# find


async def test_find_gives_the_position_from_which_a_turn_is_read(log: EventLog) -> None:
    thread_id = new_id()
    first, one, said_first = a_turn(thread_id)
    second, two, said_then = a_turn(thread_id)
    await say(log, thread_id, *said_first, *said_then)
    for question, answer, events in ((first, one, said_first + said_then), (second, two, said_then)):
        for run_id in (answer.id, None):
            position = await find_turn(log, thread_id, question.id, run_id)
            assert position is not None
            assert told(await rest(log, thread_id, position)) == events


async def test_find_gives_the_position_before_a_message_that_started_no_run(log: EventLog) -> None:
    thread_id = new_id()
    note = MessageCreated(new_message(thread_id, role="system"))
    _, _, events = a_turn(thread_id)
    await say(log, thread_id, *events[:4], note, *events[4:])
    position = await find_turn(log, thread_id, note.message.id, None)
    assert position is not None
    assert told(await rest(log, thread_id, position)) == [note, *events[4:]]


async def test_find_tells_the_runs_of_one_question_apart(log: EventLog) -> None:
    thread_id = new_id()
    question, one = turn(thread_id)
    _, two = turn(thread_id)
    start = await log.tail(thread_id)
    await say(log, thread_id, MessageCreated(question), RunStarted(one), terminal_event(failed(one, retryable=True)))
    between = await log.tail(thread_id)
    assert await find_turn(log, thread_id, question.id, two.id) is None
    await say(log, thread_id, MessageCreated(question))
    assert await find_turn(log, thread_id, question.id, two.id) is None
    await say(log, thread_id, RunStarted(two), RunCompleted(completed(two)))
    assert await find_turn(log, thread_id, question.id, one.id) == start
    assert await find_turn(log, thread_id, question.id, two.id) == between
    assert await find_turn(log, thread_id, question.id, None) == start


async def test_find_gives_the_first_time_that_a_message_was_said(log: EventLog) -> None:
    thread_id = new_id()
    question, answer, events = a_turn(thread_id)
    start = await log.tail(thread_id)
    await say(log, thread_id, *events[:-1], MessageCreated(question), events[-1])
    assert await find_turn(log, thread_id, question.id, answer.id) == start
    assert await find_turn(log, thread_id, question.id, None) == start


async def test_find_gives_nothing_for_what_the_log_does_not_hold(log: EventLog, lose: Lose) -> None:
    thread_id = new_id()
    question, answer, events = a_turn(thread_id)
    for run_id in (answer.id, None):
        assert await find_turn(log, thread_id, question.id, run_id) is None
    await say(log, thread_id, *events)
    for run_id in (answer.id, None):
        assert await find_turn(log, thread_id, new_id(), run_id) is None
        assert await find_turn(log, new_id(), question.id, run_id) is None
    assert await find_turn(log, thread_id, answer.id, None) is None
    assert await find_turn(log, thread_id, question.id, new_id()) is None
    await lose()
    for run_id in (answer.id, None):
        assert await find_turn(log, thread_id, question.id, run_id) is None


@pytest.mark.slow
async def test_find_gives_nothing_for_what_was_trimmed_away(log: EventLog) -> None:
    thread_id = new_id()
    question, answer, events = a_turn(thread_id)
    await say(log, thread_id, *events)
    await say(log, thread_id, *[ToolCallProgress("m", 0, n, None, None) for n in range(12_000)])
    for run_id in (answer.id, None):
        assert await find_turn(log, thread_id, question.id, run_id) is None


# in_run


async def in_run_after_each(log: EventLog, *events: Event) -> list[bool]:
    """`in_run` at the log's start and at each event's position, asked when all have been said."""
    thread_id = new_id()
    start, entries = await all_entries(log, thread_id, *events)
    return [await is_in_run(log, thread_id, position) for position in [start] + [entry.position for entry in entries]]


async def test_a_reader_is_in_a_run_from_its_question_until_its_terminal_event(log: EventLog) -> None:
    _, _, events = a_turn("thread")
    expected = [False] + [True] * (len(events) - 1) + [False]
    assert await in_run_after_each(log, *events) == expected
    assert await in_run_after_each(log, *events, *a_turn("thread")[2]) == expected + expected[1:]


@pytest.mark.parametrize("ending", ["completed", "failed", "cancelled"])
async def test_every_terminal_event_ends_the_run(log: EventLog, ending: str) -> None:
    question, answer = turn("thread")
    error = {"code": "agent_failed", "detail": "It broke.", "retryable": False}
    final = terminal_event(answer.with_run(status=ending, error=error))
    assert (await in_run_after_each(log, MessageCreated(question), RunStarted(answer), final))[-1] is False


async def test_facts_about_the_thread_and_stored_messages_neither_begin_nor_end_a_run(log: EventLog) -> None:
    _, _, events = a_turn("thread")
    facts: list[Event] = [
        ThreadUpdated(new_thread(new_principal())),
        MessageCreated(new_message("thread", "note", "assistant")),
        MessageCreated(new_message("thread", "note", "system")),
    ]
    assert await in_run_after_each(log, *facts) == [False] * 4
    assert (await in_run_after_each(log, *events[:3], *facts))[-3:] == [True] * 3
    assert (await in_run_after_each(log, *events, *facts))[-3:] == [False] * 3


async def test_a_snapshot_of_a_running_message_is_within_its_run(log: EventLog) -> None:
    _, answer = turn("thread")
    assert await in_run_after_each(log, MessageSnapshot(answer), MessageDelta(answer.id, 0, "a")) == [False, True, True]


async def test_what_a_paused_worker_says_after_the_end_does_not_begin_the_run_again(log: EventLog) -> None:
    question, answer = turn("thread")
    late: list[Event] = [MessageDelta(answer.id, 0, "late"), MessageSnapshot(answer)]
    said = await in_run_after_each(
        log, MessageCreated(question), RunStarted(answer), RunCompleted(completed(answer)), *late
    )
    assert said == [False, True, True, False, False, False]


async def test_a_question_said_again_before_an_interrupted_run_fails_does_not_begin_another(log: EventLog) -> None:
    question, answer = turn("thread")
    end = terminal_event(failed(answer, retryable=True))
    said = await in_run_after_each(log, MessageCreated(question), RunStarted(answer), MessageCreated(question), end)
    assert said == [False, True, True, True, False]


async def test_a_terminal_event_said_late_does_not_end_the_next_run(log: EventLog) -> None:
    first, one = turn("thread")
    second, two = turn("thread")
    end = RunCompleted(completed(one))
    begin: list[Event] = [MessageCreated(first), RunStarted(one)]
    said = await in_run_after_each(log, *begin, MessageCreated(second), end, RunStarted(two))
    assert said == [False, True, True, True, True, True]
    said = await in_run_after_each(log, *begin, MessageCreated(second), RunStarted(two), end)
    assert said == [False, True, True, True, True, True]


# run_events


async def run_events(log: EventLog, run_id: str, *events: Event, upto: int | None = None) -> list[Event]:
    """`run_events` of a log of these events, up to and including the one numbered `upto`, or all."""
    thread_id = new_id()
    _, entries = await all_entries(log, thread_id, *events)
    return await read_run_events(log, thread_id, run_id, entries[-1 if upto is None else upto].position)


async def test_run_events_are_the_runs_own_from_its_start_up_to_the_position(log: EventLog) -> None:
    _, one, before = a_turn("thread")
    _, two, events = a_turn("thread")
    fact = ThreadUpdated(new_thread(new_principal()))
    thread = [*before, *events[:3], fact, *events[3:]]
    running = len(before) + 5
    assert await run_events(log, two.id, *thread, upto=running) == events[1:5]
    assert await run_events(log, two.id, *thread, upto=len(before) + 1) == events[1:2]
    assert await run_events(log, two.id, *thread, upto=len(before)) == []
    assert await run_events(log, one.id, *thread, upto=len(before) - 2) == before[1:-1]


async def test_run_events_begin_at_the_newest_snapshot_or_terminal_event(log: EventLog) -> None:
    _, answer = turn("thread")
    snapshot = MessageSnapshot(replace(answer, content="ab"))
    end = RunCompleted(completed(answer))
    early: list[Event] = [RunStarted(answer), MessageDelta(answer.id, 0, "a"), snapshot]
    more = MessageDelta(answer.id, 2, "c")
    assert await run_events(log, answer.id, *early, more) == [snapshot, more]
    assert await run_events(log, answer.id, *early, snapshot, more) == [snapshot, more]
    assert await run_events(log, answer.id, *early, more, end) == [end]
    assert await run_events(log, answer.id, *early, end, more) == [end, more]


async def test_run_events_begin_at_the_logs_start_where_it_holds_no_beginning(log: EventLog) -> None:
    events = [MessageDelta("run", 7, "a"), MessageDelta("other", 0, "x"), MessageDelta("run", 8, "b")]
    assert await run_events(log, "run", *events) == [events[0], events[2]]
    assert await run_events(log, "unknown", *events) == []


async def test_run_events_at_the_start_of_a_log_are_none(log: EventLog) -> None:
    thread_id = new_id()
    assert await read_run_events(log, thread_id, "run", await log.tail(thread_id)) == []


async def test_the_fold_of_run_events_has_the_content_of_the_stored_message(log: EventLog) -> None:
    thread_id = new_id()
    _, final, events = a_turn(thread_id, words=50)
    _, entries = await all_entries(log, thread_id, *events[:-1])
    _, bare = turn(thread_id)
    folded = fold(await read_run_events(log, thread_id, final.id, entries[-1].position), bare)
    assert (folded.content, folded.tool_calls) == (final.content, final.tool_calls)


# signal


async def test_a_signal_calls_everyone_who_listens(log: EventLog) -> None:
    heard: list[tuple[int, str]] = []
    both = asyncio.Event()

    def listen(principal: int, run_id: str) -> None:
        heard.append((principal, run_id))
        if len(heard) == 2:
            both.set()

    log.on_signal(lambda run_id: listen(1, run_id))
    log.on_signal(lambda run_id: listen(2, run_id))
    await log.signal("run")
    async with asyncio.timeout(5):
        await both.wait()
    assert sorted(heard) == [(1, "run"), (2, "run")]


async def test_a_signal_that_nobody_listens_to_does_no_harm(log: EventLog) -> None:
    await log.signal("run")


async def test_a_failed_run_is_read_back_with_its_error(log: EventLog) -> None:
    _, answer = turn("thread")
    end = terminal_event(failed(answer, retryable=True))
    assert isinstance(end, RunFailed)
    assert await run_events(log, answer.id, RunStarted(answer), end) == [end]


async def test_a_reset_log_is_a_gap_for_every_reader_and_what_comes_next_is_read(log: EventLog) -> None:
    thread_id = new_id()
    writer = log.writer(thread_id)
    writer.write(MessageCreated(new_message(thread_id)))
    await writer.flush()
    before = await log.tail(thread_id)
    following, resuming = log.cursor(thread_id, before), log.cursor(thread_id, before)
    await log.reset(thread_id)
    fact = MessageCreated(new_message(thread_id, "next"))
    await say(log, thread_id, fact)
    for cursor in (following, resuming, log.cursor(thread_id, before)):
        with pytest.raises(Gap):
            await read(cursor, await log.tail(thread_id))
        cursor.close()
    writer.write(MessageCreated(new_message(thread_id, "from the old writer")))
    await writer.flush()


async def test_resetting_does_not_bring_a_deleted_log_back(log: EventLog) -> None:
    thread_id = new_id()
    await log.reset(thread_id)
    await say(log, thread_id, ThreadDeleted(thread_id))
    await log.reset(thread_id)
    with pytest.raises(LogDeleted):
        await say(log, thread_id, MessageCreated(new_message(thread_id)))
