"""The outbox: every fact is returned until it is marked as published, in order and bounded (I8)."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from msgspec.structs import replace

from agent_chat.stores.contracts import OUTBOX_FACTS, OUTBOX_FACTS_READ, Outbox, Store
from agent_chat.stores.events import MessageCreated, ThreadDeleted, ThreadUpdated, fact_id
from agent_chat.stores.models import Principal, Thread
from tests.support.backends import OpenStore
from tests.support.samples import WORKER, new_message, new_principal, started_thread, turn

NOW = 0.0
"""A lease that has always expired: any caller gets every fact."""


async def outbox(store: Store, thread: Thread) -> Outbox | None:
    found = [each for each in await store.take_outboxes() if each.thread_id == thread.id]
    assert len(found) <= 1
    return found[0] if found else None


async def note(store: Store, principal: Principal, thread: Thread, content: str = "noted") -> MessageCreated:
    return MessageCreated((await store.append_message(principal, new_message(thread.id, content, "system"))).message)


async def test_every_write_that_starts_no_run_is_in_the_outbox_until_it_is_marked(open_store: OpenStore) -> None:
    """I8."""
    async with open_store(lease=NOW) as store:
        principal = new_principal()
        thread = await started_thread(store, principal)
        assert await outbox(store, thread) is None
        created = await note(store, principal, thread)
        updated = ThreadUpdated(await store.update(principal, thread.id, title="new"))
        later = await note(store, principal, thread, "later")
        assert await outbox(store, thread) == Outbox(
            thread.id,
            principal.organization_id,
            [created, ThreadUpdated(await store.get(principal, thread.id, message_limit=0)), later],
        )
        await store.mark_published(principal, thread.id, [created])
        await store.mark_published(principal, thread.id, [created])
        left = await outbox(store, thread)
        assert left is not None
        assert left.facts[1:] == [later]
        await store.mark_published(principal, thread.id, [updated, later])
        assert await outbox(store, thread) is None


async def test_a_run_adds_nothing_to_the_outbox(open_store: OpenStore) -> None:
    async with open_store(lease=NOW) as store:
        principal = new_principal()
        thread = await started_thread(store, principal)
        await store.claim(principal, *turn(thread.id), worker=WORKER)
        assert await outbox(store, thread) is None


async def test_a_deletion_is_in_the_outbox_though_the_thread_is_gone(open_store: OpenStore) -> None:
    async with open_store(lease=NOW) as store:
        principal = new_principal()
        thread = await started_thread(store, principal)
        await note(store, principal, thread)
        await store.delete(principal, thread.id)
        deleted = ThreadDeleted(thread.id)
        assert await outbox(store, thread) == Outbox(thread.id, principal.organization_id, [deleted])
        await store.mark_published(new_principal(), thread.id, [deleted])
        assert await outbox(store, thread) is not None, "another organization's mark counts for nothing"
        await store.mark_published(principal, thread.id, [deleted])
        assert await outbox(store, thread) is None


async def test_the_last_of_several_updates_replaces_the_others(open_store: OpenStore) -> None:
    async with open_store(lease=NOW) as store:
        principal = new_principal()
        thread = await started_thread(store, principal)
        first = ThreadUpdated(await store.update(principal, thread.id, title="one"))
        last = ThreadUpdated(await store.update(principal, thread.id, archived=True))
        assert fact_id(first) != fact_id(last)
        assert await outbox(store, thread) == Outbox(thread.id, principal.organization_id, [last])
        await store.mark_published(principal, thread.id, [first])
        assert await outbox(store, thread) is not None, "the later one is not published yet"
        await store.mark_published(principal, thread.id, [last])
        assert await outbox(store, thread) is None


async def test_the_process_that_stored_a_fact_has_a_quarter_of_a_lease_to_publish_it(open_store: OpenStore) -> None:
    async with open_store(lease=1.2) as store:
        principal = new_principal()
        thread = await started_thread(store, principal)
        created = await note(store, principal, thread)
        assert await outbox(store, thread) is None
        async with asyncio.timeout(10):
            while (found := await outbox(store, thread)) is None:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert found.facts == [created]
        assert await outbox(store, thread) is None, "another caller got it"


async def test_unpublished_facts_survive_a_restart(open_store: OpenStore) -> None:
    principal = new_principal()
    async with open_store(lease=NOW) as store:
        thread = await started_thread(store, principal)
        created = await note(store, principal, thread)
    async with open_store(lease=NOW) as store:
        found = await outbox(store, thread)
        assert found is not None
        assert found.facts == [created]


async def test_a_full_outbox_drops_the_oldest_facts_and_is_cut(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for backend in ("sqlite", "mongo"):
        monkeypatch.setattr(f"agent_chat.stores.{backend}.outbox.OUTBOX_FACTS", 4)
    async with open_store(lease=NOW) as store:
        principal = new_principal()
        thread = await started_thread(store, principal)
        notes = [await note(store, principal, thread, str(number)) for number in range(6)]
        found = await outbox(store, thread)
        assert found == Outbox(thread.id, principal.organization_id, list(notes[2:]), cut=True)
        await store.mark_published(principal, thread.id, found.facts)
        again = await note(store, principal, thread)
        assert await outbox(store, thread) == Outbox(thread.id, principal.organization_id, [again])


async def test_a_large_outbox_is_read_in_parts(open_store: OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    assert OUTBOX_FACTS_READ < OUTBOX_FACTS
    for backend in ("sqlite", "mongo"):
        monkeypatch.setattr(f"agent_chat.stores.{backend}.outbox.OUTBOX_FACTS_READ", 3)
        monkeypatch.setattr(f"agent_chat.stores.{backend}.outbox.OUTBOX_BYTES_READ", 6000)
    async with open_store(lease=NOW) as store:
        principal = new_principal()
        thread = await started_thread(store, principal)
        notes = [await note(store, principal, thread, content) for content in ("a", "b", "c", "d" * 4000, "e" * 4000)]
        parts = []
        while (found := await outbox(store, thread)) is not None:
            parts.append(found.facts)
            await store.mark_published(principal, thread.id, found.facts)
        assert parts == [notes[:3], notes[3:4], notes[4:]]


async def test_a_fact_that_cannot_be_decoded_does_not_block_the_others(
    open_store: OpenStore, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_store(lease=NOW) as store:
        principal = new_principal()
        damaged, sound = [await started_thread(store, principal) for _ in range(2)]
        message = replace(new_message(damaged.id, "damaged", "system"), metadata=msgspec.Raw(b"{"))
        await store.append_message(principal, message)
        behind = await note(store, principal, damaged)
        noted = await note(store, principal, sound)
        handed = {each.thread_id: each.facts for each in await store.take_outboxes()}
        assert (handed[damaged.id], handed[sound.id]) == ([behind], [noted])
        assert f"Fact {message.id} of thread {damaged.id} is not published" in caplog.text
        await store.mark_published(principal, damaged.id, [behind])
        assert await outbox(store, damaged) is None, "it is tried once"


async def test_the_outbox_of_a_named_thread_is_taken_however_long_it_has_waited(open_store: OpenStore) -> None:
    async with open_store(lease=20.0) as store:
        principal = new_principal()
        thread, other = [await started_thread(store, principal) for _ in range(2)]
        created = await note(store, principal, thread)
        await note(store, principal, other)
        assert await store.take_outboxes() == []
        for _ in range(2):
            assert await store.take_outboxes(thread.id) == [Outbox(thread.id, principal.organization_id, [created])]
        await store.mark_published(principal, thread.id, [created])
        assert await store.take_outboxes(thread.id) == []
