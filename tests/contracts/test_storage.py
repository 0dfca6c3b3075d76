"""The Storage contract: bytes that are counted, and blobs that have a record or a removal (I10)."""

from __future__ import annotations

import asyncio

import pytest

from agent_chat.stores.contracts import Store
from agent_chat.stores.errors import StoreUnavailable, ThreadNotFound
from agent_chat.stores.models import Principal, Thread, new_id
from agent_chat.stores.mongo import storage as mongo_storage
from agent_chat.stores.sqlite import storage as sqlite_storage
from tests.support.backends import OpenStore
from tests.support.samples import new_agent, new_file, new_message, new_principal, new_thread


@pytest.fixture
def principal() -> Principal:
    return new_principal()


@pytest.fixture
async def thread(store: Store, principal: Principal) -> Thread:
    return (await store.create(principal, new_thread(principal))).thread


@pytest.fixture
def due_immediately(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removals are due immediately."""
    for module in (sqlite_storage, mongo_storage):
        monkeypatch.setattr(module, "UPLOAD_SECONDS", -1.0)
    for module in (sqlite_storage, mongo_storage):
        monkeypatch.setattr(module, "REMOVAL_SECONDS", -1.0)


async def test_concurrent_reservations_stay_within_the_limit(store: Store) -> None:
    organization = new_id()
    granted = await asyncio.gather(*[store.reserve_bytes(organization, 30, 30, 100) for _ in range(10)])
    assert sorted(granted) == [0] * 7 + [30] * 3
    assert await store.reserve_bytes(organization, 5, 50, 100) == 10  # what is left
    assert await store.reserve_bytes(organization, 1, 1, 100) == 0
    assert await store.stored_bytes(organization) == 100
    await store.release_bytes(organization, 40)
    assert await store.reserve_bytes(organization, 40, 40, 100) == 40
    assert await store.reserve_bytes(new_id(), 100, 100, 100) == 100
    await store.release_bytes(organization, 1000)
    assert await store.stored_bytes(organization) == 0


async def test_bytes_that_were_reserved_and_never_stored_are_corrected(store: Store) -> None:
    principal = new_principal((await store.create_organization("Acme")).id)
    thread = (await store.create(principal, new_thread(principal))).thread
    for _ in range(3):
        await store.append_message(principal, new_message(thread.id, "x" * 10_000))
    await store.add_file(principal, new_file(thread.id, size=5_000))
    await store.create_agent(principal, new_agent(principal))
    await store.begin_upload(principal, thread.id, new_id(), 7_000)
    await store.reserve_bytes(principal.organization_id, 2**24, 2**24, 2**30)  # by a process that has died
    await store.correct_bytes()
    measured = await store.stored_bytes(principal.organization_id)
    assert 42_000 < measured < 48_000
    await store.reserve_bytes(principal.organization_id, 2**24, 2**24, 2**30)
    await store.correct_bytes()  # not again within the hour
    assert await store.stored_bytes(principal.organization_id) == measured + 2**24


async def test_deleting_a_thread_releases_its_bytes(store: Store) -> None:
    principal = new_principal((await store.create_organization("Acme")).id)
    await store.reserve_bytes(principal.organization_id, 100_000, 100_000, 2**30)
    thread = (await store.create(principal, new_thread(principal))).thread
    await store.append_message(principal, new_message(thread.id, "x" * 10_000))
    await store.add_file(principal, new_file(thread.id, size=20_000))
    await store.delete(principal, thread.id)
    assert 66_000 < await store.stored_bytes(principal.organization_id) < 70_000


@pytest.mark.usefixtures("due_immediately")
async def test_the_blob_of_an_upload_whose_process_died_is_removed(
    store: Store, principal: Principal, thread: Thread
) -> None:
    """I10."""
    await store.reserve_bytes(principal.organization_id, 100, 100, 1000)
    lost = new_id()
    await store.begin_upload(principal, thread.id, lost, 40)
    (removal,) = await store.take_removals()
    fields = (removal.organization_id, removal.thread_id, removal.attachment_id, removal.size)
    assert fields == (principal.organization_id, thread.id, lost, 40)
    assert await store.take_removals() == [removal]  # it was not finished, so it is taken again
    await store.finish_removal(removal.id)
    await store.finish_removal(removal.id)
    assert await store.take_removals() == []
    assert await store.stored_bytes(principal.organization_id) == 60


@pytest.mark.usefixtures("due_immediately")
async def test_a_stored_attachment_is_not_removed(store: Store, principal: Principal, thread: Thread) -> None:
    file = new_file(thread.id)
    await store.begin_upload(principal, thread.id, file.attachment.id, 40)
    await store.add_file(principal, file)
    assert await store.take_removals() == []
    await store.begin_upload(principal, thread.id, file.attachment.id, 40)  # as if `add_file` had failed to drop it
    assert await store.take_removals() == []
    assert await store.get_file(principal, thread.id, file.attachment.id) == file


@pytest.mark.usefixtures("due_immediately")
async def test_an_upload_that_was_considered_dead_stores_no_record(
    store: Store, principal: Principal, thread: Thread
) -> None:
    file = new_file(thread.id)
    await store.begin_upload(principal, thread.id, file.attachment.id, 40)
    assert len(await store.take_removals()) == 1
    with pytest.raises(StoreUnavailable):
        await store.add_file(principal, file)
    assert len(await store.take_removals()) == 1


@pytest.mark.usefixtures("due_immediately")
async def test_deleted_attachments_and_threads_leave_removals(
    store: Store, principal: Principal, thread: Thread
) -> None:
    """I10."""
    first, second = new_file(thread.id), new_file(thread.id)
    for file in (first, second):
        await store.add_file(principal, file)
    await store.remove_file(principal, thread.id, first.attachment.id)
    (removal,) = await store.take_removals()
    assert removal.attachment_id == first.attachment.id
    await store.finish_removal(removal.id)
    await store.delete(principal, thread.id)
    with pytest.raises(ThreadNotFound):  # as another process would, a moment later
        await store.delete(principal, thread.id)
    (removal,) = await store.take_removals()
    assert (removal.id, removal.thread_id, removal.attachment_id) == (thread.id, thread.id, None)


async def test_the_removal_of_an_upload_under_way_is_not_due(
    store: Store, principal: Principal, thread: Thread
) -> None:
    await store.begin_upload(principal, thread.id, new_id(), 40)
    assert await store.take_removals() == []


async def test_removals_of_an_embedded_server_that_was_killed_are_due_at_its_next_start(
    open_store: OpenStore, embedded: None, principal: Principal
) -> None:
    async with open_store() as store:
        thread = (await store.create(principal, new_thread(principal))).thread
        await store.begin_upload(principal, thread.id, new_id(), 40)
    async with open_store() as store:
        assert len(await store.take_removals()) == 1
