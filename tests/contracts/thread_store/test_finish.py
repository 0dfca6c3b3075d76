"""Checkpoints, cancelling, the finish that one caller wins (I4), and the record of a run (I3)."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from agent_chat.stores.contracts import Finished, Store
from agent_chat.stores.errors import MessageNotFound, ThreadBusy
from agent_chat.stores.models import Principal, Thread, new_id
from tests.contracts.thread_store.calls import PostedIds, claim, posted_ids, read_page, with_content
from tests.support.samples import (
    WORKER,
    awkward_call,
    cancelled,
    completed,
    failed,
    finished_run,
    idempotent,
    new_principal,
    started_run,
    turn,
)


async def test_a_reader_during_a_run_sees_the_last_checkpoint(
    store: Store, principal: Principal, thread: Thread
) -> None:
    answer = await started_run(store, principal, thread.id)
    partial = replace(answer, content="Hal", tool_calls=[awkward_call()])
    assert await store.checkpoint(principal, answer.id, worker=WORKER, partial=partial) == "held"
    for shown in (
        (await store.get(principal, thread.id)).messages[-1],
        await store.get_message(principal, thread.id, answer.id),
        (await store.list_messages(principal, thread.id, before=None, limit=1)).messages[0],
        (await read_page(store, principal)).threads[0].messages[-1],
        (await read_page(store, principal, message_limit=1)).threads[0].messages[-1],
    ):
        assert replace(shown, created_at="") == replace(partial, created_at="")
    record = await store.find_record(principal, answer.id)
    assert record is not None
    assert record.partial.content == "Hal"


async def test_a_checkpoint_without_a_message_leaves_the_stored_one(
    store: Store, principal: Principal, thread: Thread
) -> None:
    answer = await started_run(store, principal, thread.id)
    await store.checkpoint(principal, answer.id, worker=WORKER, partial=with_content(answer, "Hal"))
    assert await store.checkpoint(principal, answer.id, worker=WORKER, partial=None) == "held"
    assert (await store.get_message(principal, thread.id, answer.id)).content == "Hal"


async def test_every_checkpoint_of_a_cancelled_run_returns_so_and_stores_its_message(
    store: Store, principal: Principal, thread: Thread
) -> None:
    answer = await started_run(store, principal, thread.id)
    await store.cancel(new_principal(principal.organization_id), thread.id, answer.id)
    record = await store.find_record(principal, answer.id)
    assert record is not None
    assert record.cancelled is True
    assert (
        await store.checkpoint(principal, answer.id, worker=WORKER, partial=with_content(answer, "Hal")) == "cancelled"
    )
    assert await store.checkpoint(principal, answer.id, worker=WORKER, partial=None) == "cancelled"
    assert (await store.get_message(principal, thread.id, answer.id)).content == "Hal"
    assert (await store.get_message(principal, thread.id, answer.id)).in_progress
    assert (await store.finish(principal, cancelled(answer))).won is True


async def test_cancelling_a_finished_run_changes_nothing(store: Store, principal: Principal, thread: Thread) -> None:
    answer = await finished_run(store, principal, thread.id)
    before = await store.get(principal, thread.id)
    await store.cancel(principal, thread.id, answer.id)
    assert await store.get(principal, thread.id) == before
    running = await started_run(store, principal, thread.id)
    await store.cancel(principal, thread.id, answer.id)
    assert await store.checkpoint(principal, running.id, worker=WORKER, partial=None) == "held"


async def test_cancelling_a_finished_run_that_has_a_record_marks_nothing(
    store: Store, principal: Principal, thread: Thread
) -> None:
    answer = await started_run(store, principal, thread.id)
    await store.finish(principal, completed(answer))
    await store.cancel(principal, thread.id, answer.id)
    record = await store.find_record(principal, answer.id)
    assert record is not None
    assert record.cancelled is False


async def test_a_checkpoint_after_the_finish_does_not_change_the_message(
    store: Store, principal: Principal, thread: Thread
) -> None:
    answer = await started_run(store, principal, thread.id)
    await store.finish(principal, completed(answer))
    before = await store.get(principal, thread.id)
    await store.checkpoint(principal, answer.id, worker=WORKER, partial=with_content(answer, "late"))
    assert await store.get(principal, thread.id) == before
    assert (await read_page(store, principal)).threads[0] == before


async def test_a_checkpoint_without_a_record_is_lost_and_writes_nothing(
    store: Store, principal: Principal, thread: Thread
) -> None:
    answer = await finished_run(store, principal, thread.id)
    before = await store.get(principal, thread.id)
    for run_id in (answer.id, new_id()):
        partial = replace(with_content(answer, "late"), id=run_id)
        assert await store.checkpoint(principal, run_id, worker=WORKER, partial=partial) == "lost"
        assert await store.find_record(principal, run_id) is None
    assert await store.get(principal, thread.id) == before


async def test_another_workers_checkpoint_is_lost_and_writes_nothing(
    store: Store, principal: Principal, thread: Thread
) -> None:
    answer = await started_run(store, principal, thread.id)
    assert await store.checkpoint(principal, answer.id, worker="worker-2", partial=with_content(answer, "x")) == "lost"
    assert (await store.get_message(principal, thread.id, answer.id)).content == ""


# finish


async def test_finish_replaces_the_message_and_releases_the_thread(
    store: Store, principal: Principal, thread: Thread
) -> None:
    answer = await started_run(store, principal, thread.id)
    await store.checkpoint(principal, answer.id, worker=WORKER, partial=with_content(answer, "Hal"))
    finished = await store.finish(principal, completed(answer))
    assert finished.won is True
    assert replace(finished.message, created_at="") == replace(completed(answer), created_at="")
    assert await store.get_message(principal, thread.id, answer.id) == finished.message
    assert (await store.get(principal, thread.id)).messages[-1] == finished.message
    assert (await read_page(store, principal)).threads[0].messages[-1] == finished.message
    assert (await claim(store, principal, thread.id))[2].replayed is False


async def test_of_any_number_of_finishers_one_wins_and_all_get_its_message(
    store: Store, principal: Principal, thread: Thread
) -> None:
    """I4."""
    answer = await started_run(store, principal, thread.id)
    ends = [completed(answer, f"end {n}") for n in range(8)] + [cancelled(answer), failed(answer, retryable=True)]
    finished: list[Finished] = await asyncio.gather(*[store.finish(principal, end) for end in ends])
    assert sorted(end.won for end in finished) == [False] * 9 + [True]
    stored = await store.get_message(principal, thread.id, answer.id)
    assert all(end.message == stored for end in finished)
    [winner] = [wanted for end, wanted in zip(finished, ends, strict=True) if end.won]
    assert replace(stored, created_at="") == replace(winner, created_at="")


async def test_finishing_again_returns_the_stored_message_and_does_not_win(
    store: Store, principal: Principal, thread: Thread
) -> None:
    answer = await started_run(store, principal, thread.id)
    first = await store.finish(principal, completed(answer))
    before = await store.get(principal, thread.id)
    assert await store.finish(principal, cancelled(answer)) == Finished(first.message, won=False)
    running = await started_run(store, principal, thread.id)
    assert await store.finish(principal, cancelled(answer)) == Finished(first.message, won=False)
    with pytest.raises(ThreadBusy) as busy:
        await claim(store, principal, thread.id)
    assert busy.value.message_id == running.id
    assert (await store.get(principal, thread.id)).messages[:2] == before.messages


async def test_a_finish_that_does_not_win_frees_no_key(store: Store, principal: Principal, thread: Thread) -> None:
    question, answer, _ = await claim(store, principal, thread.id, idempotent())
    await store.finish(principal, completed(answer))
    await store.finish(principal, failed(answer, retryable=True))
    assert posted_ids(await store.replay(principal, thread.id, idempotent())) == PostedIds(
        question.id, answer.id, replayed=True
    )


async def test_finishing_an_unknown_message_is_refused(store: Store, principal: Principal, thread: Thread) -> None:
    _, unknown = turn(thread.id)
    with pytest.raises(MessageNotFound):
        await store.finish(principal, completed(unknown))
    running = await started_run(store, principal, thread.id)
    with pytest.raises(MessageNotFound):
        await store.finish(principal, completed(unknown))
    assert (await store.finish(principal, completed(running))).won is True


async def test_the_record_exists_until_it_is_deleted(store: Store, principal: Principal, thread: Thread) -> None:
    """I3."""
    answer = await started_run(store, principal, thread.id)
    await store.finish(principal, completed(answer))
    assert await store.find_record(principal, answer.id) is not None
    await store.delete_record(principal, answer.id)
    assert await store.find_record(principal, answer.id) is None
    await store.delete_record(principal, answer.id)
    assert (await store.get_message(principal, thread.id, answer.id)).status == "completed"
