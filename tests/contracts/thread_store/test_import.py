"""Importing whole threads, and reading all threads of an organization for an export."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
from msgspec.structs import replace

from agent_chat.stores.contracts import Store
from agent_chat.stores.errors import ThreadNotFound
from agent_chat.stores.models import Message, Principal, Thread, new_id, timestamp, utcnow
from tests.contracts.thread_store.calls import read_page
from tests.support.backends import OpenStore
from tests.support.samples import (
    AWKWARD,
    awkward_call,
    completed,
    exactly,
    finished_run,
    ids,
    new_file,
    new_message,
    new_principal,
    new_thread,
    started_run,
    turn,
)

EARLIER = utcnow() - timedelta(days=400)


def make_messages(thread_id: str, count: int) -> list[Message]:
    """Messages of every shape, long ago, a second apart."""
    messages: list[Message] = []
    while len(messages) < count:
        at = EARLIER + timedelta(seconds=len(messages))
        question, answer = turn(thread_id, f"Question {len(messages)} 🌞\0", at)
        file = new_file(thread_id).attachment
        answer = replace(
            completed(answer), tool_calls=[awkward_call()], created_at=timestamp(at + timedelta(seconds=1))
        )
        messages += [replace(question, attachments=[file], metadata=AWKWARD), answer]
    return messages[:count]


def an_old_thread(principal: Principal, external_id: str | None = None) -> Thread:
    old = timestamp(EARLIER)
    thread = replace(
        new_thread(principal, metadata=AWKWARD), title="Été $x", created_at=old, updated_at=old, archived=True
    )
    return thread if external_id is None else thread.with_external_id(external_id)


async def read_all(store: Store, principal: Principal, thread_id: str) -> list[Message]:
    messages: list[Message] = []
    while page := (
        await store.list_messages(principal, thread_id, before=messages[0].id if messages else None, limit=70)
    ).messages:
        messages = [*page, *messages]
    return messages


@pytest.mark.parametrize("count", [0, 1, 100, 101, 333])
async def test_a_thread_is_imported_as_it_is(store: Store, principal: Principal, count: int) -> None:
    thread = an_old_thread(principal, "order 66")
    messages = make_messages(thread.id, count)
    assert await store.import_thread(principal, thread, iter(messages)) is True
    stored = await store.get(principal, thread.id, message_limit=50)
    assert exactly(replace(stored, messages=[])) == exactly(thread)
    assert exactly(stored.messages) == exactly(messages[-50:])
    assert exactly(await read_all(store, principal, thread.id)) == exactly(messages)
    for message in messages[::50]:
        assert exactly(await store.get_message(principal, thread.id, message.id)) == exactly(message)
    assert await store.find_thread(principal, thread.agent_id, "order 66") == thread
    assert await store.take_outboxes(thread.id) == []


async def test_an_imported_thread_continues_like_any_other(store: Store, principal: Principal) -> None:
    thread = an_old_thread(principal)
    messages = make_messages(thread.id, 160)
    assert await store.import_thread(principal, thread, messages)
    await store.update(principal, thread.id, archived=False)
    answer = await finished_run(store, principal, thread.id)
    early = new_message(thread.id, "Too early", "system", EARLIER)
    appended = (await store.append_message(principal, early)).message
    assert appended.created_at > answer.created_at
    stored = await read_all(store, principal, thread.id)
    assert ids(stored[:160]) == ids(messages)
    assert ids(stored[161:]) == [answer.id, early.id]
    await store.delete(principal, thread.id)
    with pytest.raises(ThreadNotFound):
        await store.get_message(principal, thread.id, messages[0].id)


async def test_large_messages_are_imported(store: Store, principal: Principal) -> None:
    thread = an_old_thread(principal)
    sizes = [6 * 2**20, 10, 7 * 2**20, 7 * 2**20, 5 * 2**20, 10]
    texts = [str(index) * size for index, size in enumerate(sizes)]
    messages = [
        new_message(thread.id, text, "assistant", EARLIER + timedelta(seconds=index))
        for index, text in enumerate(texts)
    ]
    assert await store.import_thread(principal, thread, iter(messages))
    for message in messages:
        assert await store.get_message(principal, thread.id, message.id) == message
    await store.update(principal, thread.id, archived=False)
    await store.append_message(principal, new_message(thread.id))


async def test_an_id_that_is_taken_imports_nothing(store: Store, principal: Principal) -> None:
    thread = an_old_thread(principal)
    messages = make_messages(thread.id, 3)
    assert await store.import_thread(principal, thread, messages)
    other = new_principal()
    theirs = replace(an_old_thread(other), id=thread.id)
    assert await store.import_thread(principal, thread, make_messages(thread.id, 5)) is False
    assert await store.import_thread(other, theirs, make_messages(thread.id, 200)) is False
    assert exactly(await read_all(store, principal, thread.id)) == exactly(messages)
    with pytest.raises(ThreadNotFound):
        await store.get(other, thread.id)
    assert await store.stored_bytes(other.organization_id) == 0


async def test_an_external_id_that_is_taken_imports_nothing(store: Store, principal: Principal) -> None:
    first = an_old_thread(principal, "a")
    assert await store.import_thread(principal, first, [])
    second = an_old_thread(principal, "a")
    assert await store.import_thread(principal, second, make_messages(second.id, 200)) is False
    with pytest.raises(ThreadNotFound):
        await store.get(principal, second.id)
    colleague = new_principal(principal.organization_id)
    assert await store.import_thread(colleague, replace(second, user_id=colleague.user_id), []) is True


@pytest.mark.parametrize("count", [10, 250])
async def test_an_import_that_fails_leaves_nothing_and_can_be_repeated(
    store: Store, principal: Principal, count: int
) -> None:
    thread = an_old_thread(principal)
    messages = make_messages(thread.id, count)

    def failing() -> Iterator[Message]:
        yield from make_messages(thread.id, count - 1)
        raise RuntimeError("the file cannot be read")

    with pytest.raises(RuntimeError):
        await store.import_thread(principal, thread, failing())
    with pytest.raises(ThreadNotFound):
        await store.get(principal, thread.id)
    assert await store.import_thread(principal, thread, messages)
    assert exactly(await read_all(store, principal, thread.id)) == exactly(messages)


async def test_a_deleted_thread_is_not_imported_while_its_deletion_is_under_way(
    store: Store, principal: Principal
) -> None:
    thread = an_old_thread(principal)
    assert await store.import_thread(principal, thread, [])
    await store.delete(principal, thread.id)
    assert await store.import_thread(principal, thread, []) is False
    with pytest.raises(ThreadNotFound):
        await store.get(principal, thread.id)


async def test_the_bytes_of_an_imported_thread_count(store: Store) -> None:
    principal = new_principal((await store.create_organization("Acme")).id)
    await store.reserve_bytes(principal.organization_id, 1, 1, 2**30)
    thread = an_old_thread(principal)
    assert await store.import_thread(principal, thread, make_messages(thread.id, 300))
    counted = await store.stored_bytes(principal.organization_id)
    await store.correct_bytes()
    measured = await store.stored_bytes(principal.organization_id)
    assert measured == pytest.approx(counted, rel=0.01)
    await store.delete(principal, thread.id)
    assert await store.stored_bytes(principal.organization_id) < measured / 20


async def test_all_threads_of_an_organization_are_scanned_once_in_order(store: Store) -> None:
    principal, stranger = new_principal(), new_principal()
    colleague = new_principal(principal.organization_id)
    made: list[Thread] = []
    for index in range(25):
        owner = (principal, colleague, stranger)[index % 3]
        thread = new_thread(owner, f"agent-{index % 2}", metadata={"n": index})
        made.append((await store.create(owner, thread)).thread)
    await started_run(store, principal, made[0].id)
    made[0] = replace(await store.get(principal, made[0].id), messages=[])

    async def scan(user_id: str | None = None, agent_id: str | None = None) -> list[Thread]:
        found: list[Thread] = []
        while page := await store.scan_threads(
            Principal(principal.organization_id, ""),
            user_id=user_id,
            agent_id=agent_id,
            after=found[-1].id if found else None,
            limit=4,
        ):
            assert len(page) <= 4
            found += page
        return found

    ours = sorted((each for each in made if each.organization_id != stranger.organization_id), key=lambda each: each.id)
    assert await scan() == ours
    assert await scan(user_id=colleague.user_id) == [each for each in ours if each.user_id == colleague.user_id]
    assert await scan(agent_id="agent-1") == [each for each in ours if each.agent_id == "agent-1"]
    assert await scan(user_id=stranger.user_id) == await scan(agent_id=new_id()) == []


async def test_imported_threads_are_there_after_a_restart(open_store: OpenStore, principal: Principal) -> None:
    thread = an_old_thread(principal)
    messages = make_messages(thread.id, 120)
    async with open_store() as store:
        assert await store.import_thread(principal, thread, messages)
    async with open_store() as store:
        assert exactly(await read_all(store, principal, thread.id)) == exactly(messages)


async def test_imported_threads_are_listed_by_their_latest_messages(store: Store, principal: Principal) -> None:
    quiet, active = an_old_thread(principal), an_old_thread(principal)
    between = replace(an_old_thread(principal), created_at=timestamp(EARLIER + timedelta(seconds=60)))
    await store.import_thread(principal, active, make_messages(active.id, 200))
    await store.import_thread(principal, between, [])
    await store.import_thread(principal, quiet, make_messages(quiet.id, 2))
    page = await read_page(store, principal)
    assert [thread.id for thread in page.threads] == [active.id, between.id, quiet.id]
