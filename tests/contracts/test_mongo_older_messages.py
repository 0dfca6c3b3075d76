"""MongoDB: threads that outgrow their document lose and double nothing, and reading the latest costs the same."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import bson
import pytest

from agent_chat.stores.errors import MessageNotFound, StoreUnavailable, ThreadNotFound
from agent_chat.stores.models import Message, Principal, new_id
from agent_chat.stores.mongo import threads as mongo_threads
from agent_chat.stores.mongo.documents import DOCUMENT_BYTES, EmbeddingLimits
from agent_chat.stores.mongo.native import Document
from agent_chat.stores.mongo.store import MongoStore
from tests.support.mongo_commands import (
    Commands,
    Read,
    every_message,
    loaded,
    noise,
    note,
    opened,
    stored,
    whole,
)
from tests.support.samples import (
    WORKER,
    completed,
    failed,
    finished_run,
    idempotent,
    ids,
    new_message,
    new_principal,
    started_run,
    started_thread,
    turn,
)

SMALL = EmbeddingLimits(messages=4, slack=2, bytes=4 * 2**20)
"""With these, the seventh message makes the oldest ones move."""


@pytest.fixture
def principal() -> Principal:
    return new_principal()


# large threads


class Cost(NamedTuple):
    commands: list[str]
    documents: int
    bytes: int


async def latest(store: MongoStore, principal: Principal, thread_id: str) -> None:
    """Read a thread's latest messages by every method that returns them."""
    messages = (await store.get(principal, thread_id)).messages
    assert len(messages) == 50
    assert (await store.list_messages(principal, thread_id, before=None, limit=50)).messages == messages
    page = await store.list_threads(
        principal, "agent", limit=9, offset=0, archived=None, message_limit=50, max_bytes=8 * 2**20
    )
    assert [thread.messages for thread in page.threads] == [messages]
    assert page.cut is False


async def use_every_operation(store: MongoStore, principal: Principal, thread_id: str) -> None:
    """Read the latest messages, and write by every method that writes to a thread."""
    await latest(store, principal, thread_id)
    await store.append_message(principal, new_message(thread_id, role="system"))
    question, answer = turn(thread_id)
    await store.claim(principal, question, answer, worker=WORKER)
    await store.finish(principal, completed(answer))
    assert (await store.update(principal, thread_id, title="x")).title == "x"


async def cost(read: Read, doing: Awaitable[None]) -> Cost:
    read.clear()
    await doing
    return Cost(read.commands, read.documents, read.bytes)


def costs_the_same(large: Cost, small: Cost) -> None:
    assert (large.commands, large.documents) == (small.commands, small.documents)
    assert large.bytes < small.bytes * 1.02


@pytest.mark.timeout(180)
async def test_the_latest_of_100_000_messages_cost_as_much_as_those_of_a_small_thread(
    mongo_url: str, principal: Principal
) -> None:
    """The messages are written by `loaded`, since 100,000 appends would take too long."""
    read, other = Read(), new_principal()
    async with opened(mongo_url, read=read) as store:
        small, _ = await loaded(store, other, [f"message {n:06}" for n in range(142)])
        large, appended = await loaded(store, principal, [f"message {n:06}" for n in range(100_000)])
        document = await store.db.threads.find_one({"_id": large.id}) or {}
        assert len(document["messages"]) == 142
        assert await store.db.older_messages.sum_up({"thread_id": large.id}, {"$literal": 1}) == 99_858
        of_small = await cost(read, use_every_operation(store, other, small.id))
        costs_the_same(await cost(read, use_every_operation(store, principal, large.id)), of_small)
        for n in (0, 1, 50, 51, 777, 50_000, 99_857, 99_858, 99_999):
            read.clear()
            assert (await store.get_message(principal, large.id, appended[n].id)).content == appended[n].content
            older = (await store.list_messages(principal, large.id, before=appended[n].id, limit=50)).messages
            assert ids(older) == ids(appended[max(0, n - 50) : n])
            assert len(read.commands) <= 6
            assert read.documents <= 2 * 50 + 5  # of each older message its size, and itself
        with pytest.raises(MessageNotFound):
            await store.get_message(principal, large.id, new_id())


async def test_appending_messages_writes_the_same_documents_as_loading_them(
    mongo_url: str, principal: Principal
) -> None:
    contents = [f"message {n:03}" for n in range(160)]
    async with opened(mongo_url) as store:
        thread, _ = await loaded(store, principal, contents)
        appended = await started_thread(store, principal)
        for content in contents:
            await note(store, principal, appended.id, content)
        document, moved = await stored(store, appended.id)
        assert (len(document["messages"]), len(moved)) == (109, 51)
        left = [anonymous(each) for each in (document, *moved)]
        document, moved = await stored(store, thread.id)
        assert left == [anonymous(each) for each in (document, *moved)]


