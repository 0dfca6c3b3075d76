"""Creating, reading, updating and deleting a thread."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from agent_chat.stores.contracts import Store
from agent_chat.stores.errors import StoreUnavailable, ThreadNotFound
from agent_chat.stores.models import Principal, Thread, new_id
from tests.contracts.thread_store.calls import read_page
from tests.support.backends import OpenStore
from tests.support.samples import (
    AWKWARD,
    WORKER,
    completed,
    exactly,
    finished_run,
    idempotent,
    ids,
    new_message,
    new_thread,
    started_run,
    started_thread,
    turn,
)


async def test_the_store_is_ready(store: Store) -> None:
    assert await store.ready() is True


async def test_a_closed_store_is_unavailable_immediately(open_store: OpenStore, principal: Principal) -> None:
    async with open_store() as store:
        thread = await started_thread(store, principal)
    async with asyncio.timeout(5):
        for call in (store.get(principal, thread.id), store.update(principal, thread.id, title="x")):
            with pytest.raises(StoreUnavailable):
                await call
        assert await store.ready() is False


async def test_a_created_thread_is_read_unchanged(store: Store, principal: Principal) -> None:
    thread = replace(new_thread(principal), title="Été 🌞", metadata=AWKWARD)
    created = await store.create(principal, thread)
    assert created.replayed is False
    assert exactly(created.thread) == exactly(thread)
    assert exactly(await store.get(principal, thread.id)) == exactly(thread)


async def test_an_unknown_thread_is_not_found(store: Store, principal: Principal) -> None:
    missing = new_id()
    question, answer = turn(missing)
    for call in (
        store.get(principal, missing),
        store.update(principal, missing, title="x"),
        store.delete(principal, missing),
        store.list_messages(principal, missing, before=None, limit=1),
        store.get_message(principal, missing, new_id()),
        store.append_message(principal, question),
        store.replay(principal, missing, idempotent()),
        store.claim(principal, question, answer, worker=WORKER),
        store.finish(principal, completed(answer)),
    ):
        with pytest.raises(ThreadNotFound):
            await call
    assert await store.find_record(principal, answer.id) is None


async def test_update_sets_only_what_is_not_none(store: Store, principal: Principal, thread: Thread) -> None:
    await finished_run(store, principal, thread.id)
    updated = await store.update(principal, thread.id, title="New")
    assert (updated.title, updated.archived, updated.messages) == ("New", False, [])
    updated = await store.update(principal, thread.id, archived=True)
    assert (updated.title, updated.archived, updated.messages) == ("New", True, [])
    updated = await store.update(principal, thread.id, title="", archived=False)
    assert (updated.title, updated.archived) == ("", False)
    stored = await store.get(principal, thread.id)
    assert replace(stored, messages=[]) == updated
    assert len(stored.messages) == 2
    assert replace(stored, title=thread.title, updated_at=thread.updated_at, messages=[]) == thread


async def test_the_latest_messages_are_returned_oldest_first(
    store: Store, principal: Principal, thread: Thread
) -> None:
    appended = [new_message(thread.id, str(n), "system") for n in range(7)]
    for message in appended:
        await store.append_message(principal, message)
    assert ids((await store.get(principal, thread.id)).messages) == ids(appended)
    assert ids((await store.get(principal, thread.id, message_limit=3)).messages) == ids(appended[-3:])
    assert ids((await store.get(principal, thread.id, message_limit=7)).messages) == ids(appended)


async def test_a_thread_is_returned_with_its_latest_fifty_messages_by_default(
    store: Store, principal: Principal, thread: Thread
) -> None:
    appended = [new_message(thread.id, str(n), "system") for n in range(55)]
    for message in appended:
        await store.append_message(principal, message)
    assert ids((await store.get(principal, thread.id)).messages) == ids(appended[-50:])


async def test_deleting_a_thread_deletes_all_of_it(store: Store, principal: Principal, thread: Thread) -> None:
    answer = await finished_run(store, principal, thread.id)
    assert await store.delete(principal, thread.id) is None
    for call in (
        store.get(principal, thread.id),
        store.delete(principal, thread.id),
        store.list_messages(principal, thread.id, before=None, limit=9),
        store.get_message(principal, thread.id, answer.id),
        store.append_message(principal, new_message(thread.id)),
        store.finish(principal, completed(answer)),
    ):
        with pytest.raises(ThreadNotFound):
            await call
    assert (await read_page(store, principal)).threads == []


async def test_deleting_returns_the_run_that_had_the_thread(store: Store, principal: Principal, thread: Thread) -> None:
    answer = await started_run(store, principal, thread.id)
    assert await store.delete(principal, thread.id) == answer.id
    assert await store.checkpoint(principal, answer.id, worker=WORKER, partial=answer) == "lost"
    with pytest.raises(ThreadNotFound):
        await store.finish(principal, completed(answer))


async def test_deleting_a_thread_leaves_the_others(store: Store, principal: Principal, thread: Thread) -> None:
    other = await started_thread(store, principal)
    answer = await started_run(store, principal, other.id)
    await store.delete(principal, thread.id)
    assert len((await store.get(principal, other.id)).messages) == 2
    assert await store.checkpoint(principal, answer.id, worker=WORKER, partial=None) == "held"
