"""The open event streams of this process, SSE and WebSocket alike: one ping wheel, one place to close them all.

A stream is never written to from outside: it is woken, and its own pump sees what is due. A timer per stream was
refused: with thousands of idle viewers it is most of what the process does.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from server.viewer import Viewer
from stores.models import Principal

PING_SECONDS = 15.0


class Stream:
    """One open stream. Its pump looks at `ping_due`, `gone` and `Streams.closing` whenever it wakes."""

    def __init__(self, viewer: Viewer) -> None:
        self.viewer = viewer
        self.ping_due = False
        self.gone = False

    def leave(self) -> None:
        """The client went away."""
        self.gone = True
        self.viewer.wake()

    def ping(self) -> bool:
        """True once for each turn of the wheel."""
        due, self.ping_due = self.ping_due, False
        return due


class Streams:
    """Every open stream.

    Args:
        limit: how many one organization may have open here.
    """

    def __init__(self, limit: int) -> None:
        self.closing = False
        self._limit = limit
        self._open: set[Stream] = set()
        self._of: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._open)

    def full(self, who: Principal) -> bool:
        """True if the organization has as many open streams here as it may have."""
        return self._of[who.organization_id] >= self._limit

    @contextmanager
    def open(self, viewer: Viewer) -> Iterator[Stream]:
        """Count a stream for as long as it is open, then close its viewer."""
        stream = Stream(viewer)
        self._open.add(stream)
        self._of[viewer.who.organization_id] += 1
        if self.closing:
            viewer.wake()
        try:
            yield stream
        finally:
            self._open.discard(stream)
            self._of[viewer.who.organization_id] -= 1
            viewer.close()

    def close(self) -> None:
        """Have every stream say goodbye: the server stops."""
        self.closing = True
        for stream in self._open:
            stream.viewer.wake()

    async def ping_forever(self) -> None:
        while True:
            await asyncio.sleep(PING_SECONDS)
            for stream in self._open:
                stream.ping_due = True
                stream.viewer.wake()
