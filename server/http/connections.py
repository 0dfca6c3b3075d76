"""Limits on connections: bytes of request heads, seconds in one state, and their number in this process.

uvicorn with httptools has no such limits: it buffers 200 MB of headers and never closes a slow or an idle socket.
`protocol` and `websocket_protocol` are uvicorn's protocols with limits on bytes; this module has the limits on time.
Once a second it reads each connection's state, and closes a connection whose state has not changed for too long. A
timer per connection was refused: every request would pay for it.

When the limit on their number is reached, the connection that has been without a request the longest is closed in favor
of the new one. If every connection has a request, new ones get a 503 and are closed; health checks are still served.
"""

from __future__ import annotations

import asyncio
import resource
from collections import Counter
from collections.abc import Collection
from typing import Protocol

import msgspec

from agent_chat.server.http.websocket_protocol import Slices

State = tuple[str, int]
"""What a connection is doing, and a number that changes with its progress."""

DEFAULT_COUNT = 10_000
SPARE = 100
"""How many connections above the limit are accepted, to send them a 503 or to serve a health check."""
_CHECK_SECONDS = 1.0
_CHECKS_PER_TURN = 200
_EVICTABLE_STATES = ("idle", "head")


class ConnectionLimits(msgspec.Struct, frozen=True):
    """The limits of connections.

    Attributes:
        count: how many there may be in this process.
        head_bytes: the size of a request's head.
        head_seconds: the time to receive a request's head.
        idle_seconds: the time without a request; more than the 60 s after which nginx closes its connections.
        body_bytes: how much of a body must arrive in each `body_seconds`.
        send_seconds: the time in which the client must read something of a response.
        linger_seconds: the time to receive the rest of a body after the response.
        close_seconds: the time for the client to close its side.
        pipelined: how many requests a client may send before the response to the first one.
    """

    count: int = DEFAULT_COUNT
    head_bytes: int = 64 * 2**10
    head_seconds: float = 10.0
    idle_seconds: float = 75.0
    body_bytes: int = 16 * 2**10
    body_seconds: float = 60.0
    send_seconds: float = 75.0
    linger_seconds: float = 30.0
    close_seconds: float = 10.0
    pipelined: int = 16


class Connection(Protocol):
    """What `Connections` uses of a protocol.

    Attributes:
        state_seen: the state at the last check; only `Connections` sets it.
        state_since: the time on the event loop's clock since when the state has been the same.
    """

    state_seen: State
    state_since: float

    def state(self) -> State:
        """What the connection is doing, and a number that changes while it makes progress."""
        ...

    def expire(self, name: str) -> None:
        """Close the connection, because the state of this name has lasted too long."""
        ...

    def abort(self) -> None:
        """Close without waiting for the client."""
        ...


class Connections:
    """The open connections of one server.

    Attributes:
        limits: see ConnectionLimits.
        refused: how many connections were refused since the start because there were too many.
        malformed: how many requests were refused since the start as invalid, too large or too slow.
        expired: how many connections were closed since the start, by the state that lasted too long.
        slices: the time slices in which WebSockets parse their input.
    """

    def __init__(self, limits: ConnectionLimits, opened: Collection[Connection]) -> None:
        self.limits = limits
        self.refused = 0
        self.malformed = 0
        self.expired: Counter[str] = Counter()
        self.slices = Slices()
        self._open = opened
        self._evictable: list[Connection] = []
        self._seconds = {
            "idle": limits.idle_seconds,
            "head": limits.head_seconds,
            "body": limits.body_seconds,
            "sending": limits.send_seconds,
            "lingering": limits.linger_seconds,
            "closing": limits.close_seconds,
        }

    def __len__(self) -> int:
        return len(self._open)

    def admit(self, connection: Connection) -> bool:
        """Return whether there is room for a new connection, which is among the open ones already."""
        over = len(self._open) - self.limits.count
        if over <= 0 or self._make_room():
            return True
        self.refused += 1
        if over > SPARE:
            connection.abort()
        return False

    def _make_room(self) -> bool:
        while self._evictable:
            connection = self._evictable.pop()
            if connection in self._open and connection.state()[0] in _EVICTABLE_STATES:
                self.expired["evicted"] += 1
                connection.abort()
                return True
        return False

    def abort_stalled(self) -> None:
        """Abort the connections whose clients do not read, when the server stops."""
        for connection in list(self._open):
            if connection.state()[0] in ("sending", "closing"):
                connection.abort()

    async def check_forever(self) -> None:
        """Check all connections once a second."""
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            await self.check()

    async def check(self) -> None:
        """Close the connections that have been in one state for too long."""
        now = asyncio.get_running_loop().time()
        evictable: list[Connection] = []
        for n, connection in enumerate(list(self._open), 1):
            if n % _CHECKS_PER_TURN == 0:
                await asyncio.sleep(0)
            state = connection.state()
            if state != connection.state_seen:
                connection.state_seen, connection.state_since = state, now
            elif now - connection.state_since >= self._seconds.get(state[0], float("inf")) - _CHECK_SECONDS:
                self.expired[state[0]] += 1
                connection.state_since = now
                connection.expire(state[0])
            if state[0] in _EVICTABLE_STATES:
                evictable.append(connection)
        evictable.sort(key=lambda connection: connection.state_since, reverse=True)
        self._evictable = evictable


def raise_file_limit() -> int:
    """Raise this process's limit of open files to the maximum that the system allows. Returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):  # macOS refuses "unlimited"
            return soft
    return hard if hard != resource.RLIM_INFINITY else 2**20


def connections_for(files: int, wanted: int | None) -> int:
    """Return the limit of connections for a limit of open files, of which a quarter is reserved for everything else.

    Args:
        wanted: the configured number of connections; None for the default.

    Raises:
        ValueError: `wanted` is more than the open files allow.
    """
    most = files * 3 // 4
    if wanted is not None and wanted > most:
        raise ValueError(f"{wanted} is more than the {most} that a limit of {files} open files leaves for connections")
    return wanted or min(DEFAULT_COUNT, most)
