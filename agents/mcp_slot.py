"""One configured MCP server over time: its connection, made on first use and again after a death, and its back-off."""

from __future__ import annotations

import asyncio

from agents.mcp_config import Server
from agents.mcp_connection import Connection, Unreachable

PATIENCE_SECONDS = 1.0
"""How long a use waits for a server that failed last time; the attempt itself goes on behind it."""
BACK_OFF_SECONDS = 30.0


class Slot:
    """A configured server, the connection to it if there is one, and how often it failed in a row."""

    def __init__(self, name: str, server: Server) -> None:
        self.name = name
        self.server = server
        self.lives: set[Connection] = set()
        self._current: Connection | None = None
        self._failures = 0
        self._why = ""
        self._not_before = 0.0
        self._closed = False

    async def connection(self) -> Connection:
        """The connection, made if there is none. It is the slot's, not the caller's: cancelling the wait leaves it.

        Raises:
            Unreachable: it failed, lately or now, or a server that failed last time is still not there.
        """
        while True:
            current = self._chosen()
            try:
                async with asyncio.timeout(PATIENCE_SECONDS if self._failures else None):
                    await current.known()
            except TimeoutError:
                raise Unreachable(self._why) from None
            self._settle()
            if current.failure is not None:
                raise Unreachable(current.failure)
            if current.usable:
                current.touch()
                return current

    def _chosen(self) -> Connection:
        self._settle()
        if self._closed:
            raise Unreachable("It is being shut down.")
        if self._current is None:
            if asyncio.get_running_loop().time() < self._not_before:
                raise Unreachable(self._why)
            self._current = self._connect()
        return self._current

    def _connect(self) -> Connection:
        connection = Connection(self.name, self.server)
        self.lives.add(connection)
        connection.life.add_done_callback(lambda _: self.lives.discard(connection))
        return connection

    def _settle(self) -> None:
        """Draw the consequences of what has become of the current connection."""
        current = self._current
        if current is None or not current.decided.is_set():
            return
        if current.failure is not None:
            self._current, self._why = None, current.failure
            self._not_before = asyncio.get_running_loop().time() + min(2.0**self._failures, BACK_OFF_SECONDS)
            self._failures += 1
            return
        if current.proven:
            self._failures = 0
        if not current.usable:
            self._current = None

    def close(self) -> None:
        self._closed = True
        for connection in self.lives:
            connection.close()
