"""Failed authentications, counted per address and minute, and logged as security events.

Keys are long and random, so this is no defence of a key: it bounds what a client with wrong keys costs in log lines,
and tells its owner to stop. A valid key from the same address keeps working: addresses are shared.
"""

from __future__ import annotations

import ipaddress
import logging
import time
from collections.abc import Callable

import msgspec

_SECONDS = 60.0
_ADDRESSES = 10_000

logger = logging.getLogger("chat.security")


class _Window(msgspec.Struct):
    started: float
    count: int = 0


class AuthFailures:
    """Counters in bounded memory: beyond 10,000 addresses the one that failed first is dropped.

    `total`: all failures of this process.
    """

    def __init__(self, per_minute: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = 0
        self._per_minute = per_minute
        self._clock = clock
        self._windows: dict[str, _Window] = {}

    def __len__(self) -> int:
        return len(self._windows)

    def record(self, address: str, credential: str) -> float:
        """Count a failure; the seconds until the address is below the limit again, 0 if it is.

        Args:
            credential: what was wrong, `key` or `session`; for the log.
        """
        self.total += 1
        network, now = _network(address), self._clock()
        window = self._windows.get(network)
        if window is None or now >= window.started + _SECONDS:
            self._windows.pop(network, None)
            if len(self._windows) >= _ADDRESSES:
                del self._windows[next(iter(self._windows))]
            window = self._windows[network] = _Window(now)
        window.count += 1
        wait = window.started + _SECONDS - now
        if window.count <= self._per_minute:
            logger.warning("authentication failed", extra={"address": address, "credential": credential})
            return 0.0
        if window.count == self._per_minute + 1:
            facts = {"address": address, "credential": credential, "seconds": round(wait)}
            logger.warning("authentication failed too often; further failures are not logged", extra=facts)
        return wait


def _network(address: str) -> str:
    """What one client has: an IPv4 address, or an IPv6 network of 64 bits."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address[:64]
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(parsed.ipv4_mapped or ipaddress.ip_network((int(parsed) >> 64 << 64, 64)))
    return address
