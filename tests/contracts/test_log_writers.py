"""Writers of the EventLog: order, lost logs, ended runs and deleted threads (I14, I15, I16, I17)."""

from __future__ import annotations

import asyncio
import random

import pytest
from msgspec.structs import replace

from agent_chat.server.reading.queries import read_run_events
from agent_chat.stores.contracts import EventLog
from agent_chat.stores.errors import Gap, LogDeleted
from agent_chat.stores.events import (
    Event,
    MessageCreated,
    MessageDelta,
    MessageSnapshot,
    RunCompleted,
    RunError,
    RunFailed,
    RunStarted,
    ThreadDeleted,
    ThreadUpdated,
    ToolCallProgress,
    ToolCallStarted,
)
from agent_chat.stores.fold import Fold
from agent_chat.stores.models import new_id
from tests.support.log_reading import (
    NOW,
    decoded,
    write_and_flush,
)
from tests.support.samples import (
    Lose,
    completed,
    new_message,
    new_principal,
    new_thread,
    publish,
    read,
    rest,
    turn,
)


async def test_the_events_of_each_of_two_writers_stay_in_order(log: EventLog) -> None:
    thread_id, chance = new_id(), random.Random(2)
    start = await log.tail(thread_id)
    writers = {"a": log.writer(thread_id), "b": log.writer(thread_id)}
    wanted: dict[str, list[Event]] = {"a": [], "b": []}
    for n in range(200):
        name = chance.choice("ab")
        call = ToolCallStarted(name, f"call_{n}", n, "look", {}, NOW)
        wanted[name].append(call)
        writers[name].write(call)
        if chance.random() < 0.1:
            await asyncio.sleep(0)
    for writer in writers.values():
        await writer.flush()
    events = decoded(await rest(log, thread_id, start))
    for name, expected in wanted.items():
        calls = [event for event in events if isinstance(event, ToolCallStarted) and event.message_id == name]
        assert calls == expected
    assert len(events) == 200


