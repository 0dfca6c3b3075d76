"""What only MongoDB has: slow claims, lost responses, interrupted deletions, servers that stop, indexes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable

import pytest
from pymongo import MongoClient

from agent_chat.stores.contracts import Finished
from agent_chat.stores.errors import StoreUnavailable, ThreadNotFound
from agent_chat.stores.events import ThreadDeleted
from agent_chat.stores.models import Principal
from agent_chat.stores.mongo import threads as mongo_threads
from agent_chat.stores.mongo.documents import EmbeddingLimits
from agent_chat.stores.mongo.native import Document
from agent_chat.stores.mongo.store import open_mongo
from tests.contracts.thread_store.calls import read_page
from tests.support.mongo_commands import Commands, Read, loaded, opened
from tests.support.mongo_server import mongo_process
from tests.support.samples import (
    WORKER,
    cancelled,
    completed,
    failed,
    finished_run,
    idempotent,
    new_agent,
    new_file,
    new_message,
    new_principal,
    new_thread,
    started_run,
    started_thread,
    turn,
)

HASTY = "timeoutMS=1000"
EMPTIED = {
    "_id",
    "organization_id",
    "owner",
    "running",
    "total",
    "stored",
    "cleared",
    "sweep_at",
    "outbox",
    "outbox_at",
}


@pytest.fixture
def principal() -> Principal:
    return new_principal()


# claims


async def test_a_slow_claim_fails_after_a_sweeper_has_taken_over_its_record(
    mongo_url: str, principal: Principal
) -> None:
    """I3: otherwise the thread would stay busy without a record to repair it by."""
    commands = Commands()
    async with opened(mongo_url, lease=0.0, commands=commands) as slow, opened(mongo_url) as sweeper:
        thread = await started_thread(sweeper, principal)
        question, answer = turn(thread.id)

        async def sweep() -> None:
            [record] = await sweeper.take_orphans("sweeper")
            assert (record.id, record.partial) == (answer.id, answer)

        commands.meanwhile = ("threads.update_one", sweep)
        with pytest.raises(StoreUnavailable):
            await slow.claim(principal, question, answer, worker=WORKER)
        assert (await sweeper.get(principal, thread.id)).messages == []
        await sweeper.delete_record(principal, answer.id)
        assert (await slow.claim(principal, question, answer, worker=WORKER)).run_id == answer.id


@pytest.mark.parametrize("response_lost", [False, True])
async def test_a_claim_without_a_response_is_repaired_by_a_sweeper(
    mongo_url: str, principal: Principal, response_lost: bool
) -> None:
    """I3: whether the claim was done or not, its record exists."""
    commands = Commands()
    async with opened(mongo_url, lease=0.0, commands=commands) as store, opened(mongo_url) as sweeper:
        thread = await started_thread(sweeper, principal)
        question, answer = turn(thread.id)
        commands.dies_at, commands.response_lost = 2, response_lost
        with pytest.raises(StoreUnavailable):
            await store.claim(principal, question, answer, worker=WORKER)
        assert commands.names[:3] == ["threads.find_one", "runs.update_one", "threads.update_one"]
        [record] = await sweeper.take_orphans("sweeper")
        if response_lost:
            assert (await sweeper.finish(principal, failed(record.partial, retryable=True))).won is True
        await sweeper.delete_record(principal, record.id)
        assert len((await sweeper.get(principal, thread.id)).messages) == (2 if response_lost else 0)
        assert (await sweeper.claim(principal, *turn(thread.id), worker=WORKER)).replayed is False


# finish


async def test_a_finish_whose_response_was_lost_wins_once_when_it_is_repeated(
    mongo_url: str, principal: Principal
) -> None:
    """I4."""
    commands = Commands()
    async with opened(mongo_url, commands=commands) as store, opened(mongo_url) as other:
        answer = await started_run(store, principal, (await started_thread(store, principal)).id)
        commands.dies_at, commands.response_lost = len(commands.names), True
        with pytest.raises(StoreUnavailable):
            await store.finish(principal, completed(answer))
        commands.dies_at = None
        stored = await other.get_message(principal, answer.thread_id, answer.id)
        assert await other.finish(principal, cancelled(answer)) == Finished(stored, won=False)
        assert await store.finish(principal, completed(answer)) == Finished(stored, won=True)
        assert await store.finish(principal, completed(answer)) == Finished(stored, won=False)


async def test_another_finish_of_the_same_process_does_not_win_for_one_whose_response_was_lost(
    mongo_url: str, principal: Principal
) -> None:
    commands = Commands()
    async with opened(mongo_url, commands=commands) as store:
        answer = await started_run(store, principal, (await started_thread(store, principal)).id)
        commands.dies_at, commands.response_lost = len(commands.names), True
        with pytest.raises(StoreUnavailable):
            await store.finish(principal, completed(answer))
        commands.dies_at = None
        stored = await store.get_message(principal, answer.thread_id, answer.id)
        assert await store.finish(principal, cancelled(answer)) == Finished(stored, won=False)
        assert await store.finish(principal, completed(answer)) == Finished(stored, won=True)
        assert await store.finish(principal, completed(answer)) == Finished(stored, won=False)


async def test_a_finish_without_a_response_is_forgotten_when_its_thread_is_deleted(
    mongo_url: str, principal: Principal
) -> None:
    commands = Commands()
    async with opened(mongo_url, commands=commands) as store:
        answer = await started_run(store, principal, (await started_thread(store, principal)).id)
        commands.dies_at = len(commands.names)
        with pytest.raises(StoreUnavailable):
            await store.finish(principal, completed(answer))
        commands.dies_at = None
        await store.delete(principal, answer.thread_id)
        with pytest.raises(ThreadNotFound):
            await store.finish(principal, completed(answer))
        assert store._unconfirmed == set()


async def test_a_finish_without_a_response_loses_to_one_that_came_in_between(
    mongo_url: str, principal: Principal
) -> None:
    commands = Commands()
    async with opened(mongo_url, commands=commands) as store, opened(mongo_url) as other:
        answer = await started_run(store, principal, (await started_thread(store, principal)).id)
        commands.dies_at = len(commands.names)
        with pytest.raises(StoreUnavailable):
            await store.finish(principal, completed(answer))
        commands.dies_at = None
        won = await other.finish(principal, cancelled(answer))
        assert won.won is True
        assert await store.finish(principal, completed(answer)) == Finished(won.message, won=False)


# delete


async def test_an_interrupted_deletion_is_completed_by_a_sweeper(mongo_url: str, principal: Principal) -> None:
    commands = Commands()
    async with opened(mongo_url, commands=commands) as store, opened(mongo_url) as other:
        for left in range(2, 7):  # after the removal of its blobs is stored and the thread is emptied
            thread, _ = await loaded(other, principal, ["content"] * 160)
            answer = await started_run(other, principal, thread.id)
            commands.dies_at = len(commands.names) + left
            assert await store.delete(principal, thread.id) == answer.id
            commands.dies_at = None
            with pytest.raises(ThreadNotFound):
                await other.get(principal, thread.id)
            assert await other.take_orphans("sweeper") == []
            assert await other.find_record(principal, answer.id) is None
            assert await other.db.older_messages.find({"thread_id": thread.id}, {"_id": 1}) == []
            assert (await other.db.threads.find_one({"_id": thread.id}) or {}).keys() == EMPTIED


@pytest.mark.parametrize(("verb", "count"), [("older_messages.insert_missing", 6), ("attachments.insert", 1)])
async def test_what_is_stored_after_a_deletion_is_deleted_by_a_sweeper(
    mongo_url: str, principal: Principal, monkeypatch: pytest.MonkeyPatch, verb: str, count: int
) -> None:
    """Moved messages or a file whose writer died after it had stored it, before it checked the thread again."""
    monkeypatch.setattr(mongo_threads, "STRAGGLER_MILLIS", 0)
    commands = Commands()
    async with (
        opened(mongo_url, limits=EmbeddingLimits(messages=4, slack=2), commands=commands) as dying,
        opened(mongo_url) as other,
    ):
        thread, _ = await loaded(other, principal, ["content"] * 9)

        async def delete() -> None:
            await other.delete(principal, thread.id)
            commands.dies_at = len(commands.names) + 1

        async def left() -> int:
            found = [await each.find({}, {"_id": 1}) for each in (other.db.older_messages, other.db.attachments)]
            return sum(map(len, found))

        commands.meanwhile = (verb, delete)
        with contextlib.suppress(StoreUnavailable):
            await dying.append_message(principal, new_message(thread.id))
            await dying.add_file(principal, new_file(thread.id))
        assert await left() == count
        await other.take_orphans("sweeper")
        assert await left() == 0
        assert await other.db.threads.find({}, {"_id": 1}) != [], "its deletion is not published yet"
        await other.mark_published(principal, thread.id, [ThreadDeleted(thread.id)])
        await other.take_orphans("sweeper")
        assert await other.db.threads.find({}, {"_id": 1}) == []


@pytest.mark.parametrize("failure", [StoreUnavailable("the test took it away"), asyncio.CancelledError()])
async def test_no_record_remains_of_a_file_whose_caller_got_an_error(
    mongo_url: str, principal: Principal, failure: BaseException
) -> None:
    commands = Commands()
    async with opened(mongo_url, commands=commands) as store:
        thread = await started_thread(store, principal)

        async def fail() -> None:
            raise failure

        async def fail_at_the_second_check() -> None:
            commands.meanwhile = ("threads.find_one", fail)

        commands.meanwhile = ("attachments.insert", fail_at_the_second_check)
        with pytest.raises(type(failure)):
            await store.add_file(principal, new_file(thread.id, size=7))


# the server


async def test_reads_go_to_the_primary_whatever_the_url_prefers(mongo_url: str, principal: Principal) -> None:
    """A secondary may still have a finished run in progress, and may not have a thread that was just created."""
    read = Read()
    async with opened(f"{mongo_url}?readPreference=secondaryPreferred", read=read) as store:
        thread = await started_thread(store, principal)
        answer = await finished_run(store, principal, thread.id)
        await store.get(principal, thread.id)
        await store.get_message(principal, thread.id, answer.id)
        await store.list_threads(principal, "agent", limit=9, offset=0, archived=None, message_limit=9, max_bytes=2**20)
        await store.take_orphans(WORKER)
        assert "find" in read.commands
        assert "secondaryPreferred" not in read.preferences


async def test_an_unreachable_server_is_reported_within_seconds(principal: Principal) -> None:
    with pytest.raises(StoreUnavailable):
        async with asyncio.timeout(5):
            await open_mongo(f"mongodb://127.0.0.1:1/chat?{HASTY}")
    with pytest.raises(ValueError, match="not understood"):
        await open_mongo("mongodb://[nonsense")


async def test_a_server_that_was_stopped_has_everything_after_its_restart(principal: Principal) -> None:
    with mongo_process() as server:
        store = await open_mongo(f"{server.url}/chat?{HASTY}")
        try:
            thread = await started_thread(store, principal)
            running = await started_run(store, principal, thread.id)
            assert await store.ready() is True
            await asyncio.to_thread(server.stop)
            calls: list[Awaitable[object]] = [
                store.get(principal, thread.id),
                store.finish(principal, completed(running)),
                store.checkpoint(principal, running.id, worker=WORKER, partial=running),
                store.append_message(principal, new_message(thread.id)),
                store.take_orphans(WORKER),
                store.find_principal("secret"),
            ]
            async with asyncio.timeout(10):
                outcomes = await asyncio.gather(*calls, return_exceptions=True)
                assert await store.ready() is False
            assert {type(outcome) for outcome in outcomes} == {StoreUnavailable}
            await asyncio.to_thread(server.start)
            assert await store.ready() is True
            assert (await store.get(principal, thread.id)).messages[1] == running
            assert (await store.finish(principal, completed(running))).won is True
        finally:
            await store.close()


async def test_after_a_failed_write_only_a_write_makes_the_store_ready(mongo_url: str) -> None:
    read = Read()
    async with opened(mongo_url, read=read) as store:
        assert await store.ready() is True
        assert "findAndModify" not in read.commands
        with pytest.raises(StoreUnavailable):
            await store.db.older_messages.update_one({"_id": "x"}, {"$no_such_operator": {"a": 1}}, upsert=True)
        assert store.db.failing
        assert store.failures == 1
        assert await store.ready() is True
        assert "findAndModify" in read.commands
        assert not store.db.failing


async def test_every_query_has_an_index(mongo_url: str, mongo_server: str, principal: Principal) -> None:
    """Queries by a single `_id` are left out: they use its index."""
    read = Read()
    async with opened(mongo_url, limits=EmbeddingLimits(messages=4, slack=2), read=read) as store:
        user = await store.create_user((await store.create_organization("Acme")).id, "Ada")
        await store.find_organization("Acme")
        await store.find_user(user.organization_id, "Ada")
        key = await store.create_key(user, "secret")
        await store.create_key(user, "secret")
        await store.find_principal("secret")
        await store.hold_key(key.id)
        await store.revoke_unheld_keys("first_start", keep=key.id, seconds=0)
        await store.create_session("secret", "token", seconds=60)
        await store.find_session_principal("token")
        await store.delete_session("token")
        await store.revoke_key(key.id)
        owner = Principal(user.organization_id, user.id)
        agent = await store.create_agent(owner, new_agent(owner))
        await store.list_agents(owner)
        await store.update_agent(owner, agent, is_default=True)
        await store.delete_agent(owner, agent.id)
        thread = (await store.create(principal, new_thread(principal), idempotent())).thread
        await store.create(principal, new_thread(principal), idempotent())
        await store.import_thread(principal, imported := new_thread(principal), [new_message(imported.id)])
        await store.scan_threads(principal, user_id=None, agent_id=None, after=thread.id, limit=9)
        for _ in range(2):
            await store.create(principal, new_thread(principal).with_external_id("chat-1"))
        await store.find_thread(principal, "agent", "chat-1")
        first = await store.append_message(principal, new_message(thread.id), idempotent())
        for _ in range(5):
            await finished_run(store, principal, thread.id)
        running = await started_run(store, principal, thread.id)
        await store.replay(principal, thread.id, idempotent())
        await store.list_messages(principal, thread.id, before=running.id, limit=9)
        await store.get_message(principal, thread.id, first.message_id)
        for archived, external_id in ((None, None), (True, None), (None, "chat-1"), (True, "chat-1")):
            await read_page(store, principal, archived=archived, external_id=external_id)
        await store.update(principal, thread.id, title="x")
        await store.checkpoint(principal, running.id, worker=WORKER, partial=running)
        await store.cancel(principal, thread.id, running.id)
        await store.take_orphan(principal, running.id, WORKER)
        await store.take_orphans(WORKER)
        await store.add_file(principal, file := new_file(thread.id))
        await store.remove_file(principal, thread.id, file.attachment.id)
        await store.reserve_bytes(principal.organization_id, 1, 1, 100)
        await store.correct_bytes()
        await store.take_removals()
        await store.take_outboxes()
        await store.delete(principal, thread.id)
        await store.take_orphans(WORKER)
    assert len(read.queries) > 25
    scans: list[Document] = []
    with MongoClient[Document](mongo_server) as client:
        database = client[mongo_url.rsplit("/", 1)[1]]
        for find in read.queries.values():
            plan = database.command("explain", find, verbosity="queryPlanner")
            if not isinstance(find["filter"].get("_id"), str) and "COLLSCAN" in str(
                plan["queryPlanner"]["winningPlan"]
            ):
                scans.append(find)
    assert scans == []


async def test_unused_indexes_are_dropped(mongo_url: str, mongo_server: str) -> None:
    with MongoClient[Document](mongo_server) as client:
        attachments = client[mongo_url.rsplit("/", 1)[1]].attachments
        attachments.create_index([("organization_id", 1), ("size", 1)], name="kept")
        for _ in range(2):
            await (await open_mongo(mongo_url)).close()
            assert set(attachments.index_information()) == {"_id_", "stored", "thread"}
