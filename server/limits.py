"""Limits for one organization in one process: generous, so that only a runaway client meets them.

They are counted per process: a shared counter would add a round trip to every request. What is limited in number is
reserved before anything is awaited, and released on every way out (`Slots`): a limit that is checked first and counted
later admits every request that comes in between.
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
    """What one organization may have or send, counted by each process.

    Attributes:
        requests: in each minute; a WebSocket's frames count as requests.
        runs: at the same time.
        streams: open at the same time.
        uploads: at the same time.
        loop_share: the fraction of the event loop's time that it may always take while others are served.
        loop_target: the fraction up to which it may take what the others leave while they are served.
        loop_burst: the seconds that it may take ahead of its share: enough to start twenty runs at the same time.
        waiting: requests that may wait because the organization has exceeded its share.
        stored_bytes: in all; None takes it from the settings.
        auth_failures: wrong keys of one address in a minute; further ones are refused late.
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
    auth_failures: int = 20


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
    """A limited number of something for each organization, at the same time, in this process.

    Args:
        noun: what is limited, for the error sentence.
        limit: how many one organization may have.
    """

    def __init__(self, noun: str, limit: int) -> None:
        self._noun = noun
        self._limit = limit
        self._reserved: Counter[str] = Counter()

    def count_of(self, organization_id: str) -> int:
        """How many slots are reserved."""
        return self._reserved[organization_id]

    def check(self, organization_id: str) -> None:
        """Check without reserving, to refuse early. Raises: RateLimited if no slot is free."""
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

        After the block, what it started holds the slot and releases it at its own end.
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
        """Count one request. Raises: RateLimited, with the seconds until the next minute."""
        now = self._clock()
        if now >= self._minute_end:
            self._minute_end = now + 60
            self._counts.clear()
        self._counts[organization_id] += 1
        if self._counts[organization_id] > self._limit:
            raise RateLimited("requests a minute", self._limit, math.ceil(self._minute_end - now))
