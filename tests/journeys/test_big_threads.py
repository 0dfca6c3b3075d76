"""A thread of many megabytes: readers get the latest 8, and those that then stop reading take little more memory."""

from __future__ import annotations

import asyncio
import socket
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import httpx
import pytest

from tests.support.client import KEY
from tests.support.gates import eventually
from tests.support.servers import Live, live_server
from tests.support.sockets import socket as open_socket

MEGABYTE = 2**20
READERS = 6


@pytest.fixture(scope="module")
async def big(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Live, str]]:
    """A server, and a thread of 12 MB."""
    async with live_server(tmp_path_factory.mktemp("big")) as live:
        thread = await live.scripted_thread()
        for number in range(12):
            body = {"content": f"{number} " + "x" * (MEGABYTE - 10), "content_html": "", "role": "assistant"}
            assert (await live.http.post(f"{thread}/messages", json=body)).status_code == 201
        yield live, thread


async def test_a_thread_is_read_with_as_many_of_its_messages_as_fit(big: tuple[Live, str]) -> None:
    live, thread = big
    answer = await live.http.get(thread)
    assert answer.headers["x-messages-cut"] == "true"
    assert 7 * MEGABYTE < len(answer.content) < 8 * MEGABYTE + 10_000
    assert [message["content"].split()[0] for message in answer.json()["messages"]] == [
        "5",
        "6",
        "7",
        "8",
        "9",
        "10",
        "11",
    ]
    few = await live.http.get(thread, params={"message_limit": 3})
    assert "x-messages-cut" not in few.headers
    assert len(few.json()["messages"]) == 3
    renamed = await live.http.patch(thread, json={"title": "Big"})
    assert renamed.headers["x-messages-cut"] == "true"


@pytest.mark.slow
async def test_a_snapshot_has_the_same_messages(big: tuple[Live, str]) -> None:
    live, thread = big
    stored = (await live.get(thread))["messages"]
    async with live.watching(thread) as events:
        assert (await anext(events)).data["thread"]["messages"] == stored
    async with open_socket(live.url, thread) as connection:
        assert (await connection.receive())["thread"]["messages"] == stored


@pytest.mark.slow
async def test_a_running_message_is_in_the_snapshot_however_much_came_after_it(big: tuple[Live, str]) -> None:
    live, _ = big
    thread = await live.scripted_thread()
    asking = asyncio.create_task(live.post(thread, "say half\nhold it\nsay done"))
    await live.gates.reached("it")
    for _ in range(9):
        body = {"content": "x" * (MEGABYTE - 10), "content_html": "", "role": "system"}
        assert (await live.http.post(f"{thread}/messages", json=body)).status_code == 201
    async with live.watching(thread) as events:
        messages = (await anext(events)).data["thread"]["messages"]
        assert [message["role"] for message in messages] == ["assistant", *["system"] * 7]
        assert messages[0]["metadata"]["run"]["status"] == "in_progress"
        live.gates.release("it")
        while (frame := await anext(events)).event != "run.completed":
            pass
        assert frame.data["message"]["content"] == (await asking).json()["content"] == "halfdone"


def lazy(url: httpx.URL) -> socket.socket:
    """A connection with a small receive buffer."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
    connection.connect((url.host, url.port))
    connection.setblocking(False)
    return connection


@pytest.mark.parametrize("path", ["events", "ws"])
@pytest.mark.slow
async def test_readers_that_stop_take_no_more_memory_than_their_snapshot(big: tuple[Live, str], path: str) -> None:
    live, thread = big
    url = httpx.URL(live.url)
    upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    head = f"GET {thread}/{path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"{upgrade}Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n" if path == "ws" else "\r\n"
    stopped = []
    tracemalloc.start()
    async with AsyncExitStack() as stack, asyncio.timeout(40):
        stack.callback(tracemalloc.stop)
        for _ in range(READERS):
            reader, writer = await asyncio.open_connection(sock=lazy(url), limit=1024)  # reads no further by itself
            stack.callback(writer.transport.abort)
            writer.write(head.encode())
            await reader.readuntil(b"thread.snapshot")
            stopped.append((reader, writer))  # whoever forgets them closes them
        await eventually(lambda: tracemalloc.get_traced_memory()[0] < READERS * 10 * MEGABYTE)
