"""One configured MCP server: its connection, opened at start and again after it was lost, and its back-off.

A server that cannot be connected to, or that closes the connection right after connecting, is not tried again for a
while, for any caller. If the connection is lost during the first call, that call may be the cause: then only its
caller is refused for a while, so that one caller cannot make a server unavailable to the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Literal, get_args

import msgspec

from agent_chat.agents.mcp.config import Server
from agent_chat.agents.mcp.connection import Connection, ServerUnavailable
from agent_chat.agents.mcp.tools import ListedTool
from agent_chat.stores.models import Principal

RETRY_WAIT_SECONDS = 1.0
"""How long a caller waits for a server whose last attempt failed. The attempt itself continues in the background."""
BACK_OFF_SECONDS = 30.0
"""The longest back-off."""
_TRACKED_CALLERS = 1_000
"""How many callers have a back-off of their own. The oldest is dropped for a new one."""


State = Literal["idle", "connecting", "ready", "unavailable"]
"""`idle`: not connected, because no run needs it; `unavailable`: the last attempt to connect failed."""
STATES: tuple[State, ...] = get_args(State)


class BackOff(msgspec.Struct):
    """Consecutive failures and the back-off after each: 1 s, 2 s … BACK_OFF_SECONDS.

    Attributes:
        reason: why the last attempt failed.
        failures: how many attempts failed in a row.
        not_before: the time of the event loop at which the back-off ends.
    """

    reason: str = ""
    failures: int = 0
    not_before: float = 0.0

    @property
    def is_active(self) -> bool:
        """Whether the back-off lasts."""
        return asyncio.get_running_loop().time() < self.not_before

    def record_failure(self, reason: str) -> None:
        """Start the next back-off, twice as long as the last one."""
        self.reason = reason
        self.not_before = asyncio.get_running_loop().time() + min(2.0**self.failures, BACK_OFF_SECONDS)
        self.failures += 1


class Slot:
    """A configured server, the connection to it if there is one, and its back-off.

    Attributes:
        name: the server's name in the operator's file.
        server: its configuration.
        connections: the current connection, and earlier ones that are still closing.
        last_tools: the tools that the server listed last. Also valid while it is unavailable.

    Private attributes:
        _current: the connection for new calls. None before the first use, and after a failure or loss.
        _back_off: the back-off for all callers. Reset once a connection is stable.
        _caller_back_offs: the back-off of callers during whose call the connection was lost.
        _is_closed: set by `close`: no further connection is opened.
    """

    def __init__(self, name: str, server: Server) -> None:
        self.name = name
        self.server = server
        self.connections: set[Connection] = set()
        self.last_tools: Mapping[str, ListedTool] = {}
        self._current: Connection | None = None
        self._back_off = BackOff()
        self._caller_back_offs: dict[Principal, BackOff] = {}
        self._is_closed = False

    @property
    def state(self) -> State:
        """The state of the connection."""
        self._update_current()
        if self._current is None:
            return "unavailable" if self._back_off.failures else "idle"
        return "ready" if self._current.attempt_done.is_set() else "connecting"

    def connect(self) -> None:
        """Start connecting in the background, if there is no connection."""
        if self._current is None and not self._is_closed:
            self._current = self._open_connection()

    async def get_connection(self, caller: Principal, wait_seconds: float | None = None) -> Connection:
        """Return a connection that accepts calls; open one if there is none. Cancelling the wait does not close it.

        Raises:
            ServerUnavailable: connecting failed, a back-off is active, or it takes more than `wait_seconds`.
        """
        caller_back_off = self._caller_back_offs.get(caller)
        if caller_back_off is not None and caller_back_off.is_active:
            raise ServerUnavailable(caller_back_off.reason)
        while True:
            current = self._get_current()
            try:
                async with asyncio.timeout(RETRY_WAIT_SECONDS if self._back_off.failures else wait_seconds):
                    await current.wait_until_checked()
            except TimeoutError:
                raise ServerUnavailable(self._back_off.reason or "It is still being connected.") from None
            self._update_current()
            if current.failure is not None:
                raise ServerUnavailable(current.failure)
            if current.accepts_calls:
                current.touch()
                self.last_tools = current.tools
                return current

    def record_lost_call(self, caller: Principal) -> None:
        """Refuse this caller for a while: an unstable connection was lost during their call."""
        if caller not in self._caller_back_offs and len(self._caller_back_offs) >= _TRACKED_CALLERS:
            del self._caller_back_offs[next(iter(self._caller_back_offs))]
        back_off = self._caller_back_offs.setdefault(caller, BackOff())
        if not back_off.is_active:
            back_off.record_failure("It disconnected during the last call.")

    def record_success(self, caller: Principal) -> None:
        """Reset this caller's back-off: the server responded to a call of theirs."""
        self._caller_back_offs.pop(caller, None)

    def _get_current(self) -> Connection:
        self._update_current()
        if self._is_closed:
            raise ServerUnavailable("The chat server is shutting down.")
        if self._current is None:
            if self._back_off.is_active:
                raise ServerUnavailable(self._back_off.reason)
            self._current = self._open_connection()
        return self._current

    def _open_connection(self) -> Connection:
        connection = Connection(self.name, self.server)
        self.connections.add(connection)
        connection.task.add_done_callback(lambda _: self.connections.discard(connection))
        return connection

    def _update_current(self) -> None:
        """Drop a connection that failed or accepts no more calls, and update the back-off."""
        current = self._current
        if current is None or not current.attempt_done.is_set():
            return
        if current.failure is not None:
            self._current = None
            self._back_off.record_failure(current.failure)
            return
        if current.is_stable:
            self._back_off = BackOff()
        if not current.accepts_calls:
            self._current = None

    def close(self) -> None:
        """Close all connections, and open no more."""
        self._is_closed = True
        for connection in self.connections:
            connection.close()