async def test_a_writer_whose_log_was_lost_appends_a_snapshot_in_place_of_deltas_and_continues(
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
    assert decoded(await rest(log, thread_id, start)) == [MessageSnapshot(so_far)]
    await write(MessageDelta(answer.id, 5, "!"))
    assert decoded(await rest(log, thread_id, start)) == [MessageSnapshot(so_far), MessageDelta(answer.id, 5, "!")]


async def test_a_writer_whose_log_was_lost_appends_its_terminal_event_after_the_snapshot(
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
    assert decoded(await rest(log, thread_id, start)) == [MessageSnapshot(so_far), RunCompleted(final)]


@pytest.mark.slow
async def test_a_writer_whose_last_entry_was_trimmed_appends_a_snapshot(log: EventLog) -> None:
    thread_id = new_id()
    _, answer = turn(thread_id)
    writer = log.writer(thread_id, lambda: MessageSnapshot(answer))
    writer.write(RunStarted(answer))
    await writer.flush()
    await publish(log, thread_id, *[ToolCallProgress("m", "call_0", 0, n, None, None) for n in range(12_000)])
    start = await log.tail(thread_id)
    writer.write(MessageDelta(answer.id, 0, "a"))
    await writer.flush()
    assert decoded(await rest(log, thread_id, start)) == [MessageSnapshot(answer)]


async def test_a_writer_that_has_not_written_appends_no_snapshot_to_a_lost_log(log: EventLog, lose: Lose) -> None:
    thread_id = new_id()
    _, answer = turn(thread_id)
    writer = log.writer(thread_id, lambda: MessageSnapshot(answer))
    await log.tail(thread_id)
    await lose()
    start = await log.tail(thread_id)
    writer.write(RunStarted(answer))
    await writer.flush()
    assert decoded(await rest(log, thread_id, start)) == [RunStarted(answer)]


async def test_a_writer_without_a_snapshot_continues_in_a_new_log(log: EventLog, lose: Lose) -> None:
    thread_id = new_id()
    updated = ThreadUpdated(new_thread(new_principal()))
    writer = log.writer(thread_id)
    writer.write(updated)
    await writer.flush()
    await lose()
    start = await log.tail(thread_id)
    writer.write(updated)
    await writer.flush()
    assert decoded(await rest(log, thread_id, start)) == [updated]


@pytest.mark.parametrize("late", ["part", "end"])
async def test_no_event_of_a_run_is_appended_after_another_writers_terminal_event(log: EventLog, late: str) -> None:
    thread_id = new_id()
    asked, answer = turn(thread_id)
    paused, other = log.writer(thread_id, lambda: MessageSnapshot(answer)), log.writer(thread_id)
    await write_and_flush(paused, RunStarted(answer))
    await write_and_flush(other, ToolCallProgress("another run", "call_0", 0, 1, None, None))
    await write_and_flush(paused, MessageDelta(answer.id, 0, "in time"))
    end = RunFailed(answer, RunError("interrupted", "It stopped.", retryable=True))
    await write_and_flush(other, end)
    last = await log.tail(thread_id)
    await write_and_flush(paused, MessageDelta(answer.id, 7, "too late") if late == "part" else RunCompleted(answer))
    await write_and_flush(paused, MessageDelta(answer.id, 15, "much too late"))
    assert await log.tail(thread_id) == last
    await write_and_flush(paused, MessageCreated(asked))
    assert await log.tail(thread_id) != last


async def test_a_deleted_log_refuses_every_writer(log: EventLog) -> None:
    thread_id = new_id()
    before = log.writer(thread_id)
    before.write(MessageDelta("m", 0, "a"))
    await before.flush()
    await publish(log, thread_id, ThreadDeleted(thread_id))
    last = await log.tail(thread_id)
    for writer in (before, log.writer(thread_id), log.writer(thread_id, lambda: MessageSnapshot(new_message("t")))):
        with pytest.raises(LogDeleted):
            await write_and_flush(writer, MessageDelta("m", 1, "b"))
    assert await log.tail(thread_id) == last


async def test_the_readers_of_a_deleted_log_get_its_last_entry(log: EventLog) -> None:
    thread_id = new_id()
    start = await log.tail(thread_id)
    cursor = log.cursor(thread_id, start)
    await publish(log, thread_id, MessageDelta("m", 0, "a"), ThreadDeleted(thread_id))
    async with asyncio.timeout(5):
        events = decoded(await read(cursor, await log.tail(thread_id)))
    cursor.close()
    assert events == [MessageDelta("m", 0, "a"), ThreadDeleted(thread_id)]
    assert decoded(await rest(log, thread_id, start)) == events


async def test_a_reset_log_is_a_gap_for_every_reader_and_later_events_are_read(log: EventLog) -> None:
    thread_id = new_id()
    writer = log.writer(thread_id)
    writer.write(MessageCreated(new_message(thread_id)))
    await writer.flush()
    before = await log.tail(thread_id)
    following, resuming = log.cursor(thread_id, before), log.cursor(thread_id, before)
    await log.reset(thread_id)
    fact = MessageCreated(new_message(thread_id, "next"))
    await publish(log, thread_id, fact)
    for cursor in (following, resuming, log.cursor(thread_id, before)):
        with pytest.raises(Gap):
            await read(cursor, await log.tail(thread_id))
        cursor.close()
    writer.write(MessageCreated(new_message(thread_id, "from the old writer")))
    await writer.flush()


async def test_a_reset_does_not_reopen_a_deleted_log(log: EventLog) -> None:
    thread_id = new_id()
    await log.reset(thread_id)
    await publish(log, thread_id, ThreadDeleted(thread_id))
    await log.reset(thread_id)
    with pytest.raises(LogDeleted):
        await publish(log, thread_id, MessageCreated(new_message(thread_id)))
