"""TCP proxies to a port of this machine that break connections.

`Proxy` forwards everything until it is told to cut. Its subclasses decide what of a connection passes: `HTTPProxy` cuts
event streams after a number of bytes, `BreakingProxy` every connection, `LossyProxy` swallows pieces of either
direction, `PubSubProxy` drops and doubles whole messages of Redis.
"""

from __future__ import annotations

import asyncio
import random
import re
import socket
import struct
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Self

_PIECE = 65536
_STREAM = re.compile(rb"GET \S+/(events|ws)[ ?]|[^\n]+\r\n(.+\r\n)*accept: text/event-stream", re.IGNORECASE)
_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)", re.IGNORECASE)
_UPGRADE = re.compile(rb"\r\nupgrade: websocket", re.IGNORECASE)
_EVENTS = re.compile(rb"HTTP/1.1 200 .*\r\ncontent-type: text/event-stream", re.IGNORECASE | re.DOTALL)
_MESSAGE = b"*3\r\n$7\r\nmessage\r\n"


class Connection:
    """One forwarded connection: the streams of both ends, named by whom they lead to."""

    from_server: asyncio.StreamReader

    def __init__(self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.from_client = reader
        self.writers = [writer]
        self.bytes_left: int | None = None
        """After how many more bytes of responses an HTTPProxy cuts it; None: never."""
        self.ended = asyncio.Event()
        self._proxy = proxy
        self._cut = asyncio.Event()

    async def to_client(self, data: bytes) -> None:
        self.writers[0].write(data)
        await self.writers[0].drain()

    async def to_server(self, data: bytes) -> None:
        self.writers[1].write(data)
        await self.writers[1].drain()

    def cut(self) -> None:
        """End both ends of it as a broken line does, if the proxy resets, else by closing them."""
        if not self._cut.is_set():
            self._cut.set()
            self._proxy.cuts += 1

    async def forward(self, port: int) -> None:
        tasks: list[asyncio.Task[object]] = []
        try:
            self.from_server, writer = await asyncio.open_connection("127.0.0.1", port)
            self.writers.append(writer)
            for way in (self._proxy.requests(self), self._proxy.responses(self), self._cut.wait()):
                tasks.append(asyncio.create_task(way))
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for writer in self.writers:
                self._end(writer)

    def _end(self, writer: asyncio.StreamWriter) -> None:
        if not self._cut.is_set() or not self._proxy.resets:
            return writer.close()
        with suppress(OSError):  # it may be closed already
            with_rst = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, with_rst)
        writer.transport.abort()


class Proxy:
    """Forwards connections while it is entered. `cuts` is how many connections it has cut."""

    scheme = "http"
    resets = True
    """Whether cut connections end with an RST instead of a FIN."""

    def __init__(self, upstream: int) -> None:
        self.port = 0
        self.cuts = 0
        self._upstream = upstream
        self._connections: set[Connection] = set()
        self._server: asyncio.Server

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    async def requests(self, connection: Connection) -> None:
        """Forward what the client sends, until the connection ends."""
        while data := await connection.from_client.read(_PIECE):
            await connection.to_server(data)

    async def responses(self, connection: Connection) -> None:
        """Forward what the server sends, until the connection ends."""
        while data := await connection.from_server.read(_PIECE):
            await connection.to_client(data)

    def cut_all(self) -> None:
        """Cut every connection."""
        for connection in list(self._connections):
            connection.cut()

    @asynccontextmanager
    async def down(self) -> AsyncIterator[None]:
        """Cut every connection and refuse new ones until the context is left."""
        self._server.close()
        self.cut_all()
        yield
        await self._listen()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def __aenter__(self) -> Self:
        await self._listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut_all()
        async with asyncio.timeout(10):
            await asyncio.gather(*(connection.ended.wait() for connection in self._connections))

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(self, reader, writer)
        self._connections.add(connection)
        try:
            with suppress(OSError, asyncio.IncompleteReadError):
                await connection.forward(self._upstream)
        finally:
            self._connections.discard(connection)
            connection.ended.set()


