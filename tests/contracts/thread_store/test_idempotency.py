"""Idempotency-Keys of new threads, of appended messages and of claims (I6)."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from agent_chat.stores.contracts import Posted, Store
from agent_chat.stores.errors import IdempotencyMismatch, ThreadArchived, ThreadBusy
from agent_chat.stores.events import MessageCreated
from agent_chat.stores.models import Principal, Thread, utcnow
from tests.contracts.thread_store.calls import PostedIds, claim, increases, posted_ids, read_page, with_content
from tests.support.backends import OpenStore
from tests.support.samples import (
    AWKWARD,
    DAY,
    WORKER,
    HandClock,
    cancelled,
    completed,
    exactly,
    failed,
    finished_run,
    idempotent,
    ids,
    new_message,
    new_principal,
    new_thread,
    started_run,
    started_thread,
    turn,
)


async def test_the_same_key_creates_one_thread(store: Store, principal: Principal) -> None:
    first = await store.create(principal, new_thread(principal, metadata=AWKWARD), idempotent())
    again = await store.create(principal, new_thread(principal), idempotent())
    assert (first.replayed, again.replayed) == (False, True)
    assert again.thread.id == first.thread.id
    assert exactly(again.thread.metadata) == exactly(AWKWARD)
    assert len((await read_page(store, principal)).threads) == 1


async def test_creating_with_the_same_key_and_another_body_is_refused(store: Store, principal: Principal) -> None:
    await store.create(principal, new_thread(principal), idempotent())
    with pytest.raises(IdempotencyMismatch):
        await store.create(principal, new_thread(principal), idempotent(fingerprint="another"))
    assert len((await read_page(store, principal)).threads) == 1


async def test_the_key_of_a_new_thread_belongs_to_user_and_agent(store: Store, principal: Principal) -> None:
    colleague, stranger = new_principal(principal.organization_id), new_principal()
    results = [
        await store.create(principal, new_thread(principal), idempotent()),
        await store.create(principal, new_thread(principal, "another agent"), idempotent()),
        await store.create(principal, new_thread(principal), idempotent("another key")),
        await store.create(principal, new_thread(principal)),
        await store.create(principal, new_thread(principal)),
        await store.create(colleague, new_thread(colleague), idempotent(fingerprint="another")),
        await store.create(stranger, new_thread(stranger), idempotent(fingerprint="another")),
    ]
    assert not any(created.replayed for created in results)
    assert len({created.thread.id for created in results}) == len(results)


async def test_the_key_of_a_new_thread_counts_for_24_hours(open_store: OpenStore, principal: Principal) -> None:
    clock = HandClock()
    async with open_store(clock=clock) as store:
        first = await store.create(principal, new_thread(principal), idempotent())
        clock.move(hours=24, seconds=-1)
        assert (await store.create(principal, new_thread(principal), idempotent())).thread.id == first.thread.id
        clock.move(seconds=2)
        anew = await store.create(principal, new_thread(principal), idempotent(fingerprint="another"))
        assert anew.replayed is False
        assert anew.thread.id != first.thread.id
        clock.move(hours=23)
        assert (
            await store.create(principal, new_thread(principal), idempotent(fingerprint="another"))
        ).replayed is True


async def test_concurrent_creates_with_one_key_make_one_thread(store: Store, principal: Principal) -> None:
    """I6."""
    results = await asyncio.gather(*[store.create(principal, new_thread(principal), idempotent()) for _ in range(20)])
    assert len({created.thread.id for created in results}) == 1
    assert sorted(created.replayed for created in results) == [False] + [True] * 19
    assert len((await read_page(store, principal)).threads) == 1


async def test_the_same_key_appends_one_message(store: Store, principal: Principal, thread: Thread) -> None:
    message = new_message(thread.id, role="system")
    assert posted_ids(await store.append_message(principal, message, idempotent())) == PostedIds(
        message.id, None, replayed=False
    )
    again = await store.append_message(principal, new_message(thread.id, role="system"), idempotent())
    assert posted_ids(again) == PostedIds(message.id, None, replayed=True)
    assert posted_ids(await store.replay(principal, thread.id, idempotent())) == posted_ids(again)
    with pytest.raises(IdempotencyMismatch):
        await store.append_message(principal, new_message(thread.id), idempotent(fingerprint="another"))
    assert ids((await store.get(principal, thread.id)).messages) == [message.id]


async def test_the_key_of_a_message_belongs_to_user_and_thread(
    store: Store, principal: Principal, thread: Thread
) -> None:
    colleague, other = new_principal(principal.organization_id), await started_thread(store, principal)
    results = [
        await store.append_message(principal, new_message(thread.id), idempotent()),
        await store.append_message(colleague, new_message(thread.id), idempotent(fingerprint="another")),
        await store.append_message(principal, new_message(other.id), idempotent(fingerprint="another")),
        await store.append_message(principal, new_message(thread.id), idempotent("another key")),
        await store.append_message(principal, new_message(thread.id)),
    ]
    assert not any(posted.replayed for posted in results)
    assert len((await store.get(principal, thread.id)).messages) == 4
    assert await store.replay(colleague, other.id, idempotent()) is None


async def test_concurrent_appends_with_one_key_store_one_message(
    store: Store, principal: Principal, thread: Thread
) -> None:
    """I6."""
    results = await asyncio.gather(
        *[store.append_message(principal, new_message(thread.id), idempotent()) for _ in range(20)]
    )
    assert len({posted.message_id for posted in results}) == 1
    assert sorted(posted.replayed for posted in results) == [False] + [True] * 19
    assert len((await store.get(principal, thread.id)).messages) == 1


async def test_a_key_that_stored_a_message_does_not_start_a_run(
    store: Store, principal: Principal, thread: Thread
) -> None:
    message = new_message(thread.id)
    await store.append_message(principal, message, idempotent())
    question, answer = turn(thread.id)
    with pytest.raises(IdempotencyMismatch):
        await store.claim(principal, question, answer, worker=WORKER, idempotency=idempotent(fingerprint="another"))
    posted = await store.claim(principal, question, answer, worker=WORKER, idempotency=idempotent())
    assert posted_ids(posted) == PostedIds(message.id, None, replayed=True)
    assert await store.find_record(principal, answer.id) is None


async def test_replay_returns_nothing_for_an_unused_key(store: Store, principal: Principal, thread: Thread) -> None:
    assert await store.replay(principal, thread.id, idempotent()) is None


async def test_a_claim_returns_the_messages_as_they_are_stored(
    store: Store, principal: Principal, thread: Thread
) -> None:
    await store.append_message(principal, new_message(thread.id, at=utcnow() + DAY))
    question, answer, posted = await claim(store, principal, thread.id, idempotent())
    assert [posted.message, posted.answer] == (await store.get(principal, thread.id)).messages[1:]
    assert [replace(message, created_at="") for message in (question, answer)] == [
        replace(message, created_at="") for message in (posted.message, posted.answer or answer)
    ]


async def test_a_replay_returns_the_messages_as_they_are_stored_now(
    store: Store, principal: Principal, thread: Thread
) -> None:
    question, answer, posted = await claim(store, principal, thread.id, idempotent())
    running = posted.answer or answer
    await store.checkpoint(principal, answer.id, worker=WORKER, partial=with_content(running, "Hal"))
    _, _, replayed = await claim(store, principal, thread.id, idempotent())
    assert replayed == Posted(posted.message, with_content(running, "Hal"), replayed=True)
    assert await store.replay(principal, thread.id, idempotent()) == replayed
    finished = await store.finish(principal, completed(running))
    _, _, replayed = await claim(store, principal, thread.id, idempotent())
    assert replayed == Posted(posted.message, finished.message, replayed=True)
    assert await store.replay(principal, thread.id, idempotent()) == replayed
    assert replayed.message.id == question.id


async def test_an_append_returns_the_message_as_it_is_stored(
    store: Store, principal: Principal, thread: Thread
) -> None:
    await store.append_message(principal, new_message(thread.id, at=utcnow() + DAY))
    message = new_message(thread.id, role="system")
    posted = await store.append_message(principal, message, idempotent())
    stored = await store.get_message(principal, thread.id, message.id)
    assert posted == Posted(stored, None, replayed=False)
    replayed = Posted(stored, None, replayed=True, unpublished=True)
    assert await store.append_message(principal, message, idempotent()) == replayed
    await store.mark_published(principal, thread.id, [MessageCreated(stored)])
    assert await store.append_message(principal, message, idempotent()) == replace(replayed, unpublished=False)


async def test_the_same_key_claims_once_and_is_replayed_whether_the_thread_is_busy_or_not(
    store: Store, principal: Principal, thread: Thread
) -> None:
    question, answer, posted = await claim(store, principal, thread.id, idempotent())
    assert posted_ids(posted) == PostedIds(question.id, answer.id, replayed=False, again=False)
    expected = PostedIds(question.id, answer.id, replayed=True)

    async def replayed() -> None:
        _, refused, posted = await claim(store, principal, thread.id, idempotent())
        assert posted_ids(posted) == expected
        assert posted_ids(await store.replay(principal, thread.id, idempotent())) == expected
        assert await store.find_record(principal, refused.id) is None
        for call in (
            claim(store, principal, thread.id, idempotent(fingerprint="another")),
            store.replay(principal, thread.id, idempotent(fingerprint="another")),
        ):
            with pytest.raises(IdempotencyMismatch):
                await call

    await replayed()
    await store.finish(principal, completed(answer))
    await replayed()
    await store.delete_record(principal, answer.id)
    _, other, _ = await claim(store, principal, thread.id)
    await replayed()
    await store.finish(principal, completed(other))
    await store.update(principal, thread.id, archived=True)
    await replayed()
    assert len((await store.get(principal, thread.id)).messages) == 4


async def test_concurrent_claims_with_one_key_start_one_run(store: Store, principal: Principal, thread: Thread) -> None:
    """I6."""
    claims = await asyncio.gather(*[claim(store, principal, thread.id, idempotent()) for _ in range(20)])
    posted = [result for _, _, result in claims]
    assert len({(result.message_id, result.run_id) for result in posted}) == 1
    assert sorted(result.replayed for result in posted) == [False] + [True] * 19
    assert len((await store.get(principal, thread.id)).messages) == 2


async def test_the_key_of_a_claim_belongs_to_user_and_thread(
    store: Store, principal: Principal, thread: Thread
) -> None:
    colleague, other = new_principal(principal.organization_id), await started_thread(store, principal)
    _, answer, _ = await claim(store, principal, thread.id, idempotent())
    await store.finish(principal, completed(answer))
    for someone, thread_id in ((colleague, thread.id), (principal, other.id)):
        _, _, posted = await claim(store, someone, thread_id, idempotent(fingerprint="another"))
        assert (posted.replayed, posted.again) == (False, False)


async def test_the_key_of_a_claim_counts_for_24_hours(open_store: OpenStore, principal: Principal) -> None:
    clock = HandClock()
    async with open_store(clock=clock) as store:
        thread = await started_thread(store, principal)
        question, answer, _ = await claim(store, principal, thread.id, idempotent())
        await store.finish(principal, completed(answer))
        message = new_message(thread.id)
        await store.append_message(principal, message, idempotent("other"))
        clock.move(hours=24, seconds=-1)
        assert posted_ids((await claim(store, principal, thread.id, idempotent()))[2]) == PostedIds(
            question.id, answer.id, replayed=True
        )
        assert posted_ids(await store.replay(principal, thread.id, idempotent("other"))) == PostedIds(
            message.id, None, replayed=True
        )
        clock.move(seconds=2)
        assert await store.replay(principal, thread.id, idempotent(fingerprint="another")) is None
        question, answer, posted = await claim(store, principal, thread.id, idempotent(fingerprint="another"))
        assert posted_ids(posted) == PostedIds(question.id, answer.id, replayed=False)
        posted = await store.append_message(principal, new_message(thread.id), idempotent("other", "another"))
        assert posted.replayed is False


async def test_a_run_that_failed_and_may_be_retried_frees_its_key(
    store: Store, principal: Principal, thread: Thread
) -> None:
    question, answer, first = await claim(store, principal, thread.id, idempotent())
    await store.finish(principal, failed(first.answer or answer, retryable=True))
    assert await store.replay(principal, thread.id, idempotent()) is None
    _, second, posted = await claim(store, principal, thread.id, idempotent())
    assert posted_ids(posted) == PostedIds(question.id, second.id, replayed=False, again=True)
    messages = (await store.get(principal, thread.id)).messages
    assert ids(messages) == [question.id, answer.id, second.id]
    assert increases([message.created_at for message in messages])
    assert messages == [posted.message, messages[1], posted.answer]
    assert (messages[2].run or {})["in_reply_to"] == question.id
    record = await store.find_record(principal, second.id)
    assert record is not None
    assert (record.partial.run or {})["in_reply_to"] == question.id


async def test_a_free_key_then_belongs_to_the_new_run(store: Store, principal: Principal, thread: Thread) -> None:
    question, answer, _ = await claim(store, principal, thread.id, idempotent())
    for _ in range(3):
        await store.finish(principal, failed(answer, retryable=True))
        _, answer, posted = await claim(store, principal, thread.id, idempotent())
        assert posted_ids(posted) == PostedIds(question.id, answer.id, replayed=False, again=True)
        _, _, posted = await claim(store, principal, thread.id, idempotent())
        assert posted_ids(posted) == PostedIds(question.id, answer.id, replayed=True)
    await store.finish(principal, completed(answer))
    assert posted_ids(await store.replay(principal, thread.id, idempotent())) == PostedIds(
        question.id, answer.id, replayed=True
    )
    assert len((await store.get(principal, thread.id)).messages) == 5


@pytest.mark.parametrize("ending", ["completed", "cancelled", "failed for good"])
async def test_a_key_is_not_freed_by_a_run_that(
    store: Store, principal: Principal, thread: Thread, ending: str
) -> None:
    question, answer, _ = await claim(store, principal, thread.id, idempotent())
    ends = {
        "completed": completed(answer),
        "cancelled": cancelled(answer),
        "failed for good": failed(answer, retryable=False),
    }
    await store.finish(principal, ends[ending])
    expected = PostedIds(question.id, answer.id, replayed=True)
    assert posted_ids(await store.replay(principal, thread.id, idempotent())) == expected
    assert posted_ids((await claim(store, principal, thread.id, idempotent()))[2]) == expected
    assert len((await store.get(principal, thread.id)).messages) == 2


async def test_a_retry_with_a_free_key_is_appended_after_newer_messages(
    store: Store, principal: Principal, thread: Thread
) -> None:
    question, answer, _ = await claim(store, principal, thread.id, idempotent())
    await store.finish(principal, failed(answer, retryable=True))
    await finished_run(store, principal, thread.id, "Something else?")
    _, second, posted = await claim(store, principal, thread.id, idempotent())
    assert posted_ids(posted) == PostedIds(question.id, second.id, replayed=False, again=True)
    assert ids((await store.get(principal, thread.id)).messages)[-1] == second.id


async def test_a_free_key_is_refused_while_another_run_has_the_thread(
    store: Store, principal: Principal, thread: Thread
) -> None:
    question, answer, _ = await claim(store, principal, thread.id, idempotent())
    await store.finish(principal, failed(answer, retryable=True))
    other = await started_run(store, principal, thread.id)
    with pytest.raises(ThreadBusy) as busy:
        await claim(store, principal, thread.id, idempotent())
    assert busy.value.message_id == other.id
    await store.finish(principal, completed(other))
    await store.update(principal, thread.id, archived=True)
    with pytest.raises(ThreadArchived):
        await claim(store, principal, thread.id, idempotent())
    await store.update(principal, thread.id, archived=False)
    assert (await claim(store, principal, thread.id, idempotent()))[2].message_id == question.id


async def test_concurrent_retries_with_a_free_key_start_one_run(
    store: Store, principal: Principal, thread: Thread
) -> None:
    _, answer, _ = await claim(store, principal, thread.id, idempotent())
    await store.finish(principal, failed(answer, retryable=True))
    claims = await asyncio.gather(*[claim(store, principal, thread.id, idempotent()) for _ in range(20)])
    assert sorted(posted.again for _, _, posted in claims) == [False] * 19 + [True]
    assert len({posted.run_id for _, _, posted in claims}) == 1
    assert len((await store.get(principal, thread.id)).messages) == 3


async def test_a_free_key_with_another_body_is_refused(store: Store, principal: Principal, thread: Thread) -> None:
    _, answer, _ = await claim(store, principal, thread.id, idempotent())
    await store.finish(principal, failed(answer, retryable=True))
    with pytest.raises(IdempotencyMismatch):
        await claim(store, principal, thread.id, idempotent(fingerprint="another"))


async def test_a_refused_claim_leaves_its_key_unused(store: Store, principal: Principal, thread: Thread) -> None:
    answer = await started_run(store, principal, thread.id)
    with pytest.raises(ThreadBusy):
        await claim(store, principal, thread.id, idempotent())
    await store.finish(principal, completed(answer))
    assert await store.replay(principal, thread.id, idempotent()) is None
    assert (await claim(store, principal, thread.id, idempotent(fingerprint="another")))[2].replayed is False
