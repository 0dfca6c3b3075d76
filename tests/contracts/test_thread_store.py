"""The ThreadStore: threads, messages, and the runs in progress. (Isolation has a file of its own.)"""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import NamedTuple

import msgspec
import pytest
from msgspec.structs import replace

from agent_chat.stores.contracts import Finished, Page, Posted, Store
from agent_chat.stores.errors import (
    IdempotencyMismatch,
    MessageNotFound,
    StoreError,
    StoreUnavailable,
    ThreadArchived,
    ThreadBusy,
    ThreadNotFound,
)
from agent_chat.stores.events import MessageCreated
from agent_chat.stores.models import (
    Idempotency,
    JSONObject,
    Message,
    Principal,
    Thread,
    new_answer,
    new_id,
    timestamp,
    utcnow,
)
from tests.contracts.conftest import OpenStore
from tests.contracts.samples import (
    AWKWARD,
    DAY,
    WORKER,
    HandClock,
    awkward_call,
    cancelled,
    completed,
    exactly,
    failed,
    finished_run,
    idempotent,
    ids,
    new_file,
    new_message,
    new_thread,
    principal,
    started_run,
    started_thread,
    turn,
)

ROOM = 8 * 2**20


@pytest.fixture
def who() -> Principal:
    return principal()


@pytest.fixture
async def thread(store: Store, who: Principal) -> Thread:
    return await started_thread(store, who)


async def page(
    store: Store,
    who: Principal,
    agent_id: str = "agent",
    *,
    limit: int = 10,
    offset: int = 0,
    archived: bool | None = None,
    message_limit: int = 50,
    max_bytes: int = ROOM,
) -> Page:
    return await store.page(
        who,
        agent_id,
        limit=limit,
        offset=offset,
        archived=archived,
        message_limit=message_limit,
        max_bytes=max_bytes,
    )


def increases(stamps: list[str]) -> bool:
    return all(earlier < later for earlier, later in pairwise(stamps))


class Said(NamedTuple):
    """A Posted by its ids."""

    message_id: str
    run_id: str | None
    replayed: bool
    again: bool = False


def said(posted: Posted | None) -> Said | None:
    return Said(posted.message_id, posted.run_id, posted.replayed, posted.again) if posted else None


def retold(answer: Message, content: str) -> Message:
    return replace(answer, content=content)


async def test_the_store_is_ready(store: Store) -> None:
    assert await store.ready() is True


async def test_a_closed_store_is_unavailable_at_once(open_store: OpenStore, who: Principal) -> None:
    async with open_store() as store:
        thread = await started_thread(store, who)
    async with asyncio.timeout(5):
        for call in (store.get(who, thread.id), store.update(who, thread.id, title="x")):
            with pytest.raises(StoreUnavailable):
                await call
        assert await store.ready() is False


# threads


async def test_a_created_thread_is_read_back_as_it_was(store: Store, who: Principal) -> None:
    thread = replace(new_thread(who), title="Été 🌞", metadata=AWKWARD)
    created = await store.create(who, thread)
    assert created.replayed is False
    assert exactly(created.thread) == exactly(thread)
    assert exactly(await store.get(who, thread.id)) == exactly(thread)


async def test_a_thread_that_is_not_there_is_not_found(store: Store, who: Principal) -> None:
    missing = new_id()
    question, answer = turn(missing)
    for call in (
        store.get(who, missing),
        store.update(who, missing, title="x"),
        store.delete(who, missing),
        store.messages(who, missing, before=None, limit=1),
        store.message(who, missing, new_id()),
        store.append_message(who, question),
        store.replay(who, missing, idempotent()),
        store.claim(who, question, answer, worker=WORKER),
        store.finish(who, completed(answer)),
    ):
        with pytest.raises(ThreadNotFound):
            await call
    assert await store.record(who, answer.id) is None


async def test_update_sets_what_is_given_and_nothing_else(store: Store, who: Principal, thread: Thread) -> None:
    await finished_run(store, who, thread.id)
    updated = await store.update(who, thread.id, title="New")
    assert (updated.title, updated.archived, updated.messages) == ("New", False, [])
    updated = await store.update(who, thread.id, archived=True)
    assert (updated.title, updated.archived, updated.messages) == ("New", True, [])
    updated = await store.update(who, thread.id, title="", archived=False)
    assert (updated.title, updated.archived) == ("", False)
    kept = await store.get(who, thread.id)
    assert replace(kept, messages=[]) == updated
    assert len(kept.messages) == 2
    assert replace(kept, title=thread.title, updated_at=thread.updated_at, messages=[]) == thread


async def test_the_latest_messages_are_shown_oldest_first(store: Store, who: Principal, thread: Thread) -> None:
    told = [new_message(thread.id, str(n), "system") for n in range(7)]
    for message in told:
        await store.append_message(who, message)
    assert ids((await store.get(who, thread.id)).messages) == ids(told)
    assert ids((await store.get(who, thread.id, message_limit=3)).messages) == ids(told[-3:])
    assert ids((await store.get(who, thread.id, message_limit=7)).messages) == ids(told)


async def test_a_thread_is_shown_with_its_latest_fifty_messages_by_default(
    store: Store, who: Principal, thread: Thread
) -> None:
    told = [new_message(thread.id, str(n), "system") for n in range(55)]
    for message in told:
        await store.append_message(who, message)
    assert ids((await store.get(who, thread.id)).messages) == ids(told[-50:])


async def test_a_deleted_thread_is_gone_with_all_of_it(store: Store, who: Principal, thread: Thread) -> None:
    answer = await finished_run(store, who, thread.id)
    assert await store.delete(who, thread.id) is None
    for call in (
        store.get(who, thread.id),
        store.delete(who, thread.id),
        store.messages(who, thread.id, before=None, limit=9),
        store.message(who, thread.id, answer.id),
        store.append_message(who, new_message(thread.id)),
        store.finish(who, completed(answer)),
    ):
        with pytest.raises(ThreadNotFound):
            await call
    assert (await page(store, who)).threads == []


async def test_deleting_tells_the_run_that_had_the_thread(store: Store, who: Principal, thread: Thread) -> None:
    answer = await started_run(store, who, thread.id)
    assert await store.delete(who, thread.id) == answer.id
    assert await store.checkpoint(who, answer.id, worker=WORKER, partial=answer) == "lost"
    with pytest.raises(ThreadNotFound):
        await store.finish(who, completed(answer))


async def test_deleting_one_thread_leaves_the_others(store: Store, who: Principal, thread: Thread) -> None:
    other = await started_thread(store, who)
    answer = await started_run(store, who, other.id)
    await store.delete(who, thread.id)
    assert len((await store.get(who, other.id)).messages) == 2
    assert await store.checkpoint(who, answer.id, worker=WORKER, partial=None) == "held"


# times


