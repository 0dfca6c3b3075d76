"""Concurrent calls on one thread (I2, I7), and the effect of a call that fails on others."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from agent_chat.stores.contracts import Store
from agent_chat.stores.errors import StoreError
from agent_chat.stores.models import JSONObject, Message, Principal, Thread, new_answer, new_id
from tests.contracts.thread_store.calls import increases, with_content
from tests.support.samples import WORKER, completed, ids, new_message, started_run, started_thread, turn


async def test_concurrent_writes_and_reads_of_one_thread_are_consistent(
    store: Store, principal: Principal, thread: Thread
) -> None:
    """Runs, checkpoints, notes, new titles and readers on one thread: times increase and no message is lost."""
    notes = [new_message(thread.id, f"note {n}", "system") for n in range(20)]
    seen: list[list[Message]] = []

    async def turns() -> None:
        for n in range(10):
            answer = await started_run(store, principal, thread.id, f"question {n}")
            await store.checkpoint(principal, answer.id, worker=WORKER, partial=with_content(answer, "Hal"))
            await store.finish(principal, completed(answer))
            await store.delete_record(principal, answer.id)

    async def readers() -> None:
        for _ in range(20):
            seen.append((await store.get(principal, thread.id)).messages)

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        group.create_task(turns())
        group.create_task(readers())
        for note in notes:
            group.create_task(store.append_message(principal, note))
            group.create_task(store.update(principal, thread.id, title=note.content))
    messages = (await store.get(principal, thread.id)).messages
    assert len(messages) == 40
    assert set(ids(notes)) <= set(ids(messages))
    assert increases([message.created_at for message in messages])
    assert {message.content for message in messages if message.role == "assistant"} == {"Done."}
    for glimpse in seen:
        assert ids(glimpse) == ids(messages)[: len(glimpse)]


async def test_a_message_that_cannot_be_encoded_affects_no_other_call(
    store: Store, principal: Principal, thread: Thread
) -> None:
    deep: JSONObject = {}
    for _ in range(5_000):
        deep = {"": deep}
    question, answer = turn(thread.id)
    running = await started_run(store, principal, (await started_thread(store, principal)).id)
    for call in (
        store.append_message(principal, replace(new_message(thread.id), metadata=deep)),
        store.claim(principal, replace(question, metadata=deep), answer, worker=WORKER),
        store.checkpoint(principal, running.id, worker=WORKER, partial=replace(running, metadata=deep)),
    ):
        with pytest.raises((RecursionError, ValueError, StoreError)):
            async with asyncio.timeout(5):
                await call
    async with asyncio.timeout(5):
        await store.append_message(principal, new_message(thread.id))
        assert len((await store.get(principal, thread.id)).messages) == 1
        assert await store.find_record(principal, answer.id) is None


async def test_a_refused_finish_is_a_store_error(store: Store, principal: Principal, thread: Thread) -> None:
    answer = new_answer(thread.id, new_id(), None, thread.created_at)
    with pytest.raises(StoreError):
        await store.finish(principal, answer)
