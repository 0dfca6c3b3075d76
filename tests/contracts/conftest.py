"""The backends that every contract is tested with. A further one joins by one entry in STORES or LOGS."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from redis.asyncio import Redis

from agent_chat.stores.contracts import EventLog, Store
from agent_chat.stores.embedded.log import EmbeddedLog, open_embedded_log
from agent_chat.stores.models import Clock, new_id, utcnow
from agent_chat.stores.mongo.store import open_mongo
from agent_chat.stores.redis.log import open_redis_log
from agent_chat.stores.sqlite.store import open_sqlite
from tests.support.backends import OpenStore, Seconds
from tests.support.mongo_server import mongo_server as mongo_server
from tests.support.mongo_server import mongo_url as mongo_url
from tests.support.samples import Lose
from tests.support.services import redis_url as redis_url


@asynccontextmanager
async def sqlite(folder: Path, lease: float, clock: Clock, peer: bool) -> AsyncIterator[Store]:
    store = await open_sqlite(folder / "chat.db", lease=lease, clock=clock, serving=not peer)
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def mongodb(url: str, lease: float, clock: Clock) -> AsyncIterator[Store]:
    store = await open_mongo(url, lease=lease, clock=clock)
    try:
        yield store
    finally:
        await store.close()


STORES = ("sqlite", pytest.param("mongodb", marks=pytest.mark.slow))

EMBEDDED = {"sqlite"}
"""Stores of one server: whoever opens them finds every run an orphan, its lease expired or not."""


class OpenedLog(msgspec.Struct):
    log: EventLog
    lose: Lose


@asynccontextmanager
async def memory() -> AsyncIterator[OpenedLog]:
    clock = Seconds()
    log = EmbeddedLog(clock=clock)

    async def expire() -> None:
        clock.now += 3601
        log._tick()

    yield OpenedLog(log, expire)
    await log.close()


@asynccontextmanager
async def embedded(folder: Path) -> AsyncIterator[OpenedLog]:
    log = await open_embedded_log(folder / "log")

    async def reset() -> None:
        for thread_id in list(log._logs):
            await log.reset(thread_id)

    yield OpenedLog(log, reset)
    await log.close()


@asynccontextmanager
async def redis(url: str) -> AsyncIterator[OpenedLog]:
    prefix = f"test-{new_id()}"
    log = await open_redis_log(url, prefix=prefix)

    async def lose() -> None:
        async with Redis.from_url(url) as client:
            if keys := [key async for key in client.scan_iter(match=f"{prefix}:*", count=10_000)]:
                await client.delete(*keys)

    try:
        yield OpenedLog(log, lose)
    finally:
        await log.close()
        await lose()


LOGS = ("memory", "embedded", "redis")


@pytest.fixture(params=STORES)
def store_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def open_store(store_name: str, tmp_path: Path, request: pytest.FixtureRequest) -> OpenStore:
    url = request.getfixturevalue("mongo_url") if store_name == "mongodb" else None

    def opening(
        *, lease: float = 20.0, clock: Clock = utcnow, peer: bool = False
    ) -> AbstractAsyncContextManager[Store]:
        return mongodb(url, lease, clock) if url else sqlite(tmp_path, lease, clock, peer)

    return opening


@pytest.fixture
async def store(open_store: OpenStore) -> AsyncIterator[Store]:
    async with open_store() as opened:
        yield opened


@pytest.fixture(name="embedded")
def only_embedded(store_name: str) -> None:
    """Keep a test to the stores of one process."""
    if store_name not in EMBEDDED:
        pytest.skip(f"{store_name} is no embedded store")


@pytest.fixture(params=LOGS)
async def opened_log(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[OpenedLog]:
    match request.param:
        case "redis":
            opening = redis(request.getfixturevalue("redis_url"))
        case "embedded":
            opening = embedded(tmp_path)
        case _:
            opening = memory()
    async with opening as opened:
        yield opened


@pytest.fixture
def log(opened_log: OpenedLog) -> EventLog:
    return opened_log.log


@pytest.fixture
def lose(opened_log: OpenedLog) -> Lose:
    return opened_log.lose
