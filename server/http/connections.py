"""What all connections of a process together, and each of them alone, may take: heads, seconds, descriptors.

uvicorn with httptools bounds none of it: 200 MB of headers are buffered, a slow head or an idle socket stays for ever.
`http_protocol` and `websocket_protocol` are uvicorn's protocols with bounds on bytes; the seconds are kept here. Every
second each connection is asked for its state; one whose state has not changed for too long is closed. A timer per
connection was refused: it costs each request, and an attack consists of connections.

When the process is full, the connection that has waited longest without a request makes room. If all are at work,
further ones get a 503 and are closed, except that health checks are served.
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
"""What a connection does, and a number that changes with its progress."""

DEFAULT_COUNT = 10_000
SPARE = 100
"""Connections beyond the limit that are accepted to be answered with 503, or for a health check."""
_CHECK_SECONDS = 1.0
_SLICE = 200
_WAITING = ("idle", "head")


class ConnectionLimits(msgspec.Struct, frozen=True):
    """Bytes and seconds that a connection may take, and how many of them there may be.

    `idle_seconds` is more than the 60 s for which nginx keeps its own. A body brings `body_bytes` in each
    `body_seconds`; a client reads something in each `send_seconds`. `linger_seconds`: for the rest of a body that has
    been answered already. `close_seconds`: for the client's part of closing. `pipelined`: requests sent ahead.
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
    """What the protocols of this server are to `Connections`."""

    state_seen: State
    state_since: float

    def state(self) -> State:
        """What the connection is doing, and a number that changes while it makes progress."""
        ...

    def expire(self, name: str) -> None:
        """Close: the state of that name has lasted too long."""
        ...

    def abort(self) -> None:
        """Close without waiting for the client."""
        ...


class Connections:
    """The open connections of one server. `refused` and `expired` count since the start."""

    def __init__(self, limits: ConnectionLimits, opened: Collection[Connection]) -> None:
        self.limits = limits
        self.refused = 0
        self.malformed = 0
        self.expired: Counter[str] = Counter()
        self.slices = Slices()
        self._open = opened
        self._waiting: list[Connection] = []
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
        """Decide about a new connection, which is among the open ones; false if it is one too many."""
        over = len(self._open) - self.limits.count
        if over <= 0 or self._make_room():
            return True
        self.refused += 1
        if over > SPARE:
            connection.abort()
        return False

    def _make_room(self) -> bool:
        while self._waiting:
            connection = self._waiting.pop()
            if connection in self._open and connection.state()[0] in _WAITING:
                self.expired["evicted"] += 1
                connection.abort()
                return True
        return False

    def abort_stalled(self) -> None:
        """Abort what waits for its client to read, for a server that stops."""
        for connection in list(self._open):
            if connection.state()[0] in ("sending", "closing"):
                connection.abort()

    async def check_forever(self) -> None:
        """Check all connections once a second."""
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            await self.check()

    async def check(self) -> None:
        """Close what has been in one state for too long."""
        now = asyncio.get_running_loop().time()
        waiting: list[Connection] = []
        for n, connection in enumerate(list(self._open), 1):
            if n % _SLICE == 0:
                await asyncio.sleep(0)
            state = connection.state()
            if state != connection.state_seen:
                connection.state_seen, connection.state_since = state, now
            elif now - connection.state_since >= self._seconds.get(state[0], float("inf")) - _CHECK_SECONDS:
                self.expired[state[0]] += 1
                connection.state_since = now
                connection.expire(state[0])
            if state[0] in _WAITING:
                waiting.append(connection)
        waiting.sort(key=lambda connection: connection.state_since, reverse=True)
        self._waiting = waiting


def raise_file_limit() -> int:
    """Let this process open as many files as the system allows it; how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):  # macOS refuses "unlimited"
            return soft
    return hard if hard != resource.RLIM_INFINITY else 2**20


def connections_for(files: int, wanted: int | None) -> int:
    """How many connections a process with so many files may have: a quarter of the files is for all else.

    Raises: ValueError if more are wanted.
    """
    most = files * 3 // 4
    if wanted is not None and wanted > most:
        raise ValueError(f"{wanted} is more than the {most} that a limit of {files} open files leaves for connections")
    return wanted or min(DEFAULT_COUNT, most)
