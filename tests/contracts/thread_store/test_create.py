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


async def test_a_closed_store_is_unavailable_immediately(open_store: OpenStore, who: Principal) -> None:
    async with open_store() as store:
        thread = await started_thread(store, who)
    async with asyncio.timeout(5):
        for call in (store.get(who, thread.id), store.update(who, thread.id, title="x")):
            with pytest.raises(StoreUnavailable):
                await call
        assert await store.ready() is False


async def test_a_created_thread_is_read_unchanged(store: Store, who: Principal) -> None:
    thread = replace(new_thread(who), title="Été 🌞", metadata=AWKWARD)
    created = await store.create(who, thread)
    assert created.replayed is False
    assert exactly(created.thread) == exactly(thread)
    assert exactly(await store.get(who, thread.id)) == exactly(thread)


async def test_an_unknown_thread_is_not_found(store: Store, who: Principal) -> None:
    missing = new_id()
    question, answer = turn(missing)
    for call in (
        store.get(who, missing),
        store.update(who, missing, title="x"),
        store.delete(who, missing),
        store.list_messages(who, missing, before=None, limit=1),
        store.get_message(who, missing, new_id()),
        store.append_message(who, question),
        store.replay(who, missing, idempotent()),
        store.claim(who, question, answer, worker=WORKER),
        store.finish(who, completed(answer)),
    ):
        with pytest.raises(ThreadNotFound):
            await call
    assert await store.find_record(who, answer.id) is None


async def test_update_sets_only_what_is_not_none(store: Store, who: Principal, thread: Thread) -> None:
    await finished_run(store, who, thread.id)
    updated = await store.update(who, thread.id, title="New")
    assert (updated.title, updated.archived, updated.messages) == ("New", False, [])
    updated = await store.update(who, thread.id, archived=True)
    assert (updated.title, updated.archived, updated.messages) == ("New", True, [])
    updated = await store.update(who, thread.id, title="", archived=False)
    assert (updated.title, updated.archived) == ("", False)
    stored = await store.get(who, thread.id)
    assert replace(stored, messages=[]) == updated
    assert len(stored.messages) == 2
    assert replace(stored, title=thread.title, updated_at=thread.updated_at, messages=[]) == thread


async def test_the_latest_messages_are_returned_oldest_first(store: Store, who: Principal, thread: Thread) -> None:
    appended = [new_message(thread.id, str(n), "system") for n in range(7)]
    for message in appended:
        await store.append_message(who, message)
    assert ids((await store.get(who, thread.id)).messages) == ids(appended)
    assert ids((await store.get(who, thread.id, message_limit=3)).messages) == ids(appended[-3:])
    assert ids((await store.get(who, thread.id, message_limit=7)).messages) == ids(appended)


async def test_a_thread_is_returned_with_its_latest_fifty_messages_by_default(
    store: Store, who: Principal, thread: Thread
) -> None:
    appended = [new_message(thread.id, str(n), "system") for n in range(55)]
    for message in appended:
        await store.append_message(who, message)
    assert ids((await store.get(who, thread.id)).messages) == ids(appended[-50:])


async def test_deleting_a_thread_deletes_all_of_it(store: Store, who: Principal, thread: Thread) -> None:
    answer = await finished_run(store, who, thread.id)
    assert await store.delete(who, thread.id) is None
    for call in (
        store.get(who, thread.id),
        store.delete(who, thread.id),
        store.list_messages(who, thread.id, before=None, limit=9),
        store.get_message(who, thread.id, answer.id),
        store.append_message(who, new_message(thread.id)),
        store.finish(who, completed(answer)),
    ):
        with pytest.raises(ThreadNotFound):
            await call
    assert (await read_page(store, who)).threads == []


async def test_deleting_returns_the_run_that_had_the_thread(store: Store, who: Principal, thread: Thread) -> None:
    answer = await started_run(store, who, thread.id)
    assert await store.delete(who, thread.id) == answer.id
    assert await store.checkpoint(who, answer.id, worker=WORKER, partial=answer) == "lost"
    with pytest.raises(ThreadNotFound):
        await store.finish(who, completed(answer))


async def test_deleting_a_thread_leaves_the_others(store: Store, who: Principal, thread: Thread) -> None:
    other = await started_thread(store, who)
    answer = await started_run(store, who, other.id)
    await store.delete(who, thread.id)
    assert len((await store.get(who, other.id)).messages) == 2
    assert await store.checkpoint(who, answer.id, worker=WORKER, partial=None) == "held"