@pytest.mark.parametrize("step", [0, -10_000], ids=["stands still", "goes back"])
async def test_times_strictly_increase_under_a_clock_that(open_store: OpenStore, who: Principal, step: int) -> None:
    clock = HandClock()
    async with open_store(clock=clock) as store:
        at = timestamp(clock.now)
        thread = (await store.create(who, replace(new_thread(who), created_at=at, updated_at=at))).thread
        updates = [thread.updated_at]

        async def written() -> None:
            updates.append((await store.get(who, thread.id)).updated_at)

        for _ in range(3):
            clock.move(milliseconds=step)
            question, answer = turn(thread.id, at=clock.now)
            posted = await store.claim(who, question, answer, worker=WORKER)
            await written()
            clock.move(milliseconds=step)
            await store.finish(who, completed(posted.answer or answer))
            await written()
            clock.move(milliseconds=step)
            await store.append_message(who, new_message(thread.id, "note", "system", at=clock.now))
            await written()
            clock.move(milliseconds=step)
            updates.append((await store.update(who, thread.id, title="x")).updated_at)
            updates.append((await store.update(who, thread.id, archived=True)).updated_at)
            updates.append((await store.update(who, thread.id, archived=False)).updated_at)
        messages = (await store.get(who, thread.id)).messages
        assert len(messages) == 9
        assert increases([message.created_at for message in messages])
        assert increases(updates)


async def test_a_time_that_is_later_than_its_predecessors_is_kept(store: Store, who: Principal, thread: Thread) -> None:
    clock = HandClock()
    clock.move(days=36500)
    message = new_message(thread.id, role="system", at=clock.now)
    await store.append_message(who, message)
    assert (await store.message(who, thread.id, message.id)).created_at == message.created_at


async def test_a_moved_time_stays_through_checkpoint_and_finish(store: Store, who: Principal, thread: Thread) -> None:
    clock = HandClock()
    await store.append_message(who, new_message(thread.id, at=clock.now, role="system"))
    clock.move(days=-1)
    question, answer = turn(thread.id, at=clock.now)
    await store.claim(who, question, answer, worker=WORKER)
    moved = (await store.message(who, thread.id, answer.id)).created_at
    await store.checkpoint(who, answer.id, worker=WORKER, partial=retold(answer, "Hal"))
    assert (await store.message(who, thread.id, answer.id)).created_at == moved
    await store.finish(who, completed(answer))
    messages = (await store.get(who, thread.id)).messages
    assert messages[-1].created_at == moved
    assert increases([message.created_at for message in messages])


async def test_a_checkpoint_is_no_write_to_the_thread(store: Store, who: Principal, thread: Thread) -> None:
    answer = await started_run(store, who, thread.id)
    before = (await store.get(who, thread.id)).updated_at
    await store.checkpoint(who, answer.id, worker=WORKER, partial=retold(answer, "Hal"))
    assert (await store.get(who, thread.id)).updated_at == before


# messages


async def test_messages_are_paged_backwards(store: Store, who: Principal, thread: Thread) -> None:
    told = [new_message(thread.id, str(n), "system") for n in range(10)]
    for message in told:
        await store.append_message(who, message)

    async def page_of(before: Message | None, limit: int) -> list[str]:
        return ids((await store.messages(who, thread.id, before=before.id if before else None, limit=limit)).messages)

    assert await page_of(None, 4) == ids(told[6:])
    assert await page_of(told[6], 4) == ids(told[2:6])
    assert await page_of(told[2], 4) == ids(told[:2])
    assert await page_of(told[0], 4) == []
    assert await page_of(None, 10) == await page_of(None, 99) == ids(told)


async def test_a_long_thread_is_paged_to_its_beginning(store: Store, who: Principal, thread: Thread) -> None:
    told = [new_message(thread.id, str(n), "system") for n in range(230)]
    for message in told:
        await store.append_message(who, message)
    found: list[Message] = []
    while older := (await store.messages(who, thread.id, before=found[0].id if found else None, limit=40)).messages:
        found = older + found
    assert [message.content for message in found] == [message.content for message in told]
    assert (await store.message(who, thread.id, told[0].id)).content == "0"
    with pytest.raises(MessageNotFound):
        await store.messages(who, thread.id, before=new_id(), limit=40)


async def test_a_page_of_messages_holds_what_fits_and_paging_goes_on(
    store: Store, who: Principal, thread: Thread
) -> None:
    stored = [new_message(thread.id, f"{n}" * 100_000, "system") for n in range(9)]
    for message in stored:
        await store.append_message(who, message)
    found: list[Message] = []
    while True:
        before = found[0].id if found else None
        page = await store.messages(who, thread.id, before=before, limit=100, max_bytes=350_000)
        found = page.messages + found
        assert 1 <= len(page.messages) <= 3
        assert page.cut == (found[0].id != stored[0].id)
        if not page.cut:
            break
    assert ids(found) == ids(stored)
    one = await store.messages(who, thread.id, before=None, limit=2, max_bytes=1)
    assert (ids(one.messages), one.cut) == (ids(stored[-1:]), True)
    assert not (await store.messages(who, thread.id, before=None, limit=3, max_bytes=350_000)).cut


async def test_a_thread_is_read_with_the_messages_that_fit_and_a_running_one(
    store: Store, who: Principal, thread: Thread
) -> None:
    answer = await started_run(store, who, thread.id)
    await store.checkpoint(who, answer.id, worker=WORKER, partial=replace(answer, content="x" * 200_000))
    later = [new_message(thread.id, "y" * 100_000, "system") for _ in range(5)]
    for message in later:
        await store.append_message(who, message)
    part = await store.read(who, thread.id, message_limit=50, max_bytes=350_000)
    assert (ids(part.thread.messages), part.cut) == ([answer.id, *ids(later[2:])], True)
    page = await store.messages(who, thread.id, before=later[1].id, limit=50, max_bytes=350_000)
    assert (ids(page.messages)[1:], page.cut) == (ids([answer, later[0]]), False)
    few = await store.messages(who, thread.id, before=later[0].id, limit=50, max_bytes=150_000)
    assert (ids(few.messages), few.cut) == ([answer.id], True)  # its checkpoint counts, not how it began


async def test_a_message_of_no_or_another_thread_is_not_found(store: Store, who: Principal, thread: Thread) -> None:
    elsewhere = new_message((await started_thread(store, who)).id)
    await store.append_message(who, elsewhere)
    await store.append_message(who, new_message(thread.id))
    for message_id in (new_id(), elsewhere.id, "", "nonsense"):
        with pytest.raises(MessageNotFound):
            await store.message(who, thread.id, message_id)
        with pytest.raises(MessageNotFound):
            await store.messages(who, thread.id, before=message_id, limit=5)


async def test_what_clients_and_tools_send_comes_back_the_same(store: Store, who: Principal, thread: Thread) -> None:
    attachment = new_file(thread.id, filename="ü 😀.txt", size=2**40).attachment
    question, answer = turn(thread.id, "nul \x00, 😀, e\u0301, \u2028, \r\n")
    question = replace(question, metadata=AWKWARD, attachments=[attachment], content_html="<p>&amp;</p>")
    await store.claim(who, question, answer, worker=WORKER)
    partial = replace(answer, content="a\x00😀", tool_calls=[awkward_call(), replace(awkward_call(), result=None)])
    await store.checkpoint(who, answer.id, worker=WORKER, partial=partial)
    running = (await store.messages(who, thread.id, before=None, limit=2)).messages
    assert exactly(running[1].tool_calls) == exactly(partial.tool_calls)
    final = completed(replace(partial, metadata={**AWKWARD, **partial.metadata}), "a\x00😀").with_run(usage=AWKWARD)
    await store.finish(who, final)
    for kept in (
        (await store.get(who, thread.id)).messages,
        (await page(store, who)).threads[0].messages,
        (await store.messages(who, thread.id, before=None, limit=2)).messages,
        [await store.message(who, thread.id, question.id), await store.message(who, thread.id, answer.id)],
    ):
        for message, wanted in zip(kept, [question, final], strict=True):
            assert exactly(replace(message, created_at="")) == exactly(replace(wanted, created_at=""))


