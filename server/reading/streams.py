"""The open event streams of this process, SSE and WebSocket alike: one timer for all pings, one place to close them.

A stream is never written to from outside: it is woken, and its own pump checks what is due. A timer per stream was
refused: with thousands of idle viewers it would be most of what the process does. With each ping the keys of the open
streams are checked again, so that a revoked one stops reading.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

from agent_chat.server.limits import Limits, Slot, Slots
from agent_chat.server.principals import Credential, Principals
from agent_chat.server.reading.viewer import Viewer
from agent_chat.server.timing import Timing
from agent_chat.stores.errors import StoreUnavailable
from agent_chat.stores.models import Principal


class Stream:
    """One open stream. Its pump checks these attributes, and `Streams.closing`, whenever its viewer wakes.

    Attributes:
        viewer: reads the log for this stream.
        credential: what it was opened with.
        ping_due: set at each ping interval; cleared by `ping`, which the pump calls.
        gone: True once the client has disconnected; the pump writes nothing more.
        revoked: True once the credential is no longer valid; the pump ends the stream.
    """

    def __init__(self, viewer: Viewer, credential: Credential) -> None:
        self.viewer = viewer
        self.credential = credential
        self.ping_due = False
        self.gone = False
        self.revoked = False

    def leave(self) -> None:
        """Report that the client has disconnected."""
        self.gone = True
        self.viewer.wake()

    def revoke(self) -> None:
        """Report that the credential is no longer valid."""
        self.revoked = True
        self.viewer.wake()

    def ping(self) -> bool:
        """True once in each ping interval."""
        due, self.ping_due = self.ping_due, False
        return due


class Streams:
    """Every open stream, and how many of them one organization may have here.

    Attributes:
        closing: True once the server stops: every stream sends a retry hint and ends.
        slots: reserved before a stream is opened, released when it is closed.
    """

    def __init__(self, limits: Limits, timing: Timing = Timing()) -> None:
        self.closing = False
        self.slots = Slots("open streams", limits.streams)
        self._timing = timing
        self._open: set[Stream] = set()

    def __len__(self) -> int:
        return len(self._open)

    def starting(self, principal: Principal) -> AbstractContextManager[Slot]:
        """Reserve a slot for the stream that the block starts; released here only if the block raises.

        Raises: RateLimited if the organization has as many open streams here as it may have.
        """
        return self.slots.starting(principal.organization_id)

    @contextmanager
    def open(self, viewer: Viewer, credential: Credential, slot: Slot) -> Iterator[Stream]:
        """Hold a stream while the block runs, then close its viewer and release its slot.

        Args:
            credential: what the stream was opened with.
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
        """End every stream, the present ones and those that are opened from now on: the server stops."""
        self.closing = True
        for stream in self._open:
            stream.viewer.wake()

    async def ping_forever(self) -> None:
        """Make a ping due on every stream at each interval."""
        while True:
            await asyncio.sleep(self._timing.ping)
            for stream in self._open:
                stream.ping_due = True
                stream.viewer.wake()

    async def check_keys_forever(self, principals: Principals) -> None:
        """End the streams whose key was revoked or whose session has ended.

        Separate from the pings, so that a slow database does not delay those.
        """
        while True:
            await asyncio.sleep(self._timing.ping)
            with suppress(StoreUnavailable):  # an outage ends no stream
                await self._check_keys(principals)

    async def _check_keys(self, principals: Principals) -> None:
        for credential, principal in {(stream.credential, stream.viewer.principal) for stream in self._open}:
            if await principals.check(credential) != principal:
                for stream in self._open:
                    if stream.credential == credential:
                        stream.revoke()
