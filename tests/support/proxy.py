"""A TCP proxy that cuts: event streams are reset after so many bytes, whatever is open when a test says so.

It reads the heads of requests, so that only event streams and WebSockets are cut by count, and tests see how a client
came back. What the server says goes through as it is; `retry_ms` alone adds a line, which proxies may: the standard's
three seconds before an EventSource comes back would be most of a test's time.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress

_STREAM = re.compile(rb"GET \S+/(events|ws)[ ?]|[^\n]+\r\n(.+\r\n)*accept: text/event-stream", re.IGNORECASE)
_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)", re.IGNORECASE)
_UPGRADE = re.compile(rb"\r\nupgrade: websocket", re.IGNORECASE)
_EVENTS = re.compile(rb"HTTP/1.1 200 .*\r\ncontent-type: text/event-stream", re.IGNORECASE | re.DOTALL)


class Proxy:
    """Forwards to a port of this machine.

    Args:
        cuts: after how many bytes of the answer the next streams are reset; the streams after those live.
        retry_ms: when an EventSource shall come back.
    """

    def __init__(self, upstream: int, cuts: Iterable[int] = (), retry_ms: int | None = None) -> None:
        self.port = 0
        self.streams: list[str] = []
        """The heads of the requests for event streams and WebSockets."""
        self.cut = 0
        """How many connections were reset."""
        self.hint = b"" if retry_ms is None else b"retry: %d\n\n" % retry_ms
        self._upstream = upstream
        self._cuts = iter(cuts)
        self._connections: set[_Connection] = set()
        self._server: asyncio.Server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cut_all(self) -> None:
        """Reset every connection."""
        for connection in list(self._connections):
            connection.reset()

    @asynccontextmanager
    async def down(self) -> AsyncIterator[None]:
        """Reset every connection and refuse new ones until the context is left."""
        self._server.close()
        self.cut_all()
        yield
        await self.listen()

    async def listen(self) -> None:
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        self._server.close()
        self.cut_all()
        async with asyncio.timeout(10):
            await asyncio.gather(*(connection.ended.wait() for connection in self._connections))

    def limit(self, head: bytes) -> int | None:
        """After how many bytes to cut the answer to this request."""
        if not _STREAM.match(head):
            return None
        self.streams.append(head.decode())
        return next(self._cuts, None)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(self, reader, writer)
        self._connections.add(connection)
        try:
            with suppress(OSError, asyncio.IncompleteReadError):
                await connection.forward(self._upstream)
        finally:
            self._connections.discard(connection)
            connection.ended.set()


class _Connection:
    def __init__(self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.ended = asyncio.Event()
        self._proxy = proxy
        self._reader = reader
        self._writers = [writer]
        self._left: int | None = None
        self._is_cut = asyncio.Event()

    def reset(self) -> None:
        """End it as a broken line does: with an RST instead of a goodbye."""
        if not self._is_cut.is_set():
            self._is_cut.set()
            self._proxy.cut += 1

    async def forward(self, port: int) -> None:
        tasks: list[asyncio.Task[object]] = []
        try:
            answers, upstream = await asyncio.open_connection("127.0.0.1", port)
            self._writers.append(upstream)
            for way in (self._requests(upstream), self._answers(answers), self._is_cut.wait()):
                tasks.append(asyncio.create_task(way))
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for writer in self._writers:
                self._end(writer)

    def _end(self, writer: asyncio.StreamWriter) -> None:
        if not self._is_cut.is_set():
            return writer.close()
        with suppress(OSError):  # it may be closed already
            at_once = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        writer.transport.abort()

    async def _requests(self, upstream: asyncio.StreamWriter) -> None:
        while True:
            head = await self._reader.readuntil(b"\r\n\r\n")
            self._left = self._proxy.limit(head)
            upstream.write(head)
            if _UPGRADE.search(head):
                break
            length = _LENGTH.search(head)
            upstream.write(await self._reader.readexactly(int(length[1]) if length else 0))
            await upstream.drain()
        while data := await self._reader.read(65536):
            upstream.write(data)
            await upstream.drain()

    async def _answers(self, answers: asyncio.StreamReader) -> None:
        while data := await answers.read(4096):
            data = self._hinted(data)
            if self._left is not None:
                data = data[: self._left]
                self._left -= len(data)
            self._writers[0].write(data)
            await self._writers[0].drain()
            if self._left == 0:
                return self.reset()

    def _hinted(self, data: bytes) -> bytes:
        """With the `retry:` line as the first piece of the body, if this is the beginning of an event stream."""
        head, end, body = data.partition(b"\r\n\r\n")
        hint = self._proxy.hint
        if not hint or not end or not _EVENTS.match(head):
            return data
        return head + end + b"%x\r\n%b\r\n" % (len(hint), hint) + body


@asynccontextmanager
async def cutting_proxy(url: str, cuts: Iterable[int] = (), *, retry_ms: int | None = None) -> AsyncIterator[Proxy]:
    """A proxy to the server at this URL."""
    proxy = Proxy(int(url.rpartition(":")[2]), cuts, retry_ms)
    await proxy.listen()
    try:
        yield proxy
    finally:
        await proxy.close()