# a page of threads


async def test_a_page_is_newest_updated_first(open_store: OpenStore, who: Principal) -> None:
    clock = HandClock()
    async with open_store(clock=clock) as store:
        at = timestamp(clock.now)
        threads = [replace(new_thread(who), created_at=at, updated_at=at) for _ in range(5)]
        for thread in threads:
            await store.create(who, thread)

        async def newest(thread: Thread) -> None:
            found = (await page(store, who)).threads
            assert found[0].id == thread.id
            assert increases([found[1].updated_at, found[0].updated_at])
            clock.move(seconds=1)

        clock.move(seconds=1)
        await store.append_message(who, new_message(threads[1].id))
        await newest(threads[1])
        await store.update(who, threads[0].id, title="x")
        await newest(threads[0])
        answer = await started_run(store, who, threads[2].id)
        await newest(threads[2])
        await store.update(who, threads[3].id, archived=True)
        await newest(threads[3])
        await store.finish(who, completed(answer))
        await newest(threads[2])
        assert [thread.id for thread in (await page(store, who)).threads] == [threads[n].id for n in (2, 3, 0, 1, 4)]


async def test_limit_offset_and_more_walk_through_all_threads(open_store: OpenStore, who: Principal) -> None:
    clock = HandClock()
    async with open_store(clock=clock) as store:
        made = []
        for _ in range(5):
            clock.move(seconds=1)
            at = timestamp(clock.now)
            thread = replace(new_thread(who), created_at=at, updated_at=at)
            made.append((await store.create(who, thread)).thread.id)
        newest = made[::-1]
        for offset, limit, more in ((0, 2, True), (2, 2, True), (4, 2, False), (3, 2, False), (0, 5, False)):
            found = await page(store, who, limit=limit, offset=offset)
            assert [thread.id for thread in found.threads] == newest[offset : offset + limit]
            assert found.more is more
            assert found.cut is False
        assert await page(store, who, limit=2, offset=5) == Page([], more=False, cut=False)
        assert await page(store, who, limit=2, offset=10**6) == Page([], more=False, cut=False)


async def test_a_page_holds_the_whole_organizations_threads_with_that_agent(store: Store, who: Principal) -> None:
    colleague = principal(who.organization_id)
    mine, theirs = await started_thread(store, who), await started_thread(store, colleague)
    await started_thread(store, who, "another agent")
    assert {thread.id for thread in (await page(store, who)).threads} == {mine.id, theirs.id}
    assert {thread.user_id for thread in (await page(store, colleague)).threads} == {who.user_id, colleague.user_id}


async def test_archived_threads_are_shown_alone_left_out_or_among_the_others(store: Store, who: Principal) -> None:
    open_one, put_away = await started_thread(store, who), await started_thread(store, who)
    await store.update(who, put_away.id, archived=True)

    async def shown(archived: bool | None) -> set[str]:
        found = await page(store, who, archived=archived)
        assert found.more is False
        return {thread.id for thread in found.threads}

    assert await shown(True) == {put_away.id}
    assert await shown(False) == {open_one.id}
    assert await shown(None) == {open_one.id, put_away.id}


@pytest.mark.parametrize("message_limit", [0, 1, 3, 6, 50])
async def test_a_page_holds_the_latest_messages_of_each_thread(
    store: Store, who: Principal, message_limit: int
) -> None:
    threads = [await started_thread(store, who) for _ in range(2)]
    for thread in threads:
        for n in range(3):
            await finished_run(store, who, thread.id, str(n))
    found = await page(store, who, message_limit=message_limit)
    assert found.cut is False
    for thread in found.threads:
        whole = await store.get(who, thread.id)
        assert thread == replace(whole, messages=whole.messages[-message_limit:] if message_limit else [])


async def test_past_its_bytes_a_page_holds_fewer_but_the_latest_messages_and_says_so(
    store: Store, who: Principal
) -> None:
    for _ in range(3):
        thread = await started_thread(store, who)
        for n in range(6):
            await store.append_message(who, new_message(thread.id, f"{n}" + "é" * 5000, "system"))
    found = await page(store, who, max_bytes=100_000)
    assert found.cut is True
    assert len(found.threads) == 3
    assert len(msgspec.json.encode([thread.messages for thread in found.threads])) <= 100_000 + 100
    for thread in found.threads:
        whole = (await store.get(who, thread.id)).messages
        assert 0 < len(thread.messages) < 6
        assert thread.messages == whole[-len(thread.messages) :]
    found = await page(store, who, max_bytes=ROOM)
    assert found.cut is False
    assert [len(thread.messages) for thread in found.threads] == [6, 6, 6]


async def test_a_page_is_not_called_cut_where_the_message_limit_alone_leaves_messages_out(
    store: Store, who: Principal, thread: Thread
) -> None:
    for _ in range(4):
        await store.append_message(who, new_message(thread.id, "x" * 10_000, "system"))
    found = await page(store, who, message_limit=1, max_bytes=20_000)
    assert (found.cut, len(found.threads[0].messages)) == (False, 1)


async def test_a_message_in_progress_counts_with_its_partial_against_the_bytes_of_a_page(
    store: Store, who: Principal, thread: Thread
) -> None:
    await store.append_message(who, new_message(thread.id, "x" * 10_000, "system"))
    answer = await started_run(store, who, thread.id)
    await store.checkpoint(who, answer.id, worker=WORKER, partial=retold(answer, "y" * 50_000))
    found = await page(store, who, max_bytes=55_000)
    assert len(msgspec.json.encode(found.threads[0].messages)) <= 55_000
    assert found.cut is True


# idempotency


async def test_the_same_key_creates_one_thread(store: Store, who: Principal) -> None:
    first = await store.create(who, new_thread(who, metadata=AWKWARD), idempotent())
    again = await store.create(who, new_thread(who), idempotent())
    assert (first.replayed, again.replayed) == (False, True)
    assert again.thread.id == first.thread.id
    assert exactly(again.thread.metadata) == exactly(AWKWARD)
    assert len((await page(store, who)).threads) == 1


async def test_creating_with_the_same_key_and_another_body_is_refused(store: Store, who: Principal) -> None:
    await store.create(who, new_thread(who), idempotent())
    with pytest.raises(IdempotencyMismatch):
        await store.create(who, new_thread(who), idempotent(fingerprint="another"))
    assert len((await page(store, who)).threads) == 1


