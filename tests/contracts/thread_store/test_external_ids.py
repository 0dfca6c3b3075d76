"""A client's own ids of threads: looked up or created, unique per user and agent, released by a deletion (I24)."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from agent_chat.stores.contracts import Store
from agent_chat.stores.errors import IdempotencyMismatch
from agent_chat.stores.models import Principal, Thread
from tests.contracts.thread_store.calls import read_page
from tests.support.backends import OpenStore
from tests.support.samples import AWKWARD, exactly, finished_run, idempotent, new_principal, new_thread

CHAT = "chat-1"


def named_thread(principal: Principal, external_id: str = CHAT, agent_id: str = "agent") -> Thread:
    return new_thread(principal, agent_id).with_external_id(external_id)


async def test_a_thread_with_an_external_id_shows_it_beside_the_metadata_that_was_sent(
    store: Store, principal: Principal
) -> None:
    thread = new_thread(principal, metadata=AWKWARD).with_external_id("чат/1 🗝")
    created = await store.create(principal, thread)
    assert created.thread.metadata == {**AWKWARD, "thread": {"external_id": "чат/1 🗝"}}
    assert exactly(created.thread) == exactly(thread)
    assert exactly(await store.get(principal, thread.id)) == exactly(thread)
    [listed] = (await read_page(store, principal)).threads
    assert exactly(listed) == exactly(thread)
    renamed = await store.update(principal, thread.id, title="x")
    assert renamed.external_id == "чат/1 🗝"
    assert exactly(renamed.client_metadata()) == exactly(AWKWARD)


async def test_metadata_that_a_client_once_sent_under_the_servers_key_is_returned_unchanged(
    store: Store, principal: Principal
) -> None:
    """Earlier versions accepted the key from clients."""
    for metadata in ({"thread": "mine"}, {"thread": {"a": 1}}, {"thread": None}):
        thread = new_thread(principal, metadata=metadata)
        await store.create(principal, thread)
        assert (await store.get(principal, thread.id)).metadata == metadata
        assert thread.external_id is None


async def test_creating_again_finds_the_thread(store: Store, principal: Principal) -> None:
    """I24."""
    first = await store.create(principal, named_thread(principal))
    await finished_run(store, principal, first.thread.id)
    again = await store.create(principal, replace(named_thread(principal), title="ignored"))
    assert (first.found, first.replayed, again.found, again.replayed) == (False, False, True, False)
    assert again.thread.id == first.thread.id
    assert again.thread.title == ""
    assert (await store.find_thread(principal, "agent", CHAT)) == again.thread
    assert len((await read_page(store, principal)).threads) == 1


async def test_an_external_id_belongs_to_organization_user_and_agent(store: Store, principal: Principal) -> None:
    """I24."""
    colleague, stranger = new_principal(principal.organization_id), new_principal()
    results = [
        await store.create(principal, named_thread(principal)),
        await store.create(principal, named_thread(principal, agent_id="another agent")),
        await store.create(principal, named_thread(principal, "chat-2")),
        await store.create(principal, named_thread(principal, CHAT.upper())),
        await store.create(colleague, named_thread(colleague)),
        await store.create(stranger, named_thread(stranger)),
    ]
    assert not any(created.found for created in results)
    assert len({created.thread.id for created in results}) == len(results)
    for who, agent_id, created in (
        (principal, "agent", results[0]),
        (principal, "another agent", results[1]),
        (colleague, "agent", results[4]),
        (stranger, "agent", results[5]),
    ):
        assert await store.find_thread(who, agent_id, CHAT) == created.thread
    assert await store.find_thread(colleague, "another agent", CHAT) is None
    assert await store.find_thread(principal, "agent", "chat-3") is None


async def test_concurrent_creates_with_one_external_id_make_one_thread(
    open_store: OpenStore, principal: Principal
) -> None:
    """I24. Two processes with ten calls each, some with a key of their own."""
    async with open_store() as store, open_store(peer=True) as peer:
        results = await asyncio.gather(
            *[
                each.create(principal, named_thread(principal), idempotent(f"{n}") if n % 3 == 0 else None)
                for n in range(10)
                for each in (store, peer)
            ]
        )
        assert len({created.thread.id for created in results}) == 1
        assert sum(not created.found and not created.replayed for created in results) == 1
        assert len((await read_page(store, principal)).threads) == 1


async def test_concurrent_creates_and_deletions_never_leave_two_threads(store: Store, principal: Principal) -> None:
    """I24."""

    async def create_and_delete() -> None:
        for _ in range(5):
            created = await store.create(principal, named_thread(principal))
            assert created.thread.external_id == CHAT
            if not created.found:
                assert await store.delete(principal, created.thread.id) is None

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(create_and_delete())
    assert (await store.create(principal, named_thread(principal))).found is False
    assert len((await read_page(store, principal)).threads) == 1


async def test_a_deleted_thread_releases_its_external_id(store: Store, principal: Principal) -> None:
    """I24."""
    first = await store.create(principal, named_thread(principal), idempotent())
    await store.delete(principal, first.thread.id)
    assert await store.find_thread(principal, "agent", CHAT) is None
    anew = await store.create(principal, named_thread(principal), idempotent(fingerprint="another"))
    assert (anew.found, anew.replayed) == (False, False)
    assert anew.thread.id != first.thread.id


async def test_an_archived_thread_keeps_its_external_id(store: Store, principal: Principal) -> None:
    first = await store.create(principal, named_thread(principal))
    await store.update(principal, first.thread.id, archived=True)
    again = await store.create(principal, named_thread(principal))
    assert (again.found, again.thread.id, again.thread.archived) == (True, first.thread.id, True)


async def test_the_key_of_the_creating_call_counts_before_the_external_id(store: Store, principal: Principal) -> None:
    first = await store.create(principal, named_thread(principal), idempotent())
    again = await store.create(principal, named_thread(principal), idempotent())
    assert (again.thread.id, again.replayed, again.found) == (first.thread.id, True, False)
    with pytest.raises(IdempotencyMismatch):
        await store.create(principal, named_thread(principal), idempotent(fingerprint="another"))
    found = await store.create(principal, named_thread(principal), idempotent("new key"))
    assert (found.thread.id, found.replayed, found.found) == (first.thread.id, False, True)
    created = await store.create(principal, new_thread(principal), idempotent("new key", "another"))
    assert (created.found, created.replayed) == (False, False)


async def test_a_list_can_be_restricted_to_an_external_id(store: Store, principal: Principal) -> None:
    colleague = new_principal(principal.organization_id)
    mine = (await store.create(principal, named_thread(principal))).thread
    theirs = (await store.create(colleague, named_thread(colleague))).thread
    await store.create(principal, named_thread(principal, "chat-2"))
    await store.create(principal, named_thread(principal, agent_id="another agent"))
    await store.create(principal, new_thread(principal))
    await store.update(principal, theirs.id, archived=True)

    async def listed(external_id: str, archived: bool | None = None) -> set[str]:
        page = await read_page(store, principal, external_id=external_id, archived=archived)
        assert page.more is False
        return {thread.id for thread in page.threads}

    assert await listed(CHAT) == {mine.id, theirs.id}
    assert await listed(CHAT, archived=False) == {mine.id}
    assert await listed(CHAT, archived=True) == {theirs.id}
    assert await listed("unknown") == set()


async def test_an_external_id_survives_a_restart(open_store: OpenStore, principal: Principal) -> None:
    async with open_store() as store:
        first = await store.create(principal, named_thread(principal))
    async with open_store() as store:
        again = await store.create(principal, named_thread(principal))
        assert (again.found, again.thread) == (True, first.thread)
