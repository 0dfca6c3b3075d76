"""Claiming a thread for a run: one run per thread (I2), with a record from before the claim (I3)."""

from __future__ import annotations

import asyncio

import pytest

from agent_chat.stores.contracts import Posted, Store
from agent_chat.stores.errors import ThreadArchived, ThreadBusy
from agent_chat.stores.models import Principal, Thread
from tests.contracts.thread_store.calls import PostedIds, claim, posted_ids, with_content
from tests.support.samples import WORKER, completed, ids, new_message, new_principal, started_run, turn


async def test_a_claim_appends_both_messages_and_stores_the_record(
    store: Store, principal: Principal, thread: Thread
) -> None:
    """I2, I3."""
    question, answer, posted = await claim(store, principal, thread.id)
    assert posted_ids(posted) == PostedIds(question.id, answer.id, replayed=False, again=False)
    stored = (await store.get(principal, thread.id)).messages
    assert ids(stored) == [question.id, answer.id]
    assert stored[1].in_progress
    record = await store.find_record(principal, answer.id)
    assert record is not None
    assert (record.id, record.thread_id, record.worker, record.cancelled) == (answer.id, thread.id, WORKER, False)
    assert record.principal == Principal(principal.organization_id, principal.user_id)
    assert record.partial == stored[1]


async def test_of_twenty_concurrent_claims_exactly_one_wins(store: Store, principal: Principal, thread: Thread) -> None:
    """I2, and I3: no record remains of the claims that were refused."""
    turns = [turn(thread.id) for _ in range(20)]
    claims = await asyncio.gather(
        *[store.claim(principal, question, answer, worker=WORKER) for question, answer in turns], return_exceptions=True
    )
    [won] = [posted for posted in claims if isinstance(posted, Posted)]
    assert ids((await store.get(principal, thread.id)).messages) == [won.message_id, won.run_id]
    for outcome, (_, answer) in zip(claims, turns, strict=True):
        if isinstance(outcome, Posted):
            continue
        assert isinstance(outcome, ThreadBusy)
        assert outcome.message_id == won.run_id
        assert await store.find_record(principal, answer.id) is None


async def test_a_busy_thread_names_the_run_that_has_it(store: Store, principal: Principal, thread: Thread) -> None:
    running = await started_run(store, principal, thread.id)
    question, answer = turn(thread.id)
    with pytest.raises(ThreadBusy) as busy:
        await store.claim(new_principal(principal.organization_id), question, answer, worker="worker-2")
    assert busy.value.message_id == running.id
    assert await store.find_record(principal, answer.id) is None
    assert len((await store.get(principal, thread.id)).messages) == 2


async def test_messages_may_be_stored_while_a_run_has_the_thread(
    store: Store, principal: Principal, thread: Thread
) -> None:
    running = await started_run(store, principal, thread.id)
    note = new_message(thread.id, role="system")
    await store.append_message(principal, note)
    await store.checkpoint(principal, running.id, worker=WORKER, partial=with_content(running, "Hal"))
    await store.finish(principal, completed(running))
    messages = (await store.get(principal, thread.id)).messages
    assert ids(messages)[1:] == [running.id, note.id]
    assert messages[1].content == "Done."


async def test_an_archived_thread_is_not_posted_to(store: Store, principal: Principal, thread: Thread) -> None:
    await store.update(principal, thread.id, archived=True)
    question, answer = turn(thread.id)
    with pytest.raises(ThreadArchived):
        await store.claim(principal, question, answer, worker=WORKER)
    with pytest.raises(ThreadArchived):
        await store.append_message(principal, question)
    assert (await store.get(principal, thread.id)).messages == []
    assert await store.find_record(principal, answer.id) is None
    await store.update(principal, thread.id, archived=False)
    assert (await store.claim(principal, question, answer, worker=WORKER)).replayed is False


async def test_a_run_continues_in_a_thread_that_is_archived_meanwhile(
    store: Store, principal: Principal, thread: Thread
) -> None:
    running = await started_run(store, principal, thread.id)
    await store.update(principal, thread.id, archived=True)
    assert await store.checkpoint(principal, running.id, worker=WORKER, partial=None) == "held"
    assert (await store.finish(principal, completed(running))).won is True
