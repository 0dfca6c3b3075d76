"""Listing threads: order, filters, message limits and the bound in bytes (I9)."""

from __future__ import annotations

import msgspec
import pytest
from msgspec.structs import replace

from agent_chat.stores.contracts import Store, ThreadPage
from agent_chat.stores.fitting import READ_BYTES
from agent_chat.stores.models import Principal, Thread, timestamp
from tests.contracts.thread_store.calls import read_page, with_content
from tests.support.backends import OpenStore
from tests.support.samples import (
    WORKER,
    HandClock,
    completed,
    finished_run,
    new_message,
    new_principal,
    new_thread,
    started_run,
    started_thread,
    turn,
)


async def test_messages_and_answers_move_a_thread_up_in_the_list_and_nothing_else_does(
    open_store: OpenStore, principal: Principal
) -> None:
    clock = HandClock()
    async with open_store(clock=clock) as store:
        at = timestamp(clock.now)
        threads = [replace(new_thread(principal), created_at=at, updated_at=at) for _ in range(4)]
        for thread in threads:
            await store.create(principal, thread)
        by_id = sorted((thread.id for thread in threads), reverse=True)

        async def order() -> list[str]:
            clock.move(seconds=1)
            return [thread.id for thread in (await read_page(store, principal)).threads]

        async def newest() -> int:
            return [thread.id for thread in threads].index((await order())[0])

        assert await order() == by_id
        await store.update(principal, by_id[-1], title="x")
        await store.update(principal, by_id[-2], archived=True)
        await store.update(principal, by_id[-2], archived=False)
        assert await order() == by_id
        await store.append_message(principal, new_message(threads[1].id, at=clock.now))
        assert await newest() == 1
        question, answer = turn(threads[2].id, at=clock.now)
        posted = await store.claim(principal, question, answer, worker=WORKER)
        assert await newest() == 2
        await store.append_message(principal, new_message(threads[3].id, at=clock.now))
        partial = with_content(posted.answer or answer, "Hal")
        await store.checkpoint(principal, answer.id, worker=WORKER, partial=partial)
        await store.cancel(principal, threads[2].id, answer.id)
        assert await newest() == 3
        await store.finish(principal, completed(partial))
        assert await newest() == 2
        await store.update(principal, threads[3].id, title="y")
        assert await newest() == 2
        rest = [each for each in by_id if each == threads[0].id]
        assert await order() == [threads[2].id, threads[3].id, threads[1].id, *rest]


async def test_an_activity_never_moves_a_thread_down(open_store: OpenStore, principal: Principal) -> None:
    """The message of a process whose clock is behind, or an imported one."""
    clock = HandClock()
    async with open_store(clock=clock) as store:
        at = timestamp(clock.now)
        other = replace(new_thread(principal), created_at=at, updated_at=at)
        clock.move(days=1)
        at = timestamp(clock.now)
        active = replace(new_thread(principal), created_at=at, updated_at=at)
        for thread in (other, active):
            await store.create(principal, thread)
        clock.move(days=-30)
        await store.append_message(principal, new_message(active.id, at=clock.now))
        assert [thread.id for thread in (await read_page(store, principal)).threads] == [active.id, other.id]


async def test_limit_and_offset_page_through_all_threads(open_store: OpenStore, principal: Principal) -> None:
    clock = HandClock()
    async with open_store(clock=clock) as store:
        created = []
        for _ in range(5):
            clock.move(seconds=1)
            at = timestamp(clock.now)
            thread = replace(new_thread(principal), created_at=at, updated_at=at)
            created.append((await store.create(principal, thread)).thread.id)
        newest = created[::-1]
        for offset, limit, more in ((0, 2, True), (2, 2, True), (4, 2, False), (3, 2, False), (0, 5, False)):
            found = await read_page(store, principal, limit=limit, offset=offset)
            assert [thread.id for thread in found.threads] == newest[offset : offset + limit]
            assert found.more is more
            assert found.cut is False
        assert await read_page(store, principal, limit=2, offset=5) == ThreadPage([], more=False, cut=False)
        assert await read_page(store, principal, limit=2, offset=10**6) == ThreadPage([], more=False, cut=False)


