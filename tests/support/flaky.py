"""Ways to break the connection between a RedisLog and Redis: a proxy that cuts it, pub/sub that loses and doubles."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from agent_chat.stores.redis.log import RedisLog


class Proxy:
    """Hands bytes on in both directions, until it is told to cut.

    `chance`: how likely each piece, of a question or of an answer, is swallowed together with its connection: a
    swallowed question was never carried out, a swallowed answer belongs to a question that was.
    """

    def __init__(self, port: int, chance: random.Random) -> None:
        self.chance = 0.0
        self.cuts = 0
        self.swallow_answers = 0
        self._port = port
        self._random = chance
        self._open: set[asyncio.StreamWriter] = set()
        self.url = ""

    async def serve(self, client: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        server, onward = await asyncio.open_connection("127.0.0.1", self._port)
        pair = {back, onward}
        self._open |= pair
        tasks = {asyncio.create_task(self._pump(client, onward, answers=False))}
        tasks.add(asyncio.create_task(self._pump(server, back, answers=True)))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            self._open -= pair
            for writer in pair:
                writer.close()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, answers: bool) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            while data := await source.read(65536):
                if answers and self.swallow_answers and b"SCRIPT" not in data:
                    self.swallow_answers -= 1
                    self.cuts += 1
                    return
                if self._random.random() < self.chance:
                    self.cuts += 1
                    return
                sink.write(data)
                await sink.drain()

    def cut_all(self) -> None:
        for writer in self._open:
            writer.close()


@asynccontextmanager
async def proxy_to(port: int, chance: random.Random) -> AsyncIterator[Proxy]:
    """A proxy in front of the Redis on that port."""
    proxy = Proxy(port, chance)
    serving: set[asyncio.Task[None]] = set()

    def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.ensure_future(proxy.serve(reader, writer)))

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    proxy.url = f"redis://127.0.0.1:{listening.sockets[0].getsockname()[1]}/0"
    try:
        yield proxy
    finally:
        listening.close()
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)


class FlakyLog(RedisLog):
    """A RedisLog whose pub/sub messages are, while `chance` is above nought, dropped, doubled, and held back."""

    chance = 0.0
    dropped = doubled = held = 0

    def __init__(self, url: str, *, prefix: str, random: random.Random) -> None:
        self._random = random
        self._held: list[tuple[bytes, bytes]] = []
        super().__init__(url, prefix=prefix)

    def _heard(self, channel: bytes, payload: bytes) -> None:
        if self._random.random() >= self.chance:
            super()._heard(channel, payload)
        else:
            match self._random.randrange(3):
                case 0:
                    self.dropped += 1
                case 1:
                    self.doubled += 1
                    super()._heard(channel, payload)
                    super()._heard(channel, payload)
                case _:
                    self.held += 1
                    self._held.append((channel, payload))
                    return
        while self._held:
            super()._heard(*self._held.pop())
