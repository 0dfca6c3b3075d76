"""Viewers that come back: over SSE or WebSocket, to whichever server takes them, at the position that they had."""

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

from tests.support.client import Client, Frame, frames
from tests.support.sockets import socket
from tests.support.thread_view import View, status

Door = Literal["sse", "ws"]
DOORS: tuple[Door, ...] = ("sse", "ws")
AGAIN_SECONDS = 0.05
_UNSEEN = {"metadata": {"run": {"status": "in_progress"}}}
SEES_SECONDS = 30.0
_BREAKS = (httpx.HTTPError, OSError, WebSocketException, TimeoutError)


class Stretch(msgspec.Struct):
    """Positions that were told without a snapshot between them, and the one that they follow."""

    after: str
    positions: list[str]


class Viewer:
    """One viewer of a thread, from its first connection to its last.

    Args:
        servers: where it connects, one after the other.
        after: the position that it begins behind; null for a snapshot.
        view: what it has made of everything before.
    """

    def __init__(
        self, servers: Sequence[Client], thread: str, door: Door, *, after: str | None = None, view: View | None = None
    ) -> None:
        self.position = after
        self.door = door
        self.view = view or View()
        self.frames: list[Frame] = []
        self.stretches = [Stretch(after, [])] if after else list[Stretch]()
        self.connections = 0
        self.snapshots = 0
        self.failure: BaseException | None = None
        self._servers = list(servers)
        self._thread = thread
        self._news = asyncio.Condition()
        self._reading: asyncio.Task[None] | None = None

    def branch(self, servers: Sequence[Client], door: Door) -> Viewer:
        """Another viewer, which goes on from here."""
        return Viewer(servers, self._thread, door, after=self.position, view=copy.deepcopy(self.view))

    async def follow(self) -> None:
        """Connect again and again, until the thread is deleted or something is told that may not be."""
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
        """Leave without a word, and come back elsewhere."""
        if self._reading:
            self._reading.cancel()

    async def _read(self, server: Client) -> None:
        reading = self._sse(server) if self.door == "sse" else self._ws(server)
        async with contextlib.aclosing(reading):
            async for frame in reading:
                self.take(frame)
                async with self._news:
                    self._news.notify_all()

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
        """Apply a frame, and keep where it stands."""
        self.frames.append(frame)
        if frame.event == "thread.snapshot":
            self.snapshots += 1
            self.stretches.append(Stretch(frame.id, []))
        elif frame.id != self.position:
            self.stretches[-1].positions.append(frame.id)
        else:
            assert self.frames[-2].event == "thread.snapshot", f"{frame.event} was told twice"
        self.view.apply(frame)
        self.position = frame.id

    async def sees(self, event: str, fits: Callable[[dict[str, Any]], bool] = lambda data: True) -> Frame:
        """The first frame of that type that fits, waiting for it."""

        def found() -> Frame | None:
            return next((frame for frame in self.frames if frame.event == event and fits(frame.data)), None)

        return cast(Frame, await self._until(found))

    async def shows(self, so: Callable[[View], bool]) -> None:
        """Wait until it sees the thread so."""
        await self._until(lambda: so(self.view))

    async def reads(self, message_id: str, text: str) -> None:
        """Wait until it has put this much of the message together."""
        await self.shows(lambda view: text in view.messages.get(message_id, {}).get("content", ""))

    async def ends(self, message_id: str) -> dict[str, Any]:
        """Wait until it sees the message finished; that message."""
        await self.shows(lambda view: status(view.messages.get(message_id, _UNSEEN)) != "in_progress")
        return self.view.messages[message_id]

    async def _until(self, so: Callable[[], object]) -> object:
        async with asyncio.timeout(SEES_SECONDS), self._news:
            found = await self._news.wait_for(lambda: self.failure or so())
        if self.failure:
            raise self.failure
        return found


@asynccontextmanager
async def viewing(*viewers: Viewer) -> AsyncIterator[None]:
    """Have them follow beside the test, each with its first words behind it."""
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
