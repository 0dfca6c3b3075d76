"""A key that is revoked ends what was opened with it: nothing more is posted, and soon nothing more is read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from agent_chat.server.limits import Limits
from agent_chat.server.timing import Timing
from agent_chat.stores.contracts import EventLog, Store
from agent_chat.stores.models import Key
from agent_chat.stores.open import Where, open_backends
from tests.support.client import Client
from tests.support.damage import without
from tests.support.servers import Live, live_server
from tests.support.shapes import is_problem
from tests.support.sockets import Socket, socket

SECRET = "a-key-that-will-be-revoked"
NOBODY = "00000000-0000-4000-8000-000000000000"
SOON = Timing(ping=0.05, key_lookup=0.0)
FRESH = Timing(key_lookup=0.0)


class World(msgspec.Struct, frozen=True):
    live: Live
    store: Store
    leaver: Client
    key: Key
    thread: str

    async def revoke(self) -> None:
        await self.store.revoke_key(self.key.id)


@asynccontextmanager
async def world(data_dir: Path, timing: Timing = Timing(), limits: Limits | None = None) -> AsyncIterator[World]:
    opened: list[Store] = []

    @asynccontextmanager
    async def backends(where: Where) -> AsyncIterator[tuple[Store, EventLog]]:
        async with open_backends(where) as (store, log):
            opened.append(store)
            yield store, log

    async with live_server(data_dir, backends, limits, timing=timing) as live:
        [store] = opened
        ours = await store.find_organization("default")
        assert ours is not None
        key = await store.create_key(await store.create_user(ours.id, "leaver"), SECRET)
        leaver = Client(live.url, SECRET)
        yield World(live, store, leaver, key, await live.scripted_thread())
        await leaver.http.aclose()


async def closed(connection: Socket) -> int | None:
    async with asyncio.timeout(10):
        await connection.connection.wait_closed()
    return connection.connection.close_code


async def test_a_command_with_a_revoked_key_is_refused_and_ends_the_socket(tmp_path: Path) -> None:
    async with world(tmp_path, FRESH) as there, socket(there.live.url, there.thread, key=SECRET) as connection:
        await connection.until("thread.snapshot")
        await connection.create("say before")
        await connection.until("run.completed")
        await there.revoke()
        request_id = await connection.create("say after")
        refused = (await connection.until("error"))[-1]
        assert (refused["request_id"], refused["error"]["code"]) == (request_id, "unauthenticated")
        assert await closed(connection) == 4401
        said = [message["content"] for message in (await there.live.get(there.thread))["messages"]]
        assert said == ["say before", "before"]


async def test_a_revoked_key_cancels_nothing(tmp_path: Path) -> None:
    async with world(tmp_path, FRESH) as there, socket(there.live.url, there.thread, key=SECRET) as connection:
        asking = asyncio.create_task(there.live.post(there.thread, "hold it\nsay done"))
        await there.live.gates.reached("it")
        run_id = (await connection.until("run.started"))[-1]["message"]["id"]
        await there.revoke()
        await connection.send(type="run.cancel", request_id="1", message_id=run_id)
        assert (await connection.until("error"))[-1]["error"]["code"] == "unauthenticated"
        there.live.gates.release("it")
        assert (await asking).json()["content"] == "done"


async def test_idle_readers_with_a_revoked_key_are_ended_and_others_are_not(tmp_path: Path) -> None:
    async with (
        world(tmp_path, SOON) as there,
        there.live.watching(there.thread) as staying,
        there.leaver.watching(there.thread) as watching,
        socket(there.live.url, there.thread, key=SECRET) as connection,
    ):
        assert (await anext(staying)).event == (await anext(watching)).event == "thread.snapshot"
        await there.revoke()
        assert await closed(connection) == 4401
        with pytest.raises(StopAsyncIteration):
            await anext(watching)
        is_problem(await there.leaver.http.get(f"{there.thread}/events"), 401, "unauthenticated")
        await there.live.post(there.thread, "say hello")
        assert (await anext(staying)).event == "message.created"


async def test_a_key_that_now_belongs_to_another_user_is_revoked_too(tmp_path: Path) -> None:
    async with world(tmp_path, SOON) as there, socket(there.live.url, there.thread, key=SECRET) as connection:
        await there.revoke()
        other = await there.store.create_organization("Other")
        await there.store.create_key(await there.store.create_user(other.id, "mallory"), SECRET)
        assert await closed(connection) == 4401


async def test_an_unreachable_database_ends_no_stream(tmp_path: Path) -> None:
    async with (
        world(tmp_path, SOON) as there,
        there.leaver.watching(there.thread) as watching,
        socket(there.live.url, there.thread, key=SECRET) as connection,
    ):
        await connection.until("thread.snapshot")
        assert (await anext(watching)).event == "thread.snapshot"
        with without(tmp_path, "keys"):
            request_id = await connection.create("say lost")
            refused = (await connection.until("error"))[-1]
            assert (refused["request_id"], refused["error"]["code"]) == (request_id, "store_unavailable")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(10 * SOON.ping):
                    await connection.receive()
        await connection.create("say hello")
        assert (await connection.until("run.completed"))[-1]["message"]["content"] == "hello"
        assert (await anext(watching)).event == "message.created"


async def test_frames_too_many_a_minute_are_refused_and_the_socket_lives(tmp_path: Path) -> None:
    async with world(tmp_path, limits=Limits(requests=10)) as there, socket(there.live.url, there.thread) as connection:
        await connection.until("thread.snapshot")
        for number in range(20):
            await connection.send(type="run.cancel", request_id=str(number), message_id=NOBODY)
        codes = {}
        for _ in range(20):
            answer = (await connection.until("error"))[-1]
            codes[answer["request_id"]] = answer["error"]["code"]
        assert set(codes.values()) == {"message_not_found", "rate_limited"}
        assert len(codes) == 20
        await connection.send(type="ping")
        assert (await connection.receive())["type"] in ("pong", "error")


async def test_too_many_sockets_a_minute_are_closed_with_a_retryable_code(tmp_path: Path) -> None:
    async with world(tmp_path, limits=Limits(requests=5)) as there:
        codes = []
        for _ in range(12):
            async with socket(there.live.url, there.thread) as connection:
                async with asyncio.timeout(10):
                    try:
                        await connection.receive()
                    except Exception:
                        codes.append(connection.connection.close_code)
        assert set(codes) == {1013}