async def test_a_created_threads_key_is_the_users_and_the_agents(store: Store, who: Principal) -> None:
    colleague, stranger = principal(who.organization_id), principal()
    made = [
        await store.create(who, new_thread(who), idempotent()),
        await store.create(who, new_thread(who, "another agent"), idempotent()),
        await store.create(who, new_thread(who), idempotent("another key")),
        await store.create(who, new_thread(who)),
        await store.create(who, new_thread(who)),
        await store.create(colleague, new_thread(colleague), idempotent(fingerprint="another")),
        await store.create(stranger, new_thread(stranger), idempotent(fingerprint="another")),
    ]
    assert not any(created.replayed for created in made)
    assert len({created.thread.id for created in made}) == len(made)


async def test_a_created_threads_key_is_remembered_for_24_hours(open_store: OpenStore, who: Principal) -> None:
    clock = HandClock()
    async with open_store(clock=clock) as store:
        first = await store.create(who, new_thread(who), idempotent())
        clock.move(hours=24, seconds=-1)
        assert (await store.create(who, new_thread(who), idempotent())).thread.id == first.thread.id
        clock.move(seconds=2)
        anew = await store.create(who, new_thread(who), idempotent(fingerprint="another"))
        assert anew.replayed is False
        assert anew.thread.id != first.thread.id
        clock.move(hours=23)
        assert (await store.create(who, new_thread(who), idempotent(fingerprint="another"))).replayed is True


async def test_concurrent_creates_with_one_key_make_one_thread(store: Store, who: Principal) -> None:
    made = await asyncio.gather(*[store.create(who, new_thread(who), idempotent()) for _ in range(20)])
    assert len({created.thread.id for created in made}) == 1
    assert sorted(created.replayed for created in made) == [False] + [True] * 19
    assert len((await page(store, who)).threads) == 1


async def test_the_same_key_appends_one_message(store: Store, who: Principal, thread: Thread) -> None:
    message = new_message(thread.id, role="system")
    assert said(await store.append_message(who, message, idempotent())) == Said(message.id, None, replayed=False)
    again = await store.append_message(who, new_message(thread.id, role="system"), idempotent())
    assert said(again) == Said(message.id, None, replayed=True)
    assert said(await store.replay(who, thread.id, idempotent())) == said(again)
    with pytest.raises(IdempotencyMismatch):
        await store.append_message(who, new_message(thread.id), idempotent(fingerprint="another"))
    assert ids((await store.get(who, thread.id)).messages) == [message.id]


async def test_a_messages_key_is_the_users_and_the_threads(store: Store, who: Principal, thread: Thread) -> None:
    colleague, other = principal(who.organization_id), await started_thread(store, who)
    made = [
        await store.append_message(who, new_message(thread.id), idempotent()),
        await store.append_message(colleague, new_message(thread.id), idempotent(fingerprint="another")),
        await store.append_message(who, new_message(other.id), idempotent(fingerprint="another")),
        await store.append_message(who, new_message(thread.id), idempotent("another key")),
        await store.append_message(who, new_message(thread.id)),
    ]
    assert not any(posted.replayed for posted in made)
    assert len((await store.get(who, thread.id)).messages) == 4
    assert await store.replay(colleague, other.id, idempotent()) is None


async def test_concurrent_appends_with_one_key_store_one_message(store: Store, who: Principal, thread: Thread) -> None:
    made = await asyncio.gather(*[store.append_message(who, new_message(thread.id), idempotent()) for _ in range(20)])
    assert len({posted.message_id for posted in made}) == 1
    assert sorted(posted.replayed for posted in made) == [False] + [True] * 19
    assert len((await store.get(who, thread.id)).messages) == 1


async def test_a_key_that_stored_a_message_does_not_start_a_run(store: Store, who: Principal, thread: Thread) -> None:
    message = new_message(thread.id)
    await store.append_message(who, message, idempotent())
    question, answer = turn(thread.id)
    with pytest.raises(IdempotencyMismatch):
        await store.claim(who, question, answer, worker=WORKER, idempotency=idempotent(fingerprint="another"))
    posted = await store.claim(who, question, answer, worker=WORKER, idempotency=idempotent())
    assert said(posted) == Said(message.id, None, replayed=True)
    assert await store.record(who, answer.id) is None


async def test_replay_knows_nothing_of_a_key_that_was_not_used(store: Store, who: Principal, thread: Thread) -> None:
    assert await store.replay(who, thread.id, idempotent()) is None


async def test_a_claim_answers_with_the_messages_as_they_are_stored(
    store: Store, who: Principal, thread: Thread
) -> None:
    await store.append_message(who, new_message(thread.id, at=utcnow() + DAY))
    question, answer, posted = await claim(store, who, thread.id, idempotent())
    assert [posted.message, posted.answer] == (await store.get(who, thread.id)).messages[1:]
    assert [replace(message, created_at="") for message in (question, answer)] == [
        replace(message, created_at="") for message in (posted.message, posted.answer or answer)
    ]


async def test_a_replay_answers_with_the_messages_as_they_are_stored_now(
    store: Store, who: Principal, thread: Thread
) -> None:
    question, answer, posted = await claim(store, who, thread.id, idempotent())
    running = posted.answer or answer
    await store.checkpoint(who, answer.id, worker=WORKER, partial=retold(running, "Hal"))
    _, _, replayed = await claim(store, who, thread.id, idempotent())
    assert replayed == Posted(posted.message, retold(running, "Hal"), replayed=True)
    assert await store.replay(who, thread.id, idempotent()) == replayed
    finished = await store.finish(who, completed(running))
    _, _, replayed = await claim(store, who, thread.id, idempotent())
    assert replayed == Posted(posted.message, finished.message, replayed=True)
    assert await store.replay(who, thread.id, idempotent()) == replayed
    assert replayed.message.id == question.id


async def test_an_append_answers_with_the_message_as_it_is_stored(store: Store, who: Principal, thread: Thread) -> None:
    await store.append_message(who, new_message(thread.id, at=utcnow() + DAY))
    message = new_message(thread.id, role="system")
    posted = await store.append_message(who, message, idempotent())
    stored = await store.message(who, thread.id, message.id)
    assert posted == Posted(stored, None, replayed=False)
    replayed = Posted(stored, None, replayed=True, unpublished=True)
    assert await store.append_message(who, message, idempotent()) == replayed
    await store.mark_published(who, thread.id, [MessageCreated(stored)])
    assert await store.append_message(who, message, idempotent()) == replace(replayed, unpublished=False)


async def claim(
    store: Store, who: Principal, thread_id: str, key: Idempotency | None = None
) -> tuple[Message, Message, Posted]:
    """Ask anew; the question, the answer, and what the claim said."""
    question, answer = turn(thread_id)
    return question, answer, await store.claim(who, question, answer, worker=WORKER, idempotency=key)