def anonymous(document: Document) -> Document:
    """A document without ids, times and outbox; `bytes` reveals types that differ."""
    outbox: Document = {name: document[name] for name in ("outbox", "outbox_at") if name in document}
    if "bytes" in document:
        document = {**document, "bytes": document["bytes"] - len(bson.encode(outbox)) + len(bson.encode({}))}
    unlike = (
        "_id",
        "id",
        "created_at",
        "updated_at",
        "last_activity_at",
        "pushed",
        "thread_id",
        *outbox,
        "moved_bytes",
    )
    messages = {"messages": [anonymous(each) for each in document["messages"]]} if "messages" in document else {}
    return {name: value for name, value in document.items() if name not in unlike} | messages


@pytest.mark.timeout(120)
async def test_a_thread_of_40_mb_is_written_read_and_deleted(mongo_url: str, principal: Principal) -> None:
    read, other = Read(), new_principal()
    async with opened(mongo_url, read=read) as store:
        thread = await started_thread(store, principal)
        for n in range(20):
            await note(store, principal, thread.id, f"{n} {noise(2 * 2**20)}")
        document, moved = await stored(store, thread.id)
        assert document["bytes"] <= 4 * 2**20
        assert len(moved) > 16
        answer = await finished_run(store, principal, thread.id)
        assert (await store.update(principal, thread.id, title="x")).title == "x"
        messages = await every_message(store, principal, thread.id, 7)
        assert [message.content.split()[0] for message in messages[:20]] == [str(n) for n in range(20)]
        assert messages[-1] == answer
        read.clear()
        part = await store.read(principal, thread.id, message_limit=50)
        assert (ids(part.thread.messages), part.cut) == (ids(messages)[-5:], True)
        assert read.bytes < 14 * 2**20  # of 40 MB: the thread's document, and the messages that fit
        page = await store.list_threads(
            principal, "agent", limit=9, offset=0, archived=None, message_limit=50, max_bytes=2**23
        )
        assert page.cut is True
        assert ids(page.threads[0].messages)[-1] == answer.id
        await loaded(store, principal, ["small"] * 50, onto=thread)
        small, _ = await loaded(store, other, ["small"] * (50 + len(document["messages"]) + 2))
        assert (await store.update(other, small.id, title="x")).title == "x"
        of_small = await cost(read, latest(store, other, small.id))
        costs_the_same(await cost(read, latest(store, principal, thread.id)), of_small)
        await store.delete(principal, thread.id)
        assert await store.db.older_messages.find({"thread_id": thread.id}, {"_id": 1}) == []


async def test_the_largest_answer_is_stored_in_a_document_that_is_nearly_full(
    mongo_url: str, principal: Principal
) -> None:
    """Nothing was moved for long (here: by other limits): the write that needs the room moves messages first."""
    async with (
        opened(mongo_url, limits=EmbeddingLimits(messages=1000, bytes=2**30)) as hoarding,
        opened(mongo_url) as store,
    ):
        thread, _ = await loaded(hoarding, principal, [noise(3 * 2**20) for _ in range(4)])
        running = await started_run(hoarding, principal, thread.id)
        await note(hoarding, principal, thread.id, noise(2**21))
        document, _ = await stored(store, thread.id)
        assert DOCUMENT_BYTES - document["bytes"] < 8 * 2**20
        content = noise(8 * 2**20)
        await store.checkpoint(principal, running.id, worker=WORKER, partial=completed(running, content))
        assert (await hoarding.finish(principal, completed(running, content))).won is True
        assert (await store.get_message(principal, thread.id, running.id)).content == content
        await note(store, principal, thread.id)
        assert len(await whole(store, principal, thread.id)) == 8
        document, _ = await stored(store, thread.id)
        assert document["bytes"] < 4 * 2**20


async def test_a_message_that_compresses_may_be_larger_than_a_document(mongo_url: str, principal: Principal) -> None:
    async with opened(mongo_url) as store:
        running = await started_run(store, principal, (await started_thread(store, principal)).id)
        final = completed(running, "\x00" * 8 * 2**20)
        assert (await store.finish(principal, final)).message.content == final.content
        assert (await store.get_message(principal, running.thread_id, running.id)).content == final.content


# moving


