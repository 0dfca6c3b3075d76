"""What a client without a key, or one that floods, can take: heads, idle sockets, connections, frames. All bounded."""

from __future__ import annotations

import asyncio
import base64
import logging
import socket as sockets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosedError

from agent_chat.server.http import protocol as http_protocol
from agent_chat.server.http.connections import SPARE, ConnectionLimits, connections_for
from agent_chat.server.http.websocket_protocol import WebSocketProtocol
from agent_chat.server.limits import Limits
from agent_chat.server.timing import Timing
from tests.support.client import KEY
from tests.support.servers import Live, live_server
from tests.support.sockets import socket

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
SOCKET_KEY = f"Sec-WebSocket-Key: {base64.b64encode(b'k' * 16).decode()}"


async def connect(live: Live, data: bytes = b"") -> Connection:
    host, port = live.url.removeprefix("http://").split(":")
    sock = sockets.socket()
    sock.setblocking(False)
    sock.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)  # a client that stops reading is noticed early
    await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=sock)
    writer.write(data)
    return reader, writer


async def status_of(connection: Connection) -> str:
    """The status code of the response; empty if the connection was closed without one."""
    with suppress(OSError):
        async with asyncio.timeout(10):
            return (await connection[0].readline()).decode()[9:12]
    return ""


async def flood(connection: Connection, data: bytes, total: int) -> int:
    """Send until that many bytes are sent or the connection breaks; the bytes sent."""
    sent = 0
    with suppress(OSError):
        async with asyncio.timeout(20):
            while sent < total:
                connection[1].write(data)
                await connection[1].drain()
                sent += len(data)
    return sent


async def expired(live: Live, connection: Connection) -> bytes:
    """What the server sends before it closes, having checked its connections until it does."""
    received = b""
    async with asyncio.timeout(10):
        while True:
            await live.server.connections.check()
            with suppress(TimeoutError):
                async with asyncio.timeout(0.02):
                    data = await connection[0].read(65536)
                    if not data:
                        return received
                    received += data


GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /api/v1/agents HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %b\r\n" % KEY.encode()
CHUNKED = b"POST /api/v1/agents HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n"


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (GET, b"x-header: " + b"a" * 8000 + b"\r\n"),
        (GET + b"x-header: ", b"a" * 8000),
        (b"GET /", b"a" * 8000),
        (CHUNKED + b"0\r\nx-trailer: ", b"a" * 8000),
        (b"", b"\r\n" * 4000),
    ],
    ids=["headers", "header", "url", "trailer", "nothing"],
)
async def test_an_endless_head_is_refused(live: Live, begin: bytes, more: bytes) -> None:
    connection = await connect(live, begin)
    total = 64 * 2**20
    assert await flood(connection, more, total) < total, "the connection is closed"


async def test_a_head_too_large_is_refused_though_it_comes_in_one_piece(live: Live) -> None:
    assert await status_of(await connect(live, GET + b"x: " + b"a" * 60_000 + b"\r\n\r\n")) == "200"
    assert await status_of(await connect(live, GET + b"x: " + b"a" * 66_000 + b"\r\n\r\n")) == "431"


async def test_an_upgrade_with_a_head_that_no_websocket_may_have_is_refused(live: Live) -> None:
    upgrade = b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: "
    upgrade = GET + upgrade + base64.b64encode(b"k" * 16) + b"\r\nx: " + b"a" * 10_000 + b"\r\n\r\n"
    assert await status_of(await connect(live, upgrade)) == "431"


