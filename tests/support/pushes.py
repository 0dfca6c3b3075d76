"""A proxy between servers and Redis that knows its protocol: it drops and doubles whole messages of pub/sub.

Commands and their answers pass as they are, so that to a server the connection is sound: nobody is told of the loss.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_MESSAGE = b"*3\r\n$7\r\nmessage\r\n"


class Pushes:
    """Which messages arrive.

    `chance`: how likely each is not handed on once, but never or twice.
    """

    def __init__(self, port: int, rng: random.Random) -> None:
        self.chance = 0.0
        self.passed = self.dropped = self.doubled = 0
        self.url = ""
        self._port = port
        self._rng = rng
        self._serving: set[asyncio.Task[None]] = set()

    def accept(self, client: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(client, back))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, client: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        server, onward = await asyncio.open_connection("127.0.0.1", self._port)
        ways = {asyncio.create_task(_copy(client, onward)), asyncio.create_task(self._answer(server, back))}
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            for end in (onward, back):
                end.close()

    async def _answer(self, server: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                reply = await _reply(server)
                back.write(reply * self._times() if reply.startswith(_MESSAGE) else reply)
                await back.drain()

    def _times(self) -> int:
        """How often the next message is handed on."""
        if self._rng.random() >= self.chance:
            self.passed += 1
            return 1
        if self._rng.random() < 0.5:
            self.dropped += 1
            return 0
        self.doubled += 1
        return 2

    async def close(self) -> None:
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()


async def _reply(server: asyncio.StreamReader) -> bytes:
    """One whole reply of RESP2, as it came: https://redis.io/docs/latest/develop/reference/protocol-spec/."""
    head = await server.readuntil(b"\r\n")
    size = int(head[1:]) if head[:1] in b"$*" else -1
    if size < 0:
        return head
    if head[:1] == b"$":
        return head + await server.readexactly(size + 2)
    return head + b"".join([await _reply(server) for _ in range(size)])


@asynccontextmanager
async def pushes_through(port: int, rng: random.Random) -> AsyncIterator[Pushes]:
    """A proxy to the Redis on that port."""
    pushes = Pushes(port, rng)
    listening = await asyncio.start_server(pushes.accept, "127.0.0.1", 0)
    pushes.url = f"redis://127.0.0.1:{listening.sockets[0].getsockname()[1]}/0"
    try:
        yield pushes
    finally:
        listening.close()
        await pushes.close()