async def test_the_newest_messages_stay_in_the_thread_and_the_others_move(mongo_url: str, principal: Principal) -> None:
    read = Read()
    async with opened(mongo_url, limits=SMALL, read=read) as store:
        thread = await started_thread(store, principal)
        appended = [await note(store, principal, thread.id, str(n)) for n in range(23)]
        assert await whole(store, principal, thread.id) == appended
        document, moved = await stored(store, thread.id)
        assert 4 <= len(document["messages"]) <= 6
        assert len(moved) == 18
        read.clear()
        assert (await store.get(principal, thread.id, message_limit=4)).messages == appended[-4:]
        assert (read.commands, read.documents) == (["find"], 1)
        assert (await store.get(principal, thread.id)).messages == appended
        page = await store.list_threads(
            principal, "agent", limit=1, offset=0, archived=None, message_limit=50, max_bytes=10**6
        )
        assert (page.cut, page.threads[0].messages) == (True, appended[-len(document["messages"]) :])


async def test_a_deletion_deletes_moved_messages_step_by_step(
    mongo_url: str, principal: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mongo_threads, "_CLEARED_AT_ONCE", 20)
    read = Read()
    async with opened(mongo_url, limits=SMALL, read=read) as store:
        thread, other = [(await loaded(store, principal, ["content"] * 70))[0] for _ in range(2)]
        read.clear()
        await store.delete(principal, thread.id)
        assert read.commands.count("delete") == 2 + 4
        with pytest.raises(ThreadNotFound):
            await store.get(principal, thread.id)
        assert await store.db.older_messages.find({"thread_id": thread.id}, {"_id": 1}) == []
        assert len(await whole(store, principal, other.id)) == 70


async def test_the_message_of_a_run_in_progress_stays_while_later_messages_move(
    mongo_url: str, principal: Principal
) -> None:
    async with opened(mongo_url, limits=SMALL) as store:
        thread = await started_thread(store, principal)
        appended = [await note(store, principal, thread.id) for _ in range(3)]
        question, answer = turn(thread.id)
        posted = await store.claim(principal, question, answer, worker=WORKER, idempotency=idempotent())
        running = posted.answer or answer
        appended += [posted.message, running]
        appended += [await note(store, principal, thread.id) for _ in range(20)]
        document, _ = await stored(store, thread.id)
        assert [entry["id"] for entry in document["messages"][:2]] == [question.id, answer.id]
        assert document["messages"][2]["n"] > 15
        assert await store.checkpoint(principal, answer.id, worker=WORKER, partial=running) == "held"
        assert await whole(store, principal, thread.id) == appended
        page = await store.list_threads(
            principal, "agent", limit=1, offset=0, archived=None, message_limit=50, max_bytes=10**6
        )
        assert page.threads[0].messages == appended[-len(page.threads[0].messages) :]
        appended[4] = (await store.finish(principal, failed(running, retryable=True))).message
        assert await whole(store, principal, thread.id) == appended
        again = await store.claim(principal, *turn(thread.id), worker=WORKER, idempotency=idempotent())
        assert (again.again, again.message) == (True, posted.message)
        assert len(await whole(store, principal, thread.id)) == 26


async def test_keys_still_count_after_their_messages_were_moved(mongo_url: str, principal: Principal) -> None:
    async with opened(mongo_url, limits=SMALL) as store:
        thread = await started_thread(store, principal)
        question, answer = turn(thread.id)
        await store.claim(principal, question, answer, worker=WORKER, idempotency=idempotent("run"))
        await store.finish(principal, failed(answer, retryable=True))
        appended = [
            (await store.append_message(principal, new_message(thread.id, role="system"), idempotent(f"{n}"))).message
            for n in range(30)
        ]
        document, moved = await stored(store, thread.id)
        assert len(document["keys"]) <= 6
        assert sum("key" in each for each in moved) + len(document["keys"]) == 31
        for n in (0, 13, 29):
            for posted in (
                await store.replay(principal, thread.id, idempotent(f"{n}")),
                await store.append_message(principal, new_message(thread.id), idempotent(f"{n}")),
            ):
                assert posted is not None
                assert (posted.message, posted.replayed) == (appended[n], True)
        turns = [turn(thread.id) for _ in range(5)]
        posts = await asyncio.gather(
            *[store.claim(principal, *each, worker=WORKER, idempotency=idempotent("run")) for each in turns]
        )
        assert sorted(posted.again for posted in posts) == [False] * 4 + [True]
        assert {posted.message_id for posted in posts} == {question.id}
        await store.finish(principal, completed(posts[0].answer or answer))
        for n in range(30):
            await store.append_message(principal, new_message(thread.id, role="system"), idempotent(f"later {n}"))
        replayed = await store.replay(principal, thread.id, idempotent("run"))
        assert replayed is not None
        assert replayed.run_id == posts[0].run_id
        assert len(await whole(store, principal, thread.id)) == 63