async def test_what_is_no_request_gets_a_problem_and_no_log_line(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    reader, _ = await connect(live, b"nonsense\r\n\r\n")
    async with asyncio.timeout(10):
        response = await reader.read()
    assert response.startswith(b"HTTP/1.1 400 ")
    assert b"application/problem+json" in response
    assert not caplog.records


async def test_many_pipelined_requests_are_not_buffered(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    few = await connect(live, (GET + b"\r\n") * 10)
    async with asyncio.timeout(10):
        for _ in range(10):
            await few[0].readuntil(b'{"status":"ok"}')
    many = await connect(live, (GET + b"\r\n") * 5000)
    with suppress(OSError):
        async with asyncio.timeout(10):
            assert (await many[0].read()).count(b"200 OK") < 20
    assert not caplog.records


async def test_a_pipelined_stream_ends_when_its_client_leaves(live: Live) -> None:
    """uvicorn reports a disconnect to the request that was parsed last, not to the one that runs."""
    thread = await live.scripted_thread()
    watch = f"GET {thread}/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode()
    reader, writer = await connect(live, watch + GET + b"\r\n")
    streams = live.server.lifespan.state["streams"]
    async with asyncio.timeout(10):
        await reader.readuntil(b"event: thread.snapshot")
        assert len(streams) == 1
        writer.close()
        while len(streams):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_an_upgrade_behind_a_running_stream_ends_both(live: Live) -> None:
    thread = await live.scripted_thread()
    keyed = f"Host: x\r\nAuthorization: Bearer {KEY}\r\n"
    reader, writer = await connect(live, f"GET {thread}/events HTTP/1.1\r\n{keyed}\r\n".encode())
    async with asyncio.timeout(10):
        await reader.readuntil(b"event: thread.snapshot")
        upgrade = f"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n{SOCKET_KEY}\r\n\r\n"
        writer.write(f"GET {thread}/ws HTTP/1.1\r\n{keyed}{upgrade}".encode())
        assert b"101 Switching" not in await read_all(reader)
        writer.close()
        while len(live.server.lifespan.state["streams"]):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


SHORT = ConnectionLimits(
    head_seconds=1, idle_seconds=1, body_seconds=1, send_seconds=1, linger_seconds=1, close_seconds=1
)


@asynccontextmanager
async def hasty(tmp_path: Path, limits: ConnectionLimits = SHORT) -> AsyncIterator[Live]:
    """A server that closes what two checks in a row find in the same state."""
    async with live_server(tmp_path, connections=limits) as live:
        yield live


@pytest.mark.parametrize(
    ("data", "response"),
    [
        (b"", b""),
        (b"GET /hea", b"HTTP/1.1 408 "),
        (POST + b"Content-Length: 9\r\n\r\n{", b"HTTP/1.1 408 "),
        (POST[:-5] + b"x\r\nContent-Length: 9\r\n\r\n{", b"HTTP/1.1 401 "),
        (GET + b"\r\n", b"HTTP/1.1 200 "),
    ],
    ids=["nothing sent", "half a head", "half a body", "half a body of a refused request", "idle"],
)
async def test_a_connection_that_does_not_get_on_is_closed(tmp_path: Path, data: bytes, response: bytes) -> None:
    async with hasty(tmp_path) as live:
        received = await expired(live, await connect(live, data))
        assert received[: len(response)] == response
        assert bool(received) == bool(response)


async def test_a_client_that_reads_nothing_is_cut_off(tmp_path: Path) -> None:
    async with hasty(tmp_path) as live:
        reader, writer = await connect(live)
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 16)
        async with asyncio.timeout(10):
            while not live.server.connections.expired["sending"]:
                await live.server.connections.check()
                await asyncio.sleep(0.02)


async def test_a_stream_at_work_is_left_alone(tmp_path: Path) -> None:
    async with hasty(tmp_path) as live:
        thread = await live.scripted_thread()
        async with live.watching(thread) as events, socket(live.url, thread) as connection:
            assert (await anext(events)).event == "thread.snapshot"
            assert (await connection.receive())["type"] == "thread.snapshot"
            for _ in range(5):
                await live.server.connections.check()
            await live.post(thread, "say hi")
            assert (await anext(events)).event == "message.created"
            assert (await connection.receive())["type"] == "message.created"


async def test_a_full_server_refuses_further_clients_and_serves_health_checks(tmp_path: Path) -> None:
    async with hasty(tmp_path, ConnectionLimits(count=2)) as live:
        thread = await live.scripted_thread()
        async with live.watching(thread) as first, live.watching(thread) as second:
            await anext(first)
            await anext(second)
            assert await status_of(await connect(live, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")) == "503"
            assert await status_of(await connect(live, GET + b"\r\n")) == "200"
            many = [await connect(live) for _ in range(SPARE + 5)]
            cut_off = 0
            async with asyncio.timeout(10):
                while cut_off < 5:
                    cut_off = sum(reader.at_eof() or reader.exception() is not None for reader, _ in many)
                    await asyncio.sleep(0.01)
            for _, writer in many:
                writer.close()


async def test_on_a_full_server_an_idle_connection_makes_room(tmp_path: Path) -> None:
    async with hasty(tmp_path, ConnectionLimits(count=20)) as live:
        idle = [await connect(live, b"GET /hea" if n % 2 else b"") for n in range(20)]
        async with asyncio.timeout(10):
            while len(live.server.connections) < 20:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await live.server.connections.check()
        for _ in range(10):
            assert await status_of(await connect(live, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")) == "200"
        for _, writer in idle:
            writer.close()


def test_more_connections_than_the_system_has_files_for_are_refused_at_start() -> None:
    assert connections_for(1024, None) == 768
    assert connections_for(2**20, None) == 10_000
    assert connections_for(1024, 700) == 700
    with pytest.raises(ValueError, match="800 is more than the 768"):
        connections_for(1024, 800)


async def opened(live: Live) -> Connection:
    """A thread's WebSocket, as bytes."""
    thread = await live.scripted_thread()
    connection = await connect(
        live,
        f"GET {thread}/ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Authorization: Bearer {KEY}\r\nSec-WebSocket-Version: 13\r\n{SOCKET_KEY}\r\n\r\n".encode(),
    )
    async with asyncio.timeout(10):
        await connection[0].readuntil(b"\r\n\r\n")
    return connection


async def read_all(reader: asyncio.StreamReader) -> bytes:
    received = b""
    with suppress(OSError):
        while data := await reader.read(65536):
            received = (received + data)[-1000:]
    return received


FLOODS = {
    "text": b"\x81\x81\0\0\0\0a",
    "binary": b"\x82\x81\0\0\0\0a",
    "pings": b"\x89\x80\0\0\0\0",
    "pongs": b"\x8a\x80\0\0\0\0",
}


@pytest.mark.parametrize("frame", FLOODS.values(), ids=FLOODS)
async def test_a_flood_of_tiny_frames_leaves_time_for_others(live: Live, frame: bytes) -> None:
    reader, writer = await opened(live)
    reading = asyncio.create_task(read_all(reader))
    writer.write(frame * 30_000)
    longest, until = 0.0, time.monotonic() + 0.3
    while time.monotonic() < until:
        began = time.thread_time()
        await asyncio.sleep(0)
        longest = max(longest, time.thread_time() - began)
    assert longest < 0.05, "CPU seconds between two turns of another task"
    writer.transport.abort()
    await asyncio.wait({reading})


async def test_a_websocket_far_beyond_its_rate_is_closed(tmp_path: Path) -> None:
    async with live_server(tmp_path, limits=Limits(requests=10), timing=Timing(rate_pause=0.0)) as live:
        thread = await live.scripted_thread()
        async with socket(live.url, thread) as connection:
            for _ in range(40):
                await connection.send(type="ping")
            with pytest.raises(ConnectionClosedError):
                await connection.until("no such frame")
            assert connection.connection.close_code == 1013


async def test_pings_whose_pongs_are_not_read_are_not_buffered(live: Live) -> None:
    reader, writer = await opened(live)
    reader._transport.pause_reading()  # type: ignore[attr-defined]
    (protocol,) = [one for one in live.server.server_state.connections if isinstance(one, WebSocketProtocol)]
    assert await flood((reader, writer), (b"\x89\xfd\0\0\0\0" + b"p" * 125) * 100, 4 * 2**20) >= 4 * 2**20
    assert protocol.transport.get_write_buffer_size() < 2**18
    live.server.connections.abort_stalled()  # as a server that stops does: it need not wait for this client
    async with asyncio.timeout(10):
        while protocol in live.server.server_state.connections:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("data", "code"),
    [(b"\x81\x81\0\0\0\0\xff", 1007), (b"\x01\x80\0\0\0\0" + b"\x00\x80\0\0\0\0" * 5000, 1009)],
    ids=["invalid UTF-8", "endless fragments"],
)
async def test_a_frame_that_cannot_be_taken_closes_the_socket_with_its_code(
    live: Live, data: bytes, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "server")
    reader, writer = await opened(live)
    writer.write(data)
    async with asyncio.timeout(10):
        received = await read_all(reader)
    assert code.to_bytes(2, "big") in received[-40:]
    assert not caplog.records


def test_health_checks_are_routes() -> None:
    from agent_chat.server.app import ROUTES

    assert {getattr(route, "path", "") for route in ROUTES} >= set(http_protocol.HEALTH)