async def test_the_same_key_claims_once_and_is_answered_busy_or_not(
    store: Store, who: Principal, thread: Thread
) -> None:
    question, answer, posted = await claim(store, who, thread.id, idempotent())
    assert said(posted) == Said(question.id, answer.id, replayed=False, again=False)
    expected = Said(question.id, answer.id, replayed=True)

    async def replayed() -> None:
        _, refused, posted = await claim(store, who, thread.id, idempotent())
        assert said(posted) == expected
        assert said(await store.replay(who, thread.id, idempotent())) == expected
        assert await store.record(who, refused.id) is None
        for call in (
            claim(store, who, thread.id, idempotent(fingerprint="another")),
            store.replay(who, thread.id, idempotent(fingerprint="another")),
        ):
            with pytest.raises(IdempotencyMismatch):
                await call

    await replayed()
    await store.finish(who, completed(answer))
    await replayed()
    await store.forget(who, answer.id)
    _, other, _ = await claim(store, who, thread.id)
    await replayed()
    await store.finish(who, completed(other))
    await store.update(who, thread.id, archived=True)
    await replayed()
    assert len((await store.get(who, thread.id)).messages) == 4


async def test_concurrent_claims_with_one_key_start_one_run(store: Store, who: Principal, thread: Thread) -> None:
    claims = await asyncio.gather(*[claim(store, who, thread.id, idempotent()) for _ in range(20)])
    posted = [result for _, _, result in claims]
    assert len({(result.message_id, result.run_id) for result in posted}) == 1
    assert sorted(result.replayed for result in posted) == [False] + [True] * 19
    assert len((await store.get(who, thread.id)).messages) == 2


async def test_a_claims_key_is_the_users_and_the_threads(store: Store, who: Principal, thread: Thread) -> None:
    colleague, other = principal(who.organization_id), await started_thread(store, who)
    _, answer, _ = await claim(store, who, thread.id, idempotent())
    await store.finish(who, completed(answer))
    for someone, thread_id in ((colleague, thread.id), (who, other.id)):
        _, _, posted = await claim(store, someone, thread_id, idempotent(fingerprint="another"))
        assert (posted.replayed, posted.again) == (False, False)


async def test_a_claims_key_is_remembered_for_24_hours(open_store: OpenStore, who: Principal) -> None:
    clock = HandClock()
    async with open_store(clock=clock) as store:
        thread = await started_thread(store, who)
        question, answer, _ = await claim(store, who, thread.id, idempotent())
        await store.finish(who, completed(answer))
        message = new_message(thread.id)
        await store.append_message(who, message, idempotent("other"))
        clock.move(hours=24, seconds=-1)
        assert said((await claim(store, who, thread.id, idempotent()))[2]) == Said(
            question.id, answer.id, replayed=True
        )
        assert said(await store.replay(who, thread.id, idempotent("other"))) == Said(message.id, None, replayed=True)
        clock.move(seconds=2)
        assert await store.replay(who, thread.id, idempotent(fingerprint="another")) is None
        question, answer, posted = await claim(store, who, thread.id, idempotent(fingerprint="another"))
        assert said(posted) == Said(question.id, answer.id, replayed=False)
        posted = await store.append_message(who, new_message(thread.id), idempotent("other", "another"))
        assert posted.replayed is False


async def test_a_run_that_failed_and_may_be_retried_frees_its_key(store: Store, who: Principal, thread: Thread) -> None:
    question, answer, first = await claim(store, who, thread.id, idempotent())
    await store.finish(who, failed(first.answer or answer, retryable=True))
    assert await store.replay(who, thread.id, idempotent()) is None
    _, second, posted = await claim(store, who, thread.id, idempotent())
    assert said(posted) == Said(question.id, second.id, replayed=False, again=True)
    messages = (await store.get(who, thread.id)).messages
    assert ids(messages) == [question.id, answer.id, second.id]
    assert increases([message.created_at for message in messages])
    assert messages == [posted.message, messages[1], posted.answer]
    assert (messages[2].run or {})["in_reply_to"] == question.id
    record = await store.record(who, second.id)
    assert record is not None
    assert (record.partial.run or {})["in_reply_to"] == question.id


async def test_a_freed_key_is_the_new_runs(store: Store, who: Principal, thread: Thread) -> None:
    question, answer, _ = await claim(store, who, thread.id, idempotent())
    for _ in range(3):
        await store.finish(who, failed(answer, retryable=True))
        _, answer, posted = await claim(store, who, thread.id, idempotent())
        assert said(posted) == Said(question.id, answer.id, replayed=False, again=True)
        _, _, posted = await claim(store, who, thread.id, idempotent())
        assert said(posted) == Said(question.id, answer.id, replayed=True)
    await store.finish(who, completed(answer))
    assert said(await store.replay(who, thread.id, idempotent())) == Said(question.id, answer.id, replayed=True)
    assert len((await store.get(who, thread.id)).messages) == 5


@pytest.mark.parametrize("ending", ["completed", "cancelled", "failed for good"])
async def test_a_key_is_not_freed_by_a_run_that(store: Store, who: Principal, thread: Thread, ending: str) -> None:
    question, answer, _ = await claim(store, who, thread.id, idempotent())
    ends = {
        "completed": completed(answer),
        "cancelled": cancelled(answer),
        "failed for good": failed(answer, retryable=False),
    }
    await store.finish(who, ends[ending])
    expected = Said(question.id, answer.id, replayed=True)
    assert said(await store.replay(who, thread.id, idempotent())) == expected
    assert said((await claim(store, who, thread.id, idempotent()))[2]) == expected
    assert len((await store.get(who, thread.id)).messages) == 2


async def test_a_freed_key_runs_again_behind_what_was_said_since(store: Store, who: Principal, thread: Thread) -> None:
    question, answer, _ = await claim(store, who, thread.id, idempotent())
    await store.finish(who, failed(answer, retryable=True))
    await finished_run(store, who, thread.id, "Something else?")
    _, second, posted = await claim(store, who, thread.id, idempotent())
    assert said(posted) == Said(question.id, second.id, replayed=False, again=True)
    assert ids((await store.get(who, thread.id)).messages)[-1] == second.id


async def test_a_freed_key_waits_its_turn_like_any_other(store: Store, who: Principal, thread: Thread) -> None:
    question, answer, _ = await claim(store, who, thread.id, idempotent())
    await store.finish(who, failed(answer, retryable=True))
    other = await started_run(store, who, thread.id)
    with pytest.raises(ThreadBusy) as busy:
        await claim(store, who, thread.id, idempotent())
    assert busy.value.message_id == other.id
    await store.finish(who, completed(other))
    await store.update(who, thread.id, archived=True)
    with pytest.raises(ThreadArchived):
        await claim(store, who, thread.id, idempotent())
    await store.update(who, thread.id, archived=False)
    assert (await claim(store, who, thread.id, idempotent()))[2].message_id == question.id


async def test_concurrent_retries_with_a_freed_key_start_one_run(store: Store, who: Principal, thread: Thread) -> None:
    _, answer, _ = await claim(store, who, thread.id, idempotent())
    await store.finish(who, failed(answer, retryable=True))
    claims = await asyncio.gather(*[claim(store, who, thread.id, idempotent()) for _ in range(20)])
    assert sorted(posted.again for _, _, posted in claims) == [False] * 19 + [True]
    assert len({posted.run_id for _, _, posted in claims}) == 1
    assert len((await store.get(who, thread.id)).messages) == 3


async def test_a_freed_key_with_another_body_is_refused(store: Store, who: Principal, thread: Thread) -> None:
    _, answer, _ = await claim(store, who, thread.id, idempotent())
    await store.finish(who, failed(answer, retryable=True))
    with pytest.raises(IdempotencyMismatch):
        await claim(store, who, thread.id, idempotent(fingerprint="another"))


