"""The open event streams of this process, SSE and WebSocket alike: one ping wheel, one place to close them all.

A stream is never written to from outside: it is woken, and its own pump sees what is due. A timer per stream was
refused: with thousands of idle viewers it is most of what the process does. At every turn of the wheel the keys of
the open streams are looked at again, so that a revoked one stops reading.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

from agent_chat.server.limits import Limits, Slot, Slots
from agent_chat.server.principals import Credential, Principals
from agent_chat.server.reading.viewer import Viewer
from agent_chat.stores.errors import StoreUnavailable
from agent_chat.stores.models import Principal


class Stream:
    """One open stream. Its pump looks at `ping_due`, `gone`, `revoked` and `Streams.closing` whenever it wakes."""

    def __init__(self, viewer: Viewer, credential: Credential) -> None:
        self.viewer = viewer
        self.credential = credential
        self.ping_due = False
        self.gone = False
        self.revoked = False

    def leave(self) -> None:
        """The client went away."""
        self.gone = True
        self.viewer.wake()

    def revoke(self) -> None:
        """Its key is valid no more."""
        self.revoked = True
        self.viewer.wake()

    def ping(self) -> bool:
        """True once for each turn of the wheel."""
        due, self.ping_due = self.ping_due, False
        return due


class Streams:
    """Every open stream, and how many of them one organization may have here."""

    def __init__(self, limits: Limits) -> None:
        self.closing = False
        self.slots = Slots("open streams", limits.streams)
        self._ping_seconds = limits.ping_seconds
        self._open: set[Stream] = set()

    def __len__(self) -> int:
        return len(self._open)

    def starting(self, who: Principal) -> AbstractContextManager[Slot]:
        """Reserve a slot for the stream that the block starts; released here only if the block raises.

        Raises: RateLimited if the organization has as many open streams here as it may have.
        """
        return self.slots.starting(who.organization_id)

    @contextmanager
    def open(self, viewer: Viewer, credential: Credential, slot: Slot) -> Iterator[Stream]:
        """Hold a stream for as long as it is open, then close its viewer and release its slot.

        `credential`: what it was opened with.
        """
        stream = Stream(viewer, credential)
        self._open.add(stream)
        if self.closing:
            viewer.wake()
        try:
            yield stream
        finally:
            self._open.discard(stream)
            slot.release()
            viewer.close()

    def close(self) -> None:
        """Have every stream say goodbye: the server stops."""
        self.closing = True
        for stream in self._open:
            stream.viewer.wake()

    async def ping_forever(self) -> None:
        """Ping all open streams at the interval of the limits."""
        while True:
            await asyncio.sleep(self._ping_seconds)
            for stream in self._open:
                stream.ping_due = True
                stream.viewer.wake()

    async def check_keys_forever(self, principals: Principals) -> None:
        """End the streams whose key was revoked or whose session ended.

        Separate from the pings, so that a slow database does not delay those.
        """
        while True:
            await asyncio.sleep(self._ping_seconds)
            with suppress(StoreUnavailable):  # that ends nobody's stream
                await self._check_keys(principals)

    async def _check_keys(self, principals: Principals) -> None:
        for credential, who in {(stream.credential, stream.viewer.who) for stream in self._open}:
            if await principals.check(credential) != who:
                for stream in self._open:
                    if stream.credential == credential:
                        stream.revoke()
