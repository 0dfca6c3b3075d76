"""How much one organization may ask of one process: generous, there so that one runaway client can't starve the rest.

Counted per process on purpose: a shared counter would put a round trip before every request. What is limited in
number is reserved before anything is awaited, and released on every way out (`Slots`): a limit that is checked first
and counted later lets everybody through who comes in between.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec

from agent_chat.server.errors import RETRY_SECONDS, RateLimited


class Limits(msgspec.Struct, frozen=True):
    """Per organization and process: requests a minute; runs, open streams and uploads at once.

    `loop_target`: the fraction of the event loop's time up to which an organization may take what others leave while
    they are served. It may always take `loop_share`, and `loop_burst` seconds ahead of that, enough to start twenty
    runs at the same time. `waiting`: requests that may wait because the organization took more.

    In all: `stored_bytes`; None takes it from the settings.

    `ping_seconds`: how often an open stream is pinged, and how long it may outlive its key. `auth_failures`: wrong
    keys of one address in a minute; further ones are refused `auth_delay_seconds` late. `lookup_seconds`: how long the
    lookup of a key or a session is used. `key_hold_seconds`: after how long a CHAT_API_KEY that no process of a shared
    database has is revoked.
    """

    requests: int = 6000
    runs: int = 200
    streams: int = 2000
    uploads: int = 20
    loop_share: float = 0.2
    loop_target: float = 0.5
    loop_burst: float = 0.5
    waiting: int = 200
    stored_bytes: int | None = None
    ping_seconds: float = 15.0
    auth_failures: int = 20
    auth_delay_seconds: float = 1.0
    lookup_seconds: float = 3.0
    key_hold_seconds: float = 60.0


class Slot:
    """One reserved slot. Releasing it again does nothing."""

    def __init__(self, reserved: Counter[str], organization_id: str) -> None:
        self._reserved = reserved
        self._organization_id = organization_id
        self._released = False

    def release(self) -> None:
        """Release the slot."""
        if not self._released:
            self._released = True
            self._reserved[self._organization_id] -= 1
            if not self._reserved[self._organization_id]:
                del self._reserved[self._organization_id]


class Slots:
    """What each organization may have a limited number of at once in this process.

    Args:
        noun: what is limited, for the sentence that clients get.
        limit: how many one organization may have.
    """

    def __init__(self, noun: str, limit: int) -> None:
        self._noun = noun
        self._limit = limit
        self._reserved: Counter[str] = Counter()

    def count_of(self, organization_id: str) -> int:
        """Return how many slots this organization has reserved."""
        return self._reserved[organization_id]

    def check(self, organization_id: str) -> None:
        """Raises: RateLimited if no slot is free. Reserves nothing: only for refusing early."""
        if self._reserved[organization_id] >= self._limit:
            raise RateLimited(self._noun, self._limit, RETRY_SECONDS)

    def reserve(self, organization_id: str) -> Slot:
        """Reserve a slot; the caller releases it. Raises: RateLimited if none is free."""
        self.check(organization_id)
        self._reserved[organization_id] += 1
        return Slot(self._reserved, organization_id)

    @contextmanager
    def starting(self, organization_id: str) -> Iterator[Slot]:
        """Reserve a slot for what the block starts: released here only if the block raises.

        After the block whatever it started holds the slot and releases it at its own end.
        """
        slot = self.reserve(organization_id)
        try:
            yield slot
        except BaseException:
            slot.release()
            raise


class RequestRate:
    """Counts the requests of each organization in the current minute; a WebSocket's frames are requests too.

    The library `limits` was refused: its counters in memory start a thread for each request.
    """

    def __init__(self, limits: Limits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limits.requests
        self._clock = clock
        self._minute_end = -math.inf
        self._counts: Counter[str] = Counter()

    def count(self, organization_id: str) -> None:
        """Raises: RateLimited, with the seconds until the next minute."""
        now = self._clock()
        if now >= self._minute_end:
            self._minute_end = now + 60
            self._counts.clear()
        self._counts[organization_id] += 1
        if self._counts[organization_id] > self._limit:
            raise RateLimited("requests a minute", self._limit, math.ceil(self._minute_end - now))