async def test_a_refused_claim_leaves_its_key_unused(store: Store, who: Principal, thread: Thread) -> None:
    answer = await started_run(store, who, thread.id)
    with pytest.raises(ThreadBusy):
        await claim(store, who, thread.id, idempotent())
    await store.finish(who, completed(answer))
    assert await store.replay(who, thread.id, idempotent()) is None
    assert (await claim(store, who, thread.id, idempotent(fingerprint="another")))[2].replayed is False


# claim


async def test_a_claim_appends_both_messages_and_holds_the_record(store: Store, who: Principal, thread: Thread) -> None:
    question, answer, posted = await claim(store, who, thread.id)
    assert said(posted) == Said(question.id, answer.id, replayed=False, again=False)
    kept = (await store.get(who, thread.id)).messages
    assert ids(kept) == [question.id, answer.id]
    assert kept[1].in_progress
    record = await store.record(who, answer.id)
    assert record is not None
    assert (record.id, record.thread_id, record.worker, record.cancelled) == (answer.id, thread.id, WORKER, False)
    assert record.who == Principal(who.organization_id, who.user_id)
    assert record.partial == kept[1]


async def test_of_twenty_concurrent_claims_exactly_one_wins(store: Store, who: Principal, thread: Thread) -> None:
    turns = [turn(thread.id) for _ in range(20)]
    claims = await asyncio.gather(
        *[store.claim(who, question, answer, worker=WORKER) for question, answer in turns], return_exceptions=True
    )
    [won] = [posted for posted in claims if isinstance(posted, Posted)]
    assert ids((await store.get(who, thread.id)).messages) == [won.message_id, won.run_id]
    for outcome, (_, answer) in zip(claims, turns, strict=True):
        if isinstance(outcome, Posted):
            continue
        assert isinstance(outcome, ThreadBusy)
        assert outcome.message_id == won.run_id
        assert await store.record(who, answer.id) is None


async def test_a_busy_thread_names_the_run_that_has_it(store: Store, who: Principal, thread: Thread) -> None:
    running = await started_run(store, who, thread.id)
    question, answer = turn(thread.id)
    with pytest.raises(ThreadBusy) as busy:
        await store.claim(principal(who.organization_id), question, answer, worker="worker-2")
    assert busy.value.message_id == running.id
    assert await store.record(who, answer.id) is None
    assert len((await store.get(who, thread.id)).messages) == 2


async def test_messages_may_be_stored_while_a_run_has_the_thread(store: Store, who: Principal, thread: Thread) -> None:
    running = await started_run(store, who, thread.id)
    note = new_message(thread.id, role="system")
    await store.append_message(who, note)
    await store.checkpoint(who, running.id, worker=WORKER, partial=retold(running, "Hal"))
    await store.finish(who, completed(running))
    messages = (await store.get(who, thread.id)).messages
    assert ids(messages)[1:] == [running.id, note.id]
    assert messages[1].content == "Done."


async def test_an_archived_thread_is_not_posted_to(store: Store, who: Principal, thread: Thread) -> None:
    await store.update(who, thread.id, archived=True)
    question, answer = turn(thread.id)
    with pytest.raises(ThreadArchived):
        await store.claim(who, question, answer, worker=WORKER)
    with pytest.raises(ThreadArchived):
        await store.append_message(who, question)
    assert (await store.get(who, thread.id)).messages == []
    assert await store.record(who, answer.id) is None
    await store.update(who, thread.id, archived=False)
    assert (await store.claim(who, question, answer, worker=WORKER)).replayed is False


async def test_a_run_goes_on_in_a_thread_that_is_archived_meanwhile(
    store: Store, who: Principal, thread: Thread
) -> None:
    running = await started_run(store, who, thread.id)
    await store.update(who, thread.id, archived=True)
    assert await store.checkpoint(who, running.id, worker=WORKER, partial=None) == "held"
    assert (await store.finish(who, completed(running))).won is True


# checkpoint and cancel


async def test_a_checkpoint_is_what_a_reader_in_mid_run_sees(store: Store, who: Principal, thread: Thread) -> None:
    answer = await started_run(store, who, thread.id)
    partial = replace(answer, content="Hal", tool_calls=[awkward_call()])
    assert await store.checkpoint(who, answer.id, worker=WORKER, partial=partial) == "held"
    for shown in (
        (await store.get(who, thread.id)).messages[-1],
        await store.message(who, thread.id, answer.id),
        (await store.messages(who, thread.id, before=None, limit=1)).messages[0],
        (await page(store, who)).threads[0].messages[-1],
        (await page(store, who, message_limit=1)).threads[0].messages[-1],
    ):
        assert replace(shown, created_at="") == replace(partial, created_at="")
    record = await store.record(who, answer.id)
    assert record is not None
    assert record.partial.content == "Hal"


async def test_a_checkpoint_without_a_partial_leaves_it_as_it_was(store: Store, who: Principal, thread: Thread) -> None:
    answer = await started_run(store, who, thread.id)
    await store.checkpoint(who, answer.id, worker=WORKER, partial=retold(answer, "Hal"))
    assert await store.checkpoint(who, answer.id, worker=WORKER, partial=None) == "held"
    assert (await store.message(who, thread.id, answer.id)).content == "Hal"


async def test_a_cancelled_run_learns_of_it_at_every_checkpoint_and_keeps_its_partial(
    store: Store, who: Principal, thread: Thread
) -> None:
    answer = await started_run(store, who, thread.id)
    await store.cancel(principal(who.organization_id), thread.id, answer.id)
    record = await store.record(who, answer.id)
    assert record is not None
    assert record.cancelled is True
    assert await store.checkpoint(who, answer.id, worker=WORKER, partial=retold(answer, "Hal")) == "cancelled"
    assert await store.checkpoint(who, answer.id, worker=WORKER, partial=None) == "cancelled"
    assert (await store.message(who, thread.id, answer.id)).content == "Hal"
    assert (await store.message(who, thread.id, answer.id)).in_progress
    assert (await store.finish(who, cancelled(answer))).won is True


async def test_cancelling_a_finished_run_changes_nothing(store: Store, who: Principal, thread: Thread) -> None:
    answer = await finished_run(store, who, thread.id)
    before = await store.get(who, thread.id)
    await store.cancel(who, thread.id, answer.id)
    assert await store.get(who, thread.id) == before
    running = await started_run(store, who, thread.id)
    await store.cancel(who, thread.id, answer.id)
    assert await store.checkpoint(who, running.id, worker=WORKER, partial=None) == "held"


async def test_cancelling_a_finished_run_that_is_not_forgotten_yet_marks_nothing(
    store: Store, who: Principal, thread: Thread
) -> None:
    answer = await started_run(store, who, thread.id)
    await store.finish(who, completed(answer))
    await store.cancel(who, thread.id, answer.id)
    record = await store.record(who, answer.id)
    assert record is not None
    assert record.cancelled is False