async def test_two_processes_that_move_the_same_messages_lose_none(mongo_url: str, principal: Principal) -> None:
    async with opened(mongo_url, limits=SMALL) as one, opened(mongo_url, limits=SMALL) as two:
        thread = await started_thread(one, principal)
        appended = await asyncio.gather(*[note(store, principal, thread.id) for _ in range(30) for store in (one, two)])
        for store in (one, two):
            appended.append(await note(store, principal, thread.id))
        messages = await every_message(one, principal, thread.id)
        assert len(messages) == len({message.id for message in messages}) == len(appended) == 62
        document, _ = await stored(one, thread.id)
        assert len(document["messages"]) <= 6


# dying while moving

Operation = Callable[[MongoStore, Principal, Message], Awaitable[object]]


async def append(store: MongoStore, principal: Principal, running: Message) -> object:
    return await store.append_message(principal, new_message(running.thread_id, role="system"), idempotent("the verb"))


async def claim(store: MongoStore, principal: Principal, running: Message) -> object:
    await store.finish(principal, completed(running))
    return await store.claim(principal, *turn(running.thread_id), worker=WORKER, idempotency=idempotent("the verb"))


async def finish(store: MongoStore, principal: Principal, running: Message) -> object:
    return await store.finish(principal, completed(running))


@pytest.mark.parametrize("response_lost", [False, True], ids=["before it is done", "after it is done"])
@pytest.mark.parametrize("operation", [append, claim, finish])
async def test_a_process_that_dies_at_any_command_loses_and_doubles_nothing(
    mongo_url: str, principal: Principal, operation: Operation, response_lost: bool
) -> None:
    """It dies at each command in turn, also while it moves messages; the next write of another process continues."""
    commands = Commands()
    async with (
        opened(mongo_url, limits=SMALL) as other,
        opened(mongo_url) as hoarding,
        opened(mongo_url, limits=SMALL, commands=commands) as dying,
    ):
        died_at: list[str] = []
        while True:
            thread, _ = await loaded(other, principal, ["content"] * 5)
            running = await started_run(hoarding, principal, thread.id)
            before = (await other.get(principal, thread.id)).messages
            commands.names, commands.dies_at, commands.response_lost = [], len(died_at), response_lost
            acknowledged = True
            try:
                await operation(dying, principal, running)
            except StoreUnavailable:
                acknowledged = False
            seen = await every_message(other, principal, thread.id)
            assert ids(seen)[: len(before)] == ids(before)
            if acknowledged and operation is not finish:
                assert len(seen) > len(before)
            later = await note(other, principal, thread.id, "later")
            after = await whole(other, principal, thread.id)
            assert ids(after) == [*ids(seen), later.id]
            document, _ = await stored(other, thread.id)
            assert len(document["messages"]) <= SMALL.messages + SMALL.slack + 1
            if len(commands.names) <= len(died_at):
                break
            died_at.append(commands.names[-1] if acknowledged else commands.names[len(died_at)])
    assert {"threads.update_one", "older_messages.insert_missing", "threads.find_one"} <= set(died_at)


async def test_messages_that_were_stored_twice_by_a_process_that_died_are_moved_later(
    mongo_url: str, principal: Principal
) -> None:
    """They were moved while a run was in progress, whose message stayed. After that run, it moves with them."""
    commands = Commands()
    async with opened(mongo_url, limits=SMALL, commands=commands) as dying, opened(mongo_url) as hoarding:
        thread = await started_thread(hoarding, principal)
        question, answer = turn(thread.id)
        await hoarding.claim(principal, question, answer, worker=WORKER)
        for _ in range(9):
            await note(hoarding, principal, thread.id)
        commands.dies_at = 2
        with pytest.raises(StoreUnavailable):
            await dying._move(principal, thread.id)
        assert commands.names == ["threads.find_one", "older_messages.insert_missing", "threads.update_one"]
        document, moved = await stored(hoarding, thread.id)
        assert (len(document["messages"]), [each["n"] for each in moved]) == (11, [0, 2, 3, 4, 5, 6])
        assert ids(await every_message(hoarding, principal, thread.id)) == [each["id"] for each in document["messages"]]
        final = (await hoarding.finish(principal, completed(answer))).message
        async with opened(mongo_url, limits=SMALL) as other:
            await note(other, principal, thread.id)
            messages = await whole(other, principal, thread.id)
            assert (len(messages), messages[1]) == (12, final)
