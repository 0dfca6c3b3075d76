"""Viewers of threads: `watcher` reads one stream, `viewing` those that reconnect over SSE or WebSocket."""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal, cast

import httpx
import msgspec
from websockets.exceptions import InvalidHandshake, WebSocketException

from agent_chat.stores.events import TERMINAL_TYPES
from tests.support.client import Client, Frame, frames
from tests.support.servers import Live
from tests.support.sockets import socket
from tests.support.thread_view import View, status

Door = Literal["sse", "ws"]
DOORS: tuple[Door, ...] = ("sse", "ws")
AGAIN_SECONDS = 0.05
_UNSEEN = {"metadata": {"run": {"status": "in_progress"}}}
_SEES_SECONDS = 30.0
_BREAKS = (httpx.HTTPError, OSError, WebSocketException, TimeoutError)


class Stretch(msgspec.Struct):
    """Positions that were received without a snapshot between them, and the position behind which they begin."""

    after: str
    positions: list[str]


class Watcher:
    """A viewer of one stream: its frames, and the thread that it has put together from them.

    `closed` is set when the stream has ended.
    """

    def __init__(self, view: View | None = None) -> None:
        self.frames: list[Frame] = []
        self.view = view or View()
        self.closed = asyncio.Event()
        self.failure: BaseException | None = None
        self._news = asyncio.Condition()

    def terminals(self) -> list[Frame]:
        return [frame for frame in self.frames if frame.event in TERMINAL_TYPES]

    async def read(self, stream: AsyncIterator[Frame]) -> None:
        async for frame in stream:
            self.take(frame)
            async with self._news:
                self._news.notify_all()
        self.closed.set()

    def take(self, frame: Frame) -> None:
        """Apply a frame."""
        self.frames.append(frame)
        self.view.apply(frame)

    async def ends(self) -> None:
        """Wait for the end of the stream."""
        async with asyncio.timeout(10):
            await self.closed.wait()

    async def sees(self, event: str, fits: Callable[[dict[str, Any]], bool] = lambda data: True) -> Frame:
        """Wait for a frame of that type that fits; the first of them."""

        def found() -> Frame | None:
            return next((frame for frame in self.frames if frame.event == event and fits(frame.data)), None)

        return cast(Frame, await self._until(found))

    async def shows(self, expected: Callable[[View], bool]) -> None:
        """Wait until the thread that it has put together is as expected."""
        await self._until(lambda: expected(self.view))

    async def reads(self, message_id: str, text: str) -> None:
        """Wait until the message contains this text."""
        await self.shows(lambda view: text in view.messages.get(message_id, {}).get("content", ""))

    async def finishes(self, message_id: str) -> dict[str, Any]:
        """Wait until the message is finished; that message."""
        await self.shows(lambda view: status(view.messages.get(message_id, _UNSEEN)) != "in_progress")
        return self.view.messages[message_id]

    async def _until(self, expected: Callable[[], object]) -> object:
        async with asyncio.timeout(_SEES_SECONDS), self._news:
            found = await self._news.wait_for(lambda: self.failure or expected())
        if self.failure:
            raise self.failure
        return found


@asynccontextmanager
async def watcher(live: Live, thread: str, after: str | None = None) -> AsyncIterator[Watcher]:
    """Watch a thread over SSE while the test goes on."""
    watching = Watcher()
    async with live.watching(thread, after) as stream:
        reading = asyncio.create_task(watching.read(stream))
        try:
            if after is None:
                await watching.sees("thread.snapshot")
            yield watching
        finally:
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading


class Viewer(Watcher):
    """A viewer that reconnects, over SSE or WebSocket, from the position that it had.

    `stretches` are the positions that it received, one stretch after each snapshot.

    Args:
        servers: where it connects, in turn.
        after: the position behind which it begins; None for a snapshot.
        view: the thread as far as it knows it already.
    """

    def __init__(
        self, servers: Sequence[Client], thread: str, door: Door, *, after: str | None = None, view: View | None = None
    ) -> None:
        super().__init__(view)
        self.position = after
        self.door = door
        self.stretches = [Stretch(after, [])] if after else list[Stretch]()
        self.connections = 0
        self.snapshots = 0
        self._servers = list(servers)
        self._thread = thread
        self._reading: asyncio.Task[None] | None = None

    def branch(self, servers: Sequence[Client], door: Door) -> Viewer:
        """Another viewer that continues from this position."""
        return Viewer(servers, self._thread, door, after=self.position, view=copy.deepcopy(self.view))

    async def follow(self) -> None:
        """Connect again and again, until the thread is deleted or a frame is received that is not allowed."""
        while not self.view.deleted:
            server = self._servers[self.connections % len(self._servers)]
            self.connections += 1
            self._reading = asyncio.create_task(self._read(server))
            await asyncio.wait({self._reading})
            error = None if self._reading.cancelled() else self._reading.exception()
            if error and not isinstance(error, _BREAKS):
                self.failure = error
                async with self._news:
                    self._news.notify_all()
                return
            await asyncio.sleep(AGAIN_SECONDS)

    def cut(self) -> None:
        """Close the connection and reconnect to the next server."""
        if self._reading:
            self._reading.cancel()

    async def _read(self, server: Client) -> None:
        reading = self._sse(server) if self.door == "sse" else self._ws(server)
        async with contextlib.aclosing(reading):
            await self.read(reading)

    async def _sse(self, server: Client) -> AsyncGenerator[Frame, None]:
        headers = {"Last-Event-ID": self.position} if self.position else {}
        async with server.http.stream("GET", f"{self._thread}/events", headers=headers) as response:
            if response.status_code == 503:
                return
            assert response.status_code == 200, await response.aread()
            async for frame in frames(response):
                yield frame

    async def _ws(self, server: Client) -> AsyncGenerator[Frame, None]:
        with contextlib.suppress(InvalidHandshake):
            async with socket(str(server.http.base_url).rstrip("/"), self._thread, after=self.position) as connection:
                while True:
                    data = await connection.receive()
                    position = data.pop("position", None)
                    if position is not None:
                        yield Frame(b"", data["type"], data, position)

    def take(self, frame: Frame) -> None:
        """Apply a frame and remember its position; fails on a frame that was received before."""
        super().take(frame)
        if frame.event == "thread.snapshot":
            self.snapshots += 1
            self.stretches.append(Stretch(frame.id, []))
        elif frame.id != self.position:
            self.stretches[-1].positions.append(frame.id)
        else:
            assert self.frames[-2].event == "thread.snapshot", f"{frame.event} was received twice"
        self.position = frame.id


@asynccontextmanager
async def viewing(*viewers: Viewer) -> AsyncIterator[None]:
    """Let them follow while the test goes on; each has received its snapshot. Raises the first of their failures."""
    following = [asyncio.create_task(viewer.follow()) for viewer in viewers]
    try:
        for viewer in viewers:
            if viewer.position is None:
                await viewer.sees("thread.snapshot")
        yield
    finally:
        for viewer, task in zip(viewers, following, strict=True):
            task.cancel()
            viewer.cut()
        await asyncio.wait(following)
    for viewer in viewers:
        if viewer.failure:
            raise viewer.failure
