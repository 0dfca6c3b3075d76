"""Feeds of logs in Redis: no failure of a reading ends them (I13)."""

from __future__ import annotations

import asyncio

from agent_chat.stores.buffer import Entry
from agent_chat.stores.events import LogOpened, encode
from agent_chat.stores.models import new_id
from agent_chat.stores.redis.feed import Feed
from agent_chat.stores.redis.log import open_redis_log

DATA = encode(LogOpened())


async def test_a_message_that_cannot_be_decoded_does_not_end_the_feed() -> None:
    """Its entry is read from the stream instead."""
    reading, go_on = asyncio.Event(), asyncio.Event()

    async def read(thread_id: str, position: str) -> list[Entry]:
        reading.set()
        await go_on.wait()
        return [entry for entry in (Entry("1-0", DATA), Entry("2-0", DATA)) if entry.position >= position]

    async def last(thread_id: str) -> str:
        return "2-0"

    feed = Feed("thread", "1-0", read, last)
    cursor = feed.cursor("1-0")
    async with asyncio.timeout(5):
        filled = feed.refill()
        await reading.wait()
        feed.offer("3-0", "2-0", b"nonsense")
        go_on.set()
        await filled
        assert [entry.position for entry in await cursor.next()][:1] == ["2-0"]
        assert feed.refill() is not filled
        await feed.close()


async def test_a_log_can_be_closed_while_readers_join() -> None:
    log = await open_redis_log("redis://127.0.0.1:1")
    for _ in range(3):
        log.cursor(new_id(), "1-0")
    for feed in log._feeds.values():
        feed.refill()
    async with asyncio.timeout(10):
        closing = asyncio.create_task(log.close())
        while not closing.done():
            log.cursor(new_id(), "1-0").close()
            await asyncio.sleep(0)
        await closing
