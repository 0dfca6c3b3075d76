"""One configured MCP server over time: its connection, made at start and again after a death, and its back-off.

A server that does not come to be, or ends by itself right after, is left alone by everybody for a while. One that ends
during its first call may have been ended by the caller: only that caller's uses are refused for a while, so that nobody
can take a server from the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Literal, get_args

import msgspec

from agent_chat.agents.mcp.config import Server
from agent_chat.agents.mcp.connection import Connection, Unreachable
from agent_chat.agents.mcp.tools import Listed
from agent_chat.stores.models import Principal

PATIENCE_SECONDS = 1.0
"""How long a use waits for a server that failed last time; the attempt itself goes on behind it."""
BACK_OFF_SECONDS = 30.0
_CALLERS = 1_000


State = Literal["idle", "connecting", "ready", "unavailable"]
"""`idle`: not connected, since nobody needs it; `unavailable`: the last attempt to connect failed."""
STATES: tuple[State, ...] = get_args(State)


class BackOff(msgspec.Struct):
    """Failures in a row, and until when nothing is tried: 1 s, 2 s … 30 s after each."""

    why: str = ""
    failures: int = 0
    not_before: float = 0.0

    @property
    def is_active(self) -> bool:
        """Whether the server must not be connected to yet."""
        return asyncio.get_running_loop().time() < self.not_before

    def fail(self, why: str) -> None:
        """Record a failure and its reason; double the time to wait, up to BACK_OFF_SECONDS."""
        self.why = why
        self.not_before = asyncio.get_running_loop().time() + min(2.0**self.failures, BACK_OFF_SECONDS)
        self.failures += 1


class Slot:
    """A configured server, the connection to it if there is one, and its back-off.

    `known` holds the tools that it listed last, whether it can be reached now or not.
    """

    def __init__(self, name: str, server: Server) -> None:
        self.name = name
        self.server = server
        self.lives: set[Connection] = set()
        self.known: Mapping[str, Listed] = {}
        self._current: Connection | None = None
        self._back_off = BackOff()
        self._blamed: dict[Principal, BackOff] = {}
        self._closed = False

    @property
    def state(self) -> State:
        """The state of the connection."""
        self._settle()
        if self._current is None:
            return "unavailable" if self._back_off.failures else "idle"
        return "ready" if self._current.decided.is_set() else "connecting"

    def connect(self) -> None:
        """Begin to connect, if there is no connection: nobody waits for it."""
        if self._current is None and not self._closed:
            self._current = self._connect()

    async def connection(self, caller: Principal, patience: float | None = None) -> Connection:
        """The connection, made if there is none. It is the slot's, not the caller's: cancelling the wait leaves it.

        Raises:
            Unreachable: it failed, lately or now, or is not there after `patience` seconds.
        """
        blamed = self._blamed.get(caller)
        if blamed is not None and blamed.is_active:
            raise Unreachable(blamed.why)
        while True:
            current = self._chosen()
            try:
                async with asyncio.timeout(PATIENCE_SECONDS if self._back_off.failures else patience):
                    await current.known()
            except TimeoutError:
                raise Unreachable(self._back_off.why or "It is still being connected.") from None
            self._settle()
            if current.failure is not None:
                raise Unreachable(current.failure)
            if current.usable:
                current.touch()
                self.known = current.tools
                return current

    def blame(self, caller: Principal) -> None:
        """Refuse this caller's uses for a while: the server ended during their call, the first of its life."""
        if caller not in self._blamed and len(self._blamed) >= _CALLERS:
            del self._blamed[next(iter(self._blamed))]
        back_off = self._blamed.setdefault(caller, BackOff())
        if not back_off.is_active:
            back_off.fail("It ended during the last call.")

    def trust(self, caller: Principal) -> None:
        """A call of this caller was responded to."""
        self._blamed.pop(caller, None)

    def _chosen(self) -> Connection:
        self._settle()
        if self._closed:
            raise Unreachable("It is being shut down.")
        if self._current is None:
            if self._back_off.is_active:
                raise Unreachable(self._back_off.why)
            self._current = self._connect()
        return self._current

    def _connect(self) -> Connection:
        connection = Connection(self.name, self.server)
        self.lives.add(connection)
        connection.life.add_done_callback(lambda _: self.lives.discard(connection))
        return connection

    def _settle(self) -> None:
        """Update the back-off from the current connection's outcome."""
        current = self._current
        if current is None or not current.decided.is_set():
            return
        if current.failure is not None:
            self._current = None
            self._back_off.fail(current.failure)
            return
        if current.proven:
            self._back_off = BackOff()
        if not current.usable:
            self._current = None

    def close(self) -> None:
        """Close all connections."""
        self._closed = True
        for connection in self.lives:
            connection.close()