class HTTPProxy(Proxy):
    """Cuts event streams and WebSockets only, whose requests it recognizes by their heads.

    What the server sends passes unchanged, except that `retry_ms` adds a line, as proxies may: an EventSource waits
    three seconds before it reconnects, which would be most of a test's time.

    Args:
        upstream: the server's port.
        cut_after: after how many bytes of the response each of the next streams is cut; later streams are not cut.
        retry_ms: after how long an EventSource shall reconnect.
    """

    def __init__(self, upstream: int, cut_after: Iterable[int] = (), *, retry_ms: int | None = None) -> None:
        super().__init__(upstream)
        self.streams: list[str] = []
        """The heads of the requests for event streams and WebSockets."""
        self.retry_line = b"" if retry_ms is None else b"retry: %d\n\n" % retry_ms
        self._cut_after = iter(cut_after)

    async def requests(self, connection: Connection) -> None:
        while True:
            head = await connection.from_client.readuntil(b"\r\n\r\n")
            connection.bytes_left = None
            if _STREAM.match(head):
                self.streams.append(head.decode())
                connection.bytes_left = next(self._cut_after, None)
            await connection.to_server(head)
            if _UPGRADE.search(head):
                return await super().requests(connection)
            length = _LENGTH.search(head)
            await connection.to_server(await connection.from_client.readexactly(int(length[1]) if length else 0))

    async def responses(self, connection: Connection) -> None:
        while data := await connection.from_server.read(4096):
            data = self._with_retry_line(data)
            if connection.bytes_left is not None:
                data = data[: connection.bytes_left]
                connection.bytes_left -= len(data)
            await connection.to_client(data)
            if connection.bytes_left == 0:
                return connection.cut()

    def _with_retry_line(self, data: bytes) -> bytes:
        """Insert the line as the first piece of the body, if this is the beginning of an event stream."""
        head, end, body = data.partition(b"\r\n\r\n")
        if not self.retry_line or not end or not _EVENTS.match(head):
            return data
        return head + end + b"%x\r\n%b\r\n" % (len(self.retry_line), self.retry_line) + body


class BreakingProxy(Proxy):
    """Cuts every connection after a random number of bytes of responses, which pass in small pieces."""

    def __init__(self, upstream: int, chance: random.Random) -> None:
        super().__init__(upstream)
        self._chance = chance

    async def responses(self, connection: Connection) -> None:
        left = self._chance.randrange(1_000, 20_000)
        while data := await connection.from_server.read(self._chance.randrange(1, 1_000)):
            await connection.to_client(data[:left])
            left -= len(data)
            if left <= 0:
                return connection.cut()


class LossyProxy(Proxy):
    """In front of Redis: swallows pieces together with their connection.

    A swallowed request was never carried out; a swallowed response belongs to a request that was. `chance` is the
    probability for each piece of either direction; `swallow_responses` is how many of the next responses are swallowed.
    """

    scheme = "redis"
    resets = False

    def __init__(self, upstream: int, rng: random.Random) -> None:
        super().__init__(upstream)
        self.chance = 0.0
        self.swallow_responses = 0
        self._rng = rng

    async def requests(self, connection: Connection) -> None:
        while data := await connection.from_client.read(_PIECE):
            if self._rng.random() < self.chance:
                return connection.cut()
            await connection.to_server(data)

    async def responses(self, connection: Connection) -> None:
        while data := await connection.from_server.read(_PIECE):
            if self.swallow_responses and b"SCRIPT" not in data:
                self.swallow_responses -= 1
                return connection.cut()
            if self._rng.random() < self.chance:
                return connection.cut()
            await connection.to_client(data)


class PubSubProxy(Proxy):
    """In front of Redis: drops and doubles whole pub/sub messages, while the connection stays sound.

    Commands and their responses pass unchanged, so no server is told of the loss. `chance` is the probability that a
    message is forwarded not once, but never or twice.
    """

    scheme = "redis"

    def __init__(self, upstream: int, rng: random.Random) -> None:
        super().__init__(upstream)
        self.chance = 0.0
        self.passed = self.dropped = self.doubled = 0
        self._rng = rng

    async def responses(self, connection: Connection) -> None:
        while True:
            reply = await _reply(connection.from_server)
            await connection.to_client(reply * self._times() if reply.startswith(_MESSAGE) else reply)

    def _times(self) -> int:
        """How often the next message is forwarded."""
        if self._rng.random() >= self.chance:
            self.passed += 1
            return 1
        if self._rng.random() < 0.5:
            self.dropped += 1
            return 0
        self.doubled += 1
        return 2


async def _reply(server: asyncio.StreamReader) -> bytes:
    """One whole reply of RESP2, as it came: https://redis.io/docs/latest/develop/reference/protocol-spec/."""
    head = await server.readuntil(b"\r\n")
    size = int(head[1:]) if head[:1] in b"$*" else -1
    if size < 0:
        return head
    if head[:1] == b"$":
        return head + await server.readexactly(size + 2)
    return head + b"".join([await _reply(server) for _ in range(size)])
