"""Publishing stored facts: what the log could not take comes from the outbox, in order, or as a snapshot."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent_chat.server.facts import FactPublisher
from agent_chat.server.reading.viewer import Viewer
from agent_chat.stores.contracts import EventLog, Outbox, Store
from agent_chat.stores.embedded.log import EmbeddedLog
from agent_chat.stores.errors import LogUnavailable
from agent_chat.stores.events import (
    Event,
    MessageCreated,
    MessageDelta,
    MessageSnapshot,
    RunStarted,
    ThreadSnapshot,
    decode,
)
from agent_chat.stores.models import Principal, Thread
from agent_chat.stores.redis import flusher as redis_flusher
from agent_chat.stores.redis.log import open_redis_log
from agent_chat.stores.sqlite.store import open_sqlite
from tests.support.samples import new_message, new_principal, rest, started_thread, turn
from tests.support.services import RedisServer, running_redis


@pytest.fixture
async def redis() -> AsyncIterator[RedisServer]:
    async with running_redis() as server:
        yield server


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = await open_sqlite(tmp_path / "chat.db", lease=0.4)
    yield store
    await store.close()


async def post(store: Store, facts: FactPublisher, principal: Principal, thread: Thread, content: str) -> None:
    posted = await store.append_message(principal, new_message(thread.id, content, "system"))
    facts.publish(principal, thread.id, MessageCreated(posted.message))


async def contents(log: EventLog, thread: Thread, after: str) -> list[str]:
    events = [decode(entry.data) for entry in await rest(log, thread.id, after)]
    return [event.message.content[:4] for event in events if isinstance(event, MessageCreated)]


class _AwayWriter:
    def write(self, event: Event) -> None:
        pass

    async def flush(self) -> None:
        raise LogUnavailable("too much is pending")


async def swept(facts: FactPublisher, store: Store) -> None:
    """Sweep until nothing is left over."""
    async with asyncio.timeout(10):
        while True:
            await asyncio.sleep(0.15)  # over a quarter of a lease
            await facts.sweep()
            await asyncio.sleep(0.15)
            if not facts.pending and not await store.take_outboxes():
                return


async def test_facts_that_are_too_many_while_redis_is_down_are_dropped_and_come_from_the_outbox(
    store: Store, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_flusher, "PENDING_BYTES", 2_000_000)
    log = await open_redis_log(redis.url)
    facts, principal = FactPublisher(store, log), new_principal()
    try:
        threads = [await started_thread(store, principal) for _ in range(3)]
        starts = [await log.tail(thread.id) for thread in threads]
        redis.pause()
        monkeypatch.setattr(redis_flusher, "_UNREACHABLE_SECONDS", 0.0)
        for number in range(24):
            await post(store, facts, principal, threads[number % 3], f"{number:04}" + "x" * 500_000)
            assert log.pending_bytes < 3_000_000
        assert facts.pending <= 6
        redis.resume()
        async with asyncio.timeout(10):
            while log.unreachable and facts.pending:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await swept(facts, store)
        for index, (thread, start) in enumerate(zip(threads, starts, strict=True)):
            published = await contents(log, thread, start)
            assert list(dict.fromkeys(published)) == [f"{number:04}" for number in range(index, 24, 3)]
        assert log.pending_bytes == 0
    finally:
        await facts.close()
        await log.close()


async def test_a_fact_waits_for_one_that_stayed_in_the_outbox_until_that_is_published(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, principal = EmbeddedLog(), new_principal()
    facts = FactPublisher(store, log)
    thread = await started_thread(store, principal)
    start = await log.tail(thread.id)
    with monkeypatch.context() as outage:
        outage.setattr(log, "writer", lambda thread_id: _AwayWriter())
        await post(store, facts, principal, thread, "0")
        await facts.close()
    await post(store, facts, principal, thread, "1")
    assert (facts.pending, await contents(log, thread, start)) == (0, [])
    unpublished = store.take_outboxes

    async def posting_meanwhile(*thread_id: str) -> list[Outbox]:
        """A fact that is stored while the earlier ones are published."""
        monkeypatch.setattr(store, "take_outboxes", unpublished)
        found = await unpublished(*thread_id)
        await post(store, facts, principal, thread, "2")
        return found

    monkeypatch.setattr(store, "take_outboxes", posting_meanwhile)
    await facts.sweep()
    assert await contents(log, thread, start) == ["0", "1", "2"]
    await post(store, facts, principal, thread, "3")
    await facts.close()
    assert await contents(log, thread, start) == ["0", "1", "2", "3"], "no later sweep is needed"
    await log.close()


async def test_a_thread_whose_facts_cannot_be_published_delays_no_other_one(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, principal = EmbeddedLog(), new_principal()
    facts = FactPublisher(store, log)
    failing, other = [await started_thread(store, principal) for _ in range(2)]
    start = await log.tail(other.id)
    writer = log.writer
    monkeypatch.setattr(log, "writer", lambda thread_id: _AwayWriter())
    for thread in (failing, other):
        await post(store, facts, principal, thread, "0")
    await facts.close()
    monkeypatch.setattr(log, "writer", lambda id: _AwayWriter() if id == failing.id else writer(id))
    await facts.sweep()
    assert await contents(log, other, start) == ["0"]
    await log.close()


async def test_a_run_keeps_a_snapshot_of_what_it_cannot_send(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_flusher, "PENDING_BYTES", 100_000)
    log = await open_redis_log(redis.url)
    try:
        question, answer = turn("t")
        start = await log.tail("t")
        redis.pause()
        writer = log.writer("t", lambda: MessageSnapshot(answer))
        monkeypatch.setattr(redis_flusher, "_UNREACHABLE_SECONDS", 0.0)
        writer.write(MessageCreated(question))
        writer.write(RunStarted(answer))
        await asyncio.sleep(0)
        for number in range(10):
            log.writer("other").write(MessageCreated(new_message("other", "x" * 50_000)))
            writer.write(MessageDelta(answer.id, number, "x"))
        assert log.pending_bytes <= 160_000
        redis.resume()
        async with asyncio.timeout(10):
            await writer.flush()
        kinds = [entry.type for entry in await rest(log, "t", start)]
        assert kinds[:2] == ["message.created", "run.started"]
        assert set(kinds[2:]) <= {"message.snapshot", "message.delta"}
    finally:
        redis.resume()
        await log.close()


async def test_watchers_get_a_snapshot_where_the_outbox_was_cut(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_chat.stores.sqlite.outbox.OUTBOX_FACTS", 3)
    log, principal = EmbeddedLog(), new_principal()
    facts = FactPublisher(store, log)
    thread = await started_thread(store, principal)
    viewer = Viewer(store, log, principal, thread.id, after=await log.tail(thread.id))
    for number in range(5):  # stored by a process that died before it published them
        await store.append_message(principal, new_message(thread.id, str(number), "system"))
    await swept(facts, store)
    async with asyncio.timeout(5):
        entries = await viewer.next()
    assert entries is not None
    event = decode(entries[0].data)
    assert isinstance(event, ThreadSnapshot)
    assert [message.content for message in event.thread.messages] == ["0", "1", "2", "3", "4"]
    viewer.close()
    await log.close()
