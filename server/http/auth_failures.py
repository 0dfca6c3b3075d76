"""Failed authentications, counted per address and minute, and logged as security events.

Keys are long and random, so they need no protection against guessing. The count limits the log lines that a client with
invalid keys causes, and the 429 shows its owner that something is wrong. Valid keys from the same address are not
affected, because clients share addresses.
"""

from __future__ import annotations

import ipaddress
import logging
import time
from collections.abc import Callable

import msgspec

_WINDOW_SECONDS = 60.0
_MAX_ADDRESSES = 10_000

logger = logging.getLogger("chat.security")


class _Window(msgspec.Struct):
    started: float
    count: int = 0


class AuthFailures:
    """Counters in bounded memory: above 10,000 addresses the one with the oldest failure is dropped.

    Attributes:
        total: the number of failures in this process.
    """

    def __init__(self, per_minute: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = 0
        self._per_minute = per_minute
        self._clock = clock
        self._windows: dict[str, _Window] = {}

    def __len__(self) -> int:
        return len(self._windows)

    def record(self, address: str, credential: str) -> float:
        """Count a failure. Returns the seconds until the address is below the limit again; 0 if it is below.

        Args:
            credential: the kind of the invalid credential, `key` or `session`, for the log.
        """
        self.total += 1
        network, now = _network(address), self._clock()
        window = self._windows.get(network)
        if window is None or now >= window.started + _WINDOW_SECONDS:
            self._windows.pop(network, None)
            if len(self._windows) >= _MAX_ADDRESSES:
                del self._windows[next(iter(self._windows))]
            window = self._windows[network] = _Window(now)
        window.count += 1
        wait = window.started + _WINDOW_SECONDS - now
        if window.count <= self._per_minute:
            logger.warning("authentication failed", extra={"address": address, "credential": credential})
            return 0.0
        if window.count == self._per_minute + 1:
            facts = {"address": address, "credential": credential, "seconds": round(wait)}
            logger.warning("authentication failed too often; further failures are not logged", extra=facts)
        return wait


def _network(address: str) -> str:
    """Return what one client controls: an IPv4 address or an IPv6 network of 64 bits."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address[:64]
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(parsed.ipv4_mapped or ipaddress.ip_network((int(parsed) >> 64 << 64, 64)))
    return address
