"""Runs whose lease has expired, each taken over by one process (I5)."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from msgspec.structs import replace

from agent_chat.stores.contracts import Finished, Store
from agent_chat.stores.models import Principal, Thread, new_id
from tests.contracts.thread_store.calls import with_content
from tests.support.backends import OpenStore
from tests.support.samples import WORKER, completed, failed, new_principal, started_run, started_thread


async def test_a_run_whose_lease_has_not_expired_is_not_taken_over(
    store: Store, principal: Principal, thread: Thread
) -> None:
    answer = await started_run(store, principal, thread.id)
    assert await store.take_orphans("worker-2") == []
    assert await store.take_orphan(principal, answer.id, "worker-2") is None
    assert await store.checkpoint(principal, answer.id, worker=WORKER, partial=None) == "held"


async def test_an_orphan_goes_to_one_caller_and_its_old_worker_has_lost_it(
    open_store: OpenStore, principal: Principal
) -> None:
    """I5."""
    async with open_store(lease=0.0) as store, open_store(peer=True) as peer:
        thread = await started_thread(store, principal)
        answer = await started_run(store, principal, thread.id)
        await store.checkpoint(principal, answer.id, worker=WORKER, partial=with_content(answer, "Hal"))
        workers = [f"sweeper-{n}" for n in range(10)]
        taken = await asyncio.gather(*[peer.take_orphans(worker) for worker in workers])
        [record] = [record for records in taken for record in records]
        winner = workers[[bool(records) for records in taken].index(True)]
        assert (record.id, record.thread_id, record.worker) == (answer.id, thread.id, winner)
        assert record.partial.content == "Hal"
        assert record.principal == principal
        assert (
            await store.checkpoint(principal, answer.id, worker=WORKER, partial=with_content(answer, "late")) == "lost"
        )
        assert (await store.get_message(principal, thread.id, answer.id)).content == "Hal"
        assert await peer.checkpoint(principal, answer.id, worker=winner, partial=None) == "held"
        assert await peer.find_record(principal, answer.id) == record
        end = await peer.finish(principal, failed(record.partial, retryable=True))
        assert end.won is True
        assert await store.finish(principal, completed(answer)) == Finished(end.message, won=False)
        assert await peer.find_record(principal, answer.id) is not None
        await peer.delete_record(principal, answer.id)
        assert await peer.find_record(principal, answer.id) is None
        assert await peer.take_orphans(winner) == []


async def test_a_named_orphan_goes_to_one_caller(open_store: OpenStore, principal: Principal) -> None:
    """I5."""
    async with open_store(lease=0.0) as store, open_store(peer=True) as peer:
        thread = await started_thread(store, principal)
        answer = await started_run(store, principal, thread.id)
        taken = await asyncio.gather(*[peer.take_orphan(principal, answer.id, f"sweeper-{n}") for n in range(10)])
        [record] = [record for record in taken if record is not None]
        assert record == await peer.find_record(principal, answer.id)
        assert await store.checkpoint(principal, answer.id, worker=WORKER, partial=None) == "lost"
        assert await peer.take_orphan(principal, new_id(), "sweeper") is None


async def test_a_checkpoint_renews_the_lease(open_store: OpenStore, principal: Principal) -> None:
    async with open_store(lease=0.0) as store, open_store(peer=True) as peer:
        answer = await started_run(store, principal, (await started_thread(store, principal)).id)
        assert await peer.checkpoint(principal, answer.id, worker=WORKER, partial=None) == "held"
        assert await peer.take_orphans("sweeper") == []


async def test_an_expired_lease_that_was_not_taken_over_is_still_held(
    open_store: OpenStore, principal: Principal
) -> None:
    async with open_store(lease=0.0) as store:
        answer = await started_run(store, principal, (await started_thread(store, principal)).id)
        assert await store.checkpoint(principal, answer.id, worker=WORKER, partial=None) == "held"
        assert (await store.finish(principal, completed(answer))).won is True


async def test_orphans_of_every_organization_are_taken_over(open_store: OpenStore) -> None:
    async with open_store(lease=0.0) as store:
        answers = set()
        for owner in (new_principal(), new_principal()):
            answers.add((await started_run(store, owner, (await started_thread(store, owner)).id)).id)
        assert {record.id for record in await store.take_orphans("sweeper")} == answers


async def test_a_finished_run_with_a_record_is_an_orphan_too(open_store: OpenStore, principal: Principal) -> None:
    async with open_store(lease=0.0) as store:
        thread = await started_thread(store, principal)
        answer = await started_run(store, principal, thread.id)
        await store.finish(principal, completed(answer))
        assert [record.id for record in await store.take_orphans("sweeper")] == [answer.id]


async def test_a_cancelled_orphan_is_still_cancelled(open_store: OpenStore, principal: Principal) -> None:
    async with open_store(lease=0.0) as store:
        thread = await started_thread(store, principal)
        answer = await started_run(store, principal, thread.id)
        await store.cancel(principal, thread.id, answer.id)
        [record] = await store.take_orphans("sweeper")
        assert record.cancelled is True
        assert await store.checkpoint(principal, answer.id, worker="sweeper", partial=None) == "cancelled"


async def test_a_record_that_cannot_be_read_does_not_stop_the_take_over_of_others(
    open_store: OpenStore, principal: Principal, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_store(lease=0.0) as store:
        damaged, sound = [
            await started_run(store, principal, (await started_thread(store, principal)).id) for _ in range(2)
        ]
        unreadable = replace(damaged, metadata=msgspec.Raw(b"{"))
        await store.checkpoint(principal, damaged.id, worker=WORKER, partial=unreadable)
        assert [record.id for record in await store.take_orphans("sweeper")] == [sound.id]
        assert f"The record of run {damaged.id} cannot be read" in caplog.text
