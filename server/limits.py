"""How much one organization may ask of one process: generous, there so that one runaway client can't starve the rest.

Kept per process on purpose: a shared counter would put a round trip before every request.
"""

from __future__ import annotations

import time

import msgspec
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter

from server.errors import RateLimited


class Limits(msgspec.Struct, frozen=True):
    """Per organization and process: requests a minute, runs and open streams at once; in all: bytes of attachments.

    `ping_seconds`: how often an open stream is pinged, and how long it may outlive its key.
    """

    requests: int = 6000
    runs: int = 200
    streams: int = 2000
    kept_bytes: int = 10 * 2**30
    ping_seconds: float = 15.0


class RequestRate:
    """Counts the requests of each organization in the current minute; a WebSocket's frames are requests too."""

    def __init__(self, limits: Limits) -> None:
        self._item = RateLimitItemPerMinute(limits.requests)
        self._limiter = FixedWindowRateLimiter(MemoryStorage())

    def count(self, organization_id: str) -> None:
        """Raises: RateLimited, with the seconds until the next minute."""
        if not self._limiter.hit(self._item, organization_id):
            reset = self._limiter.get_window_stats(self._item, organization_id).reset_time
            raise RateLimited("requests a minute", self._item.amount, max(1, round(reset - time.time())))
