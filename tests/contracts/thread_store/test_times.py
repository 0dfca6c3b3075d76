"""The times of threads and messages strictly increase, whatever the clocks do (I7)."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from agent_chat.stores.contracts import Store
from agent_chat.stores.models import Principal, Thread, timestamp
from tests.contracts.thread_store.calls import increases, with_content
from tests.support.backends import OpenStore
from tests.support.samples import WORKER, HandClock, completed, new_message, new_thread, started_run, turn


@pytest.mark.parametrize("step", [0, -10_000], ids=["stands still", "goes back"])
async def test_times_strictly_increase_under_a_clock_that(
    open_store: OpenStore, principal: Principal, step: int
) -> None:
    """I7."""
    clock = HandClock()
    async with open_store(clock=clock) as store:
        at = timestamp(clock.now)
        thread = (await store.create(principal, replace(new_thread(principal), created_at=at, updated_at=at))).thread
        updates = [thread.updated_at]

        async def written() -> None:
            updates.append((await store.get(principal, thread.id)).updated_at)

        for _ in range(3):
            clock.move(milliseconds=step)
            question, answer = turn(thread.id, at=clock.now)
            posted = await store.claim(principal, question, answer, worker=WORKER)
            await written()
            clock.move(milliseconds=step)
            await store.finish(principal, completed(posted.answer or answer))
            await written()
            clock.move(milliseconds=step)
            await store.append_message(principal, new_message(thread.id, "note", "system", at=clock.now))
            await written()
            clock.move(milliseconds=step)
            updates.append((await store.update(principal, thread.id, title="x")).updated_at)
            updates.append((await store.update(principal, thread.id, archived=True)).updated_at)
            updates.append((await store.update(principal, thread.id, archived=False)).updated_at)
        messages = (await store.get(principal, thread.id)).messages
        assert len(messages) == 9
        assert increases([message.created_at for message in messages])
        assert increases(updates)


async def test_a_time_that_is_later_than_its_predecessor_is_unchanged(
    store: Store, principal: Principal, thread: Thread
) -> None:
    clock = HandClock()
    clock.move(days=36500)
    message = new_message(thread.id, role="system", at=clock.now)
    await store.append_message(principal, message)
    assert (await store.get_message(principal, thread.id, message.id)).created_at == message.created_at


async def test_a_moved_time_stays_through_checkpoint_and_finish(
    store: Store, principal: Principal, thread: Thread
) -> None:
    clock = HandClock()
    await store.append_message(principal, new_message(thread.id, at=clock.now, role="system"))
    clock.move(days=-1)
    question, answer = turn(thread.id, at=clock.now)
    await store.claim(principal, question, answer, worker=WORKER)
    moved = (await store.get_message(principal, thread.id, answer.id)).created_at
    await store.checkpoint(principal, answer.id, worker=WORKER, partial=with_content(answer, "Hal"))
    assert (await store.get_message(principal, thread.id, answer.id)).created_at == moved
    await store.finish(principal, completed(answer))
    messages = (await store.get(principal, thread.id)).messages
    assert messages[-1].created_at == moved
    assert increases([message.created_at for message in messages])


async def test_a_checkpoint_does_not_change_updated_at(store: Store, principal: Principal, thread: Thread) -> None:
    """I7."""
    answer = await started_run(store, principal, thread.id)
    before = (await store.get(principal, thread.id)).updated_at
    await store.checkpoint(principal, answer.id, worker=WORKER, partial=with_content(answer, "Hal"))
    assert (await store.get(principal, thread.id)).updated_at == before