async def test_a_checkpoint_after_the_end_does_not_touch_the_finished_message(
    store: Store, who: Principal, thread: Thread
) -> None:
    answer = await started_run(store, who, thread.id)
    await store.finish(who, completed(answer))
    before = await store.get(who, thread.id)
    await store.checkpoint(who, answer.id, worker=WORKER, partial=retold(answer, "late"))
    assert await store.get(who, thread.id) == before
    assert (await page(store, who)).threads[0] == before


async def test_a_checkpoint_without_a_record_is_lost_and_writes_nothing(
    store: Store, who: Principal, thread: Thread
) -> None:
    answer = await finished_run(store, who, thread.id)
    before = await store.get(who, thread.id)
    for run_id in (answer.id, new_id()):
        partial = replace(retold(answer, "late"), id=run_id)
        assert await store.checkpoint(who, run_id, worker=WORKER, partial=partial) == "lost"
        assert await store.record(who, run_id) is None
    assert await store.get(who, thread.id) == before


async def test_another_workers_checkpoint_is_lost_and_writes_nothing(
    store: Store, who: Principal, thread: Thread
) -> None:
    answer = await started_run(store, who, thread.id)
    assert await store.checkpoint(who, answer.id, worker="worker-2", partial=retold(answer, "x")) == "lost"
    assert (await store.message(who, thread.id, answer.id)).content == ""


# finish


async def test_finish_replaces_the_message_and_releases_the_thread(
    store: Store, who: Principal, thread: Thread
) -> None:
    answer = await started_run(store, who, thread.id)
    await store.checkpoint(who, answer.id, worker=WORKER, partial=retold(answer, "Hal"))
    finished = await store.finish(who, completed(answer))
    assert finished.won is True
    assert replace(finished.message, created_at="") == replace(completed(answer), created_at="")
    assert await store.message(who, thread.id, answer.id) == finished.message
    assert (await store.get(who, thread.id)).messages[-1] == finished.message
    assert (await page(store, who)).threads[0].messages[-1] == finished.message
    assert (await claim(store, who, thread.id))[2].replayed is False


async def test_of_any_number_of_finishers_one_wins_and_all_get_its_message(
    store: Store, who: Principal, thread: Thread
) -> None:
    answer = await started_run(store, who, thread.id)
    ends = [completed(answer, f"end {n}") for n in range(8)] + [cancelled(answer), failed(answer, retryable=True)]
    finished: list[Finished] = await asyncio.gather(*[store.finish(who, end) for end in ends])
    assert sorted(end.won for end in finished) == [False] * 9 + [True]
    stored = await store.message(who, thread.id, answer.id)
    assert all(end.message == stored for end in finished)
    [winner] = [wanted for end, wanted in zip(finished, ends, strict=True) if end.won]
    assert replace(stored, created_at="") == replace(winner, created_at="")


async def test_finishing_again_gives_what_is_stored_and_wins_nothing(
    store: Store, who: Principal, thread: Thread
) -> None:
    answer = await started_run(store, who, thread.id)
    first = await store.finish(who, completed(answer))
    before = await store.get(who, thread.id)
    assert await store.finish(who, cancelled(answer)) == Finished(first.message, won=False)
    running = await started_run(store, who, thread.id)
    assert await store.finish(who, cancelled(answer)) == Finished(first.message, won=False)
    with pytest.raises(ThreadBusy) as busy:
        await claim(store, who, thread.id)
    assert busy.value.message_id == running.id
    assert (await store.get(who, thread.id)).messages[:2] == before.messages


async def test_a_lost_finish_frees_no_key(store: Store, who: Principal, thread: Thread) -> None:
    question, answer, _ = await claim(store, who, thread.id, idempotent())
    await store.finish(who, completed(answer))
    await store.finish(who, failed(answer, retryable=True))
    assert said(await store.replay(who, thread.id, idempotent())) == Said(question.id, answer.id, replayed=True)


async def test_a_message_that_is_not_there_is_not_finished(store: Store, who: Principal, thread: Thread) -> None:
    _, unknown = turn(thread.id)
    with pytest.raises(MessageNotFound):
        await store.finish(who, completed(unknown))
    running = await started_run(store, who, thread.id)
    with pytest.raises(MessageNotFound):
        await store.finish(who, completed(unknown))
    assert (await store.finish(who, completed(running))).won is True


async def test_the_record_is_there_until_it_is_forgotten(store: Store, who: Principal, thread: Thread) -> None:
    answer = await started_run(store, who, thread.id)
    await store.finish(who, completed(answer))
    assert await store.record(who, answer.id) is not None
    await store.forget(who, answer.id)
    assert await store.record(who, answer.id) is None
    await store.forget(who, answer.id)
    assert (await store.message(who, thread.id, answer.id)).status == "completed"


# orphans


async def test_a_run_whose_lease_holds_is_no_orphan(store: Store, who: Principal, thread: Thread) -> None:
    answer = await started_run(store, who, thread.id)
    assert await store.orphans("worker-2") == []
    assert await store.orphan(who, answer.id, "worker-2") is None
    assert await store.checkpoint(who, answer.id, worker=WORKER, partial=None) == "held"


async def test_an_orphan_goes_to_one_of_those_who_ask_and_its_old_worker_has_lost_it(
    open_store: OpenStore, who: Principal
) -> None:
    async with open_store(lease=0.0) as store, open_store(peer=True) as peer:
        thread = await started_thread(store, who)
        answer = await started_run(store, who, thread.id)
        await store.checkpoint(who, answer.id, worker=WORKER, partial=retold(answer, "Hal"))
        workers = [f"sweeper-{n}" for n in range(10)]
        taken = await asyncio.gather(*[peer.orphans(worker) for worker in workers])
        [record] = [record for records in taken for record in records]
        winner = workers[[bool(records) for records in taken].index(True)]
        assert (record.id, record.thread_id, record.worker) == (answer.id, thread.id, winner)
        assert record.partial.content == "Hal"
        assert record.who == who
        assert await store.checkpoint(who, answer.id, worker=WORKER, partial=retold(answer, "late")) == "lost"
        assert (await store.message(who, thread.id, answer.id)).content == "Hal"
        assert await peer.checkpoint(who, answer.id, worker=winner, partial=None) == "held"
        assert await peer.record(who, answer.id) == record
        end = await peer.finish(who, failed(record.partial, retryable=True))
        assert end.won is True
        assert await store.finish(who, completed(answer)) == Finished(end.message, won=False)
        assert await peer.record(who, answer.id) is not None
        await peer.forget(who, answer.id)
        assert await peer.record(who, answer.id) is None
        assert await peer.orphans(winner) == []


async def test_one_orphan_is_taken_over_by_one_of_those_who_ask_for_it(open_store: OpenStore, who: Principal) -> None:
    async with open_store(lease=0.0) as store, open_store(peer=True) as peer:
        thread = await started_thread(store, who)
        answer = await started_run(store, who, thread.id)
        taken = await asyncio.gather(*[peer.orphan(who, answer.id, f"sweeper-{n}") for n in range(10)])
        [record] = [record for record in taken if record is not None]
        assert record == await peer.record(who, answer.id)
        assert await store.checkpoint(who, answer.id, worker=WORKER, partial=None) == "lost"
        assert await peer.orphan(who, new_id(), "sweeper") is None


