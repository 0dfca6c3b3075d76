"""The budget of all logs of a process: it counts what they take, and evicts logs without readers first (I18)."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc

import pytest
from msgspec.structs import replace

from agent_chat.server.reading.dialects.native import sse_frame, websocket_frame
from agent_chat.server.reading.queries import read_run_events
from agent_chat.stores.budget import LogBudget
from agent_chat.stores.embedded import log as embedded_log
from agent_chat.stores.embedded.log import EmbeddedLog
from agent_chat.stores.errors import Gap
from agent_chat.stores.events import (
    MessageCreated,
    MessageDelta,
    MessageSnapshot,
    RunCancelled,
    RunStarted,
    ThreadDeleted,
    decode,
)
from agent_chat.stores.fold import Fold, fold
from agent_chat.stores.models import new_id
from tests.support.backends import Seconds
from tests.support.samples import cancelled, new_message, rest, turn

MEGABYTE = 2**20


def fill(log: EmbeddedLog, thread_id: str, count: int = 3, size: int = 1000) -> None:
    for number in range(count):
        log.writer(thread_id).write(MessageDelta("m", number * size, "x" * size))
    log.flush()


async def test_the_budget_counts_what_the_logs_take() -> None:
    log = EmbeddedLog()
    gc.collect()
    tracemalloc.start()
    try:
        for number in range(40):
            thread_id = new_id()
            cursor = log.cursor(thread_id, await log.tail(thread_id))
            fill(log, thread_id, 200, 20 + number)
            for entry in await cursor.next():
                assert len(entry.encoded(websocket_frame)) + len(entry.encoded(sse_frame)) > 0
            cursor.close()
        gc.collect()
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0.8 < log.budget.used / taken < 1.25
    await log.close()
    assert log.budget.used == 0


async def test_the_budget_is_kept_for_any_number_of_threads() -> None:
    log = EmbeddedLog(budget=LogBudget(8 * MEGABYTE))
    threads = [new_id() for _ in range(40)]
    for number in range(160):
        thread_id = threads[number % 40]
        log.writer(thread_id).write(MessageCreated(new_message(thread_id, "x" * 500_000)))
        log.flush()
        assert log.budget.used <= log.budget.limit
    assert log.budget.evictions > 0
    await log.close()


async def test_logs_with_readers_are_evicted_last_and_their_readers_miss_nothing() -> None:
    log = EmbeddedLog(budget=LogBudget(MEGABYTE))
    followed, earlier = new_id(), new_id()
    start = await log.tail(followed)
    cursor = log.cursor(followed, start)
    fill(log, followed)
    begin = await log.tail(earlier)
    fill(log, earlier)
    seen = await cursor.next()
    for _ in range(20):
        fill(log, new_id(), 10, 10_000)
    assert await rest(log, followed, start) == seen, "all of it is still there"
    with pytest.raises(Gap):
        await rest(log, earlier, begin)
    fill(log, followed, 1, 2 * MEGABYTE)
    [entry] = await cursor.next()
    assert len(entry.data) > 2 * MEGABYTE, "one entry larger than the budget still reaches a reader at the end"
    cursor.close()
    await log.close()


async def test_after_an_eviction_a_reader_behind_gets_a_gap_and_a_reader_at_the_end_continues() -> None:
    log = EmbeddedLog(budget=LogBudget(MEGABYTE))
    thread_id = new_id()
    start = await log.tail(thread_id)
    behind, at_the_end = log.cursor(thread_id, start), log.cursor(thread_id, start)
    for _ in range(300):
        fill(log, thread_id, 1, 8_000)
        assert len(await at_the_end.next()) == 1
    with pytest.raises(Gap):
        await behind.next()
    behind.close()
    at_the_end.close()
    await log.close()


async def test_a_run_whose_log_was_evicted_publishes_its_whole_message() -> None:
    """A reader that joins then has the last checkpoint, and no entry between that and the next delta (I15)."""
    log = EmbeddedLog()
    _, answer = turn("t")
    folding = Fold(answer)
    follower = log.cursor("t", await log.tail("t"))
    writer = log.writer("t", lambda: MessageSnapshot(folding.message()))

    def generate(word: str) -> None:
        delta = MessageDelta(answer.id, folding.length, word)
        folding.apply(delta)
        writer.write(delta)

    writer.write(RunStarted(answer))
    for number in range(50):
        generate(f"{number} ")
    await follower.next()
    log.budget.limit = log.budget.used - 1
    fill(log, new_id(), 1, 1)
    assert log.budget.evictions == 1
    position = await log.tail("t")
    late = fold(await read_run_events(log, "t", answer.id, position), onto=answer)
    assert len(late.content) < folding.length, "entries were evicted"
    log.budget.limit *= 2
    late_reader = log.cursor("t", position)
    for word in ("more ", "and ", "more"):
        generate(word)
    news = await late_reader.next()
    assert [entry.type for entry in news] == ["message.snapshot", "message.delta", "message.delta"]
    assert fold([decode(entry.data) for entry in news], onto=late) == folding.message()
    assert await follower.next() == news, "a reader at the end continues"
    await log.close()


async def test_a_run_that_another_writer_ended_publishes_nothing_more_though_its_own_entries_were_evicted() -> None:
    log = EmbeddedLog()
    _, answer = turn("t")
    writer = log.writer("t", lambda: MessageSnapshot(answer))
    writer.write(RunStarted(replace(answer, content="x" * 10_000)))
    log.writer("t").write(RunCancelled(cancelled(answer)))
    log.flush()
    log.budget.limit = log.budget.used
    fill(log, new_id(), 1, 1)
    assert log.budget.evictions == 1
    end = await log.tail("t")
    writer.write(MessageDelta(answer.id, 0, "late"))
    assert await log.tail("t") == end
    await log.close()


async def test_deleted_and_silent_logs_are_released_without_another_being_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(embedded_log, "_TICK_SECONDS", 0.01)
    clock = Seconds()
    log = EmbeddedLog(clock=clock)
    deleted, silent = new_id(), new_id()
    for thread_id in (deleted, silent):
        fill(log, thread_id, 1, MEGABYTE)
    log.writer(deleted).write(ThreadDeleted(deleted))

    async def comes_below(size: float) -> None:
        async with asyncio.timeout(5):
            while log.budget.used >= size:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    assert log.budget.used > 2 * MEGABYTE
    clock.now += 6
    await comes_below(1.1 * MEGABYTE)
    clock.now += 3601
    await comes_below(1)
    await log.close()