async def test_the_threads_of_all_users_with_that_agent_are_listed(store: Store, principal: Principal) -> None:
    colleague = new_principal(principal.organization_id)
    mine, theirs = await started_thread(store, principal), await started_thread(store, colleague)
    await started_thread(store, principal, "another agent")
    assert {thread.id for thread in (await read_page(store, principal)).threads} == {mine.id, theirs.id}
    assert {thread.user_id for thread in (await read_page(store, colleague)).threads} == {
        principal.user_id,
        colleague.user_id,
    }


async def test_archived_threads_are_listed_alone_not_at_all_or_with_the_others(
    store: Store, principal: Principal
) -> None:
    open_one, put_away = await started_thread(store, principal), await started_thread(store, principal)
    await store.update(principal, put_away.id, archived=True)

    async def shown(archived: bool | None) -> set[str]:
        found = await read_page(store, principal, archived=archived)
        assert found.more is False
        return {thread.id for thread in found.threads}

    assert await shown(True) == {put_away.id}
    assert await shown(False) == {open_one.id}
    assert await shown(None) == {open_one.id, put_away.id}


@pytest.mark.parametrize("message_limit", [0, 1, 3, 6, 50])
async def test_a_page_has_the_latest_messages_of_each_thread(
    store: Store, principal: Principal, message_limit: int
) -> None:
    threads = [await started_thread(store, principal) for _ in range(2)]
    for thread in threads:
        for n in range(3):
            await finished_run(store, principal, thread.id, str(n))
    found = await read_page(store, principal, message_limit=message_limit)
    assert found.cut is False
    for thread in found.threads:
        whole = await store.get(principal, thread.id)
        assert thread == replace(whole, messages=whole.messages[-message_limit:] if message_limit else [])


async def test_a_page_that_exceeds_its_bytes_has_fewer_messages_and_is_cut(store: Store, principal: Principal) -> None:
    """I9."""
    for _ in range(3):
        thread = await started_thread(store, principal)
        for n in range(6):
            await store.append_message(principal, new_message(thread.id, f"{n}" + "é" * 5000, "system"))
    found = await read_page(store, principal, max_bytes=100_000)
    assert found.cut is True
    assert len(found.threads) == 3
    assert len(msgspec.json.encode([thread.messages for thread in found.threads])) <= 100_000 + 100
    for thread in found.threads:
        whole = (await store.get(principal, thread.id)).messages
        assert 0 < len(thread.messages) < 6
        assert thread.messages == whole[-len(thread.messages) :]
    found = await read_page(store, principal, max_bytes=READ_BYTES)
    assert found.cut is False
    assert [len(thread.messages) for thread in found.threads] == [6, 6, 6]


async def test_a_page_is_not_cut_if_only_the_message_limit_leaves_messages_out(
    store: Store, principal: Principal, thread: Thread
) -> None:
    for _ in range(4):
        await store.append_message(principal, new_message(thread.id, "x" * 10_000, "system"))
    found = await read_page(store, principal, message_limit=1, max_bytes=20_000)
    assert (found.cut, len(found.threads[0].messages)) == (False, 1)


async def test_the_checkpoint_of_a_message_in_progress_counts_toward_the_bytes_of_a_page(
    store: Store, principal: Principal, thread: Thread
) -> None:
    await store.append_message(principal, new_message(thread.id, "x" * 10_000, "system"))
    answer = await started_run(store, principal, thread.id)
    await store.checkpoint(principal, answer.id, worker=WORKER, partial=with_content(answer, "y" * 50_000))
    found = await read_page(store, principal, max_bytes=55_000)
    assert len(msgspec.json.encode(found.threads[0].messages)) <= 55_000
    assert found.cut is True