async def test_a_checkpoint_renews_the_lease(open_store: OpenStore, who: Principal) -> None:
    async with open_store(lease=0.0) as store, open_store(peer=True) as peer:
        answer = await started_run(store, who, (await started_thread(store, who)).id)
        assert await peer.checkpoint(who, answer.id, worker=WORKER, partial=None) == "held"
        assert await peer.orphans("sweeper") == []


async def test_a_lease_that_nobody_took_over_is_held(open_store: OpenStore, who: Principal) -> None:
    async with open_store(lease=0.0) as store:
        answer = await started_run(store, who, (await started_thread(store, who)).id)
        assert await store.checkpoint(who, answer.id, worker=WORKER, partial=None) == "held"
        assert (await store.finish(who, completed(answer))).won is True


async def test_orphans_are_those_of_every_organization(open_store: OpenStore) -> None:
    async with open_store(lease=0.0) as store:
        answers = set()
        for owner in (principal(), principal()):
            answers.add((await started_run(store, owner, (await started_thread(store, owner)).id)).id)
        assert {record.id for record in await store.orphans("sweeper")} == answers


async def test_a_finished_run_that_was_not_forgotten_is_an_orphan_too(open_store: OpenStore, who: Principal) -> None:
    async with open_store(lease=0.0) as store:
        thread = await started_thread(store, who)
        answer = await started_run(store, who, thread.id)
        await store.finish(who, completed(answer))
        assert [record.id for record in await store.orphans("sweeper")] == [answer.id]


async def test_a_cancelled_orphan_is_still_cancelled(open_store: OpenStore, who: Principal) -> None:
    async with open_store(lease=0.0) as store:
        thread = await started_thread(store, who)
        answer = await started_run(store, who, thread.id)
        await store.cancel(who, thread.id, answer.id)
        [record] = await store.orphans("sweeper")
        assert record.cancelled is True
        assert await store.checkpoint(who, answer.id, worker="sweeper", partial=None) == "cancelled"


async def test_a_record_that_cannot_be_read_keeps_no_other_run_from_being_taken_over(
    open_store: OpenStore, who: Principal, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_store(lease=0.0) as store:
        damaged, sound = [await started_run(store, who, (await started_thread(store, who)).id) for _ in range(2)]
        unreadable = replace(damaged, metadata=msgspec.Raw(b"{"))
        await store.checkpoint(who, damaged.id, worker=WORKER, partial=unreadable)
        assert [record.id for record in await store.orphans("sweeper")] == [sound.id]
        assert f"the record of run {damaged.id} can't be read" in caplog.text


@pytest.mark.usefixtures("embedded")
async def test_a_reopened_store_finds_every_run_an_orphan(open_store: OpenStore, who: Principal) -> None:
    async with open_store() as store:
        answers = [await started_run(store, who, (await started_thread(store, who)).id) for _ in range(3)]
    async with open_store() as store:
        records = await store.orphans("anew")
        assert {record.id for record in records} == {answer.id for answer in answers}
        assert {record.worker for record in records} == {"anew"}
        assert await store.orphans("another") == []
        assert await store.checkpoint(who, answers[0].id, worker=WORKER, partial=None) == "lost"


async def test_a_reopened_store_has_everything_that_was_acknowledged(open_store: OpenStore, who: Principal) -> None:
    async with open_store() as store:
        thread = (await store.create(who, new_thread(who, metadata=AWKWARD), idempotent())).thread
        question, answer, _ = await claim(store, who, thread.id, idempotent())
        await store.finish(who, failed(answer, retryable=True))
        await store.forget(who, answer.id)
        note = new_message(thread.id, role="system")
        await store.append_message(who, note, idempotent("note"))
        running = await started_run(store, who, thread.id)
        await store.checkpoint(who, running.id, worker=WORKER, partial=retold(running, "Hal"))
        await store.cancel(who, thread.id, running.id)
        before, listed = await store.get(who, thread.id), await page(store, who)
    async with open_store() as store:
        assert exactly(await store.get(who, thread.id)) == exactly(before)
        assert exactly(await page(store, who)) == exactly(listed)
        assert (await store.create(who, new_thread(who), idempotent())).thread.id == thread.id
        assert said(await store.replay(who, thread.id, idempotent("note"))) == Said(note.id, None, replayed=True)
        assert await store.record(who, answer.id) is None
        record = await store.record(who, running.id)
        assert record is not None
        assert (record.cancelled, record.partial.content) == (True, "Hal")
        with pytest.raises(ThreadBusy):
            await claim(store, who, thread.id)
        assert (await store.finish(who, cancelled(running))).won is True
        _, second, posted = await claim(store, who, thread.id, idempotent())
        assert said(posted) == Said(question.id, second.id, replayed=False, again=True)


# many at once


async def test_a_run_is_told_the_same_by_everything_that_goes_on_at_once(
    store: Store, who: Principal, thread: Thread
) -> None:
    """Turns, checkpoints, notes, renamings and readers on one thread: times increase and no message is lost."""
    notes = [new_message(thread.id, f"note {n}", "system") for n in range(20)]
    seen: list[list[Message]] = []

    async def turns() -> None:
        for n in range(10):
            answer = await started_run(store, who, thread.id, f"question {n}")
            await store.checkpoint(who, answer.id, worker=WORKER, partial=retold(answer, "Hal"))
            await store.finish(who, completed(answer))
            await store.forget(who, answer.id)

    async def readers() -> None:
        for _ in range(20):
            seen.append((await store.get(who, thread.id)).messages)

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        group.create_task(turns())
        group.create_task(readers())
        for note in notes:
            group.create_task(store.append_message(who, note))
            group.create_task(store.update(who, thread.id, title=note.content))
    messages = (await store.get(who, thread.id)).messages
    assert len(messages) == 40
    assert set(ids(notes)) <= set(ids(messages))
    assert increases([message.created_at for message in messages])
    assert {message.content for message in messages if message.role == "assistant"} == {"Done."}
    for glimpse in seen:
        assert ids(glimpse) == ids(messages)[: len(glimpse)]


async def test_a_message_that_cannot_be_written_harms_nobody_else(store: Store, who: Principal, thread: Thread) -> None:
    deep: JSONObject = {}
    for _ in range(5_000):
        deep = {"": deep}
    question, answer = turn(thread.id)
    running = await started_run(store, who, (await started_thread(store, who)).id)
    for call in (
        store.append_message(who, replace(new_message(thread.id), metadata=deep)),
        store.claim(who, replace(question, metadata=deep), answer, worker=WORKER),
        store.checkpoint(who, running.id, worker=WORKER, partial=replace(running, metadata=deep)),
    ):
        with pytest.raises((RecursionError, ValueError, StoreError)):
            async with asyncio.timeout(5):
                await call
    async with asyncio.timeout(5):
        await store.append_message(who, new_message(thread.id))
        assert len((await store.get(who, thread.id)).messages) == 1
        assert await store.record(who, answer.id) is None


async def test_what_a_store_refuses_is_a_store_error(store: Store, who: Principal, thread: Thread) -> None:
    answer = new_answer(thread.id, new_id(), None, thread.created_at)
    with pytest.raises(StoreError):
        await store.finish(who, answer)
