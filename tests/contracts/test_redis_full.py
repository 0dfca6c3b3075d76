"""A Redis whose memory is full: logs that have been silent longest are deleted, whatever its eviction policy is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from agent_chat.stores.errors import Gap, LogUnavailable
from agent_chat.stores.events import MessageCreated, MessageDelta, RunStarted
from agent_chat.stores.models import new_id
from agent_chat.stores.redis.log import RedisLog, open_redis_log
from tests.support.samples import new_message, rest, turn
from tests.support.services import RedisServer, running_redis

POST = 1_900_000


@pytest.fixture
async def server() -> AsyncIterator[RedisServer]:
    async with running_redis() as server:
        server.command("CONFIG", "SET", "maxmemory", "24mb")
        yield server


async def post(log: RedisLog, thread_id: str) -> None:
    writer = log.writer(thread_id)
    writer.write(MessageCreated(new_message(thread_id, "x" * POST, "system")))
    await writer.flush()


async def test_posts_of_one_organization_do_not_stop_the_run_of_another(server: RedisServer) -> None:
    log, watching = await open_redis_log(server.url), await open_redis_log(server.url)
    try:
        watched, threads = new_id(), [new_id() for _ in range(10)]
        question, answer = turn(watched)
        cursor = watching.cursor(watched, await watching.tail(watched))
        writer = log.writer(watched)
        writer.write(MessageCreated(question))
        writer.write(RunStarted(answer))
        words = 0
        async with asyncio.timeout(30):
            for number in range(40):
                posting = asyncio.create_task(post(log, threads[number % len(threads)]))
                writer.write(MessageDelta(answer.id, number * 5, "word "))
                await asyncio.gather(posting, writer.flush())
            while words < 40:
                words += sum(entry.data.count(b"word ") for entry in await cursor.next())
        cursor.close()
        assert not log.unreachable
        assert log.evicted > 0
    finally:
        await log.close()
        await watching.close()


async def test_readers_of_a_deleted_log_get_a_gap_and_can_continue(server: RedisServer) -> None:
    log = await open_redis_log(server.url)
    try:
        silent = new_id()
        before = await log.tail(silent)
        await post(log, silent)
        async with asyncio.timeout(20):
            for _ in range(20):
                await post(log, new_id())
            with pytest.raises(Gap):
                await rest(log, silent, before)
            assert await log.tail(silent) != before, "it can be opened again though Redis was full"
            await post(log, silent)
    finally:
        await log.close()


async def test_keys_of_other_applications_are_not_deleted_from_a_full_redis(server: RedisServer) -> None:
    """Only logs of this server are deleted, whatever other keys are named."""
    log = await open_redis_log(server.url)
    try:
        server.command("XADD", "chat:theirs", "*", "a", "b")
        server.command("SET", f"chat:{new_id()}", "theirs")
        server.command("CONFIG", "SET", "maxmemory", "1mb")
        with pytest.raises(LogUnavailable):
            await log.tail(new_id())
        assert server.command("DBSIZE") == b":2\r\n"
        server.command("CONFIG", "SET", "maxmemory", "24mb")
        async with asyncio.timeout(10):
            while True:
                try:
                    await log.tail(new_id())
                    break
                except LogUnavailable:
                    await asyncio.sleep(0.05)
    finally:
        await log.close()
