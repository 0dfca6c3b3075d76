"""The records of attachments; `test_storage` has the removal of their blobs (I10)."""

from __future__ import annotations

import pytest

from agent_chat.stores.contracts import Store
from agent_chat.stores.errors import AttachmentNotFound, ThreadNotFound
from agent_chat.stores.models import Principal, new_id
from tests.support.samples import new_file, new_thread


@pytest.fixture
def principal() -> Principal:
    return Principal(new_id(), new_id())


async def test_a_file_is_read_unchanged(store: Store, principal: Principal) -> None:
    thread = (await store.create(principal, new_thread(principal))).thread
    file = new_file(thread.id, text="line\n" * 1000 + "\u0000\U0001f388")
    await store.add_file(principal, file)
    assert await store.get_file(principal, thread.id, file.attachment.id) == file


async def test_a_file_belongs_to_one_thread(store: Store, principal: Principal) -> None:
    thread, other = [(await store.create(principal, new_thread(principal))).thread for _ in range(2)]
    file = new_file(thread.id)
    await store.add_file(principal, file)
    with pytest.raises(AttachmentNotFound):
        await store.get_file(principal, other.id, file.attachment.id)
    with pytest.raises(AttachmentNotFound):
        await store.get_file(principal, thread.id, new_id())


async def test_a_deleted_thread_has_no_files_and_accepts_none(store: Store, principal: Principal) -> None:
    thread = (await store.create(principal, new_thread(principal))).thread
    file = new_file(thread.id, size=7)
    await store.add_file(principal, file)
    await store.delete(principal, thread.id)
    with pytest.raises(ThreadNotFound):
        await store.get_file(principal, thread.id, file.attachment.id)
    with pytest.raises(ThreadNotFound):
        await store.add_file(principal, new_file(thread.id))


async def test_a_removed_file_is_not_found(store: Store, principal: Principal) -> None:
    thread, other = [(await store.create(principal, new_thread(principal))).thread for _ in range(2)]
    file, other_file = new_file(thread.id, size=7), new_file(thread.id, size=1)
    for each in (file, other_file):
        await store.add_file(principal, each)
    await store.remove_file(principal, other.id, file.attachment.id)
    assert await store.get_file(principal, thread.id, file.attachment.id) == file
    for _ in range(2):
        await store.remove_file(principal, thread.id, file.attachment.id)
    with pytest.raises(AttachmentNotFound):
        await store.get_file(principal, thread.id, file.attachment.id)
    assert await store.get_file(principal, thread.id, other_file.attachment.id) == other_file
