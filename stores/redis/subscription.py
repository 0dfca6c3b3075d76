"""The pub/sub connection of a process: one connection for all channels, whatever the number of viewers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from agent_chat.stores.redis.connection import (
    FAILURES,
    Backoff,
    Command,
    Connection,
    Connector,
    disconnect,
    send,
)

logger = logging.getLogger(__name__)

_PING_SECONDS = 10.0
_SILENCE_SECONDS = 25.0
_STABLE_SECONDS = 5.0


class Subscription:
    """Subscribes to the channels in `channels`, and reconnects for ever.

    Args:
        on_message: called with channel and payload of every message.
        on_subscribed: called with the channel of every acknowledgement. After a reconnect that is the only sign that
            messages were missed.
    """

    def __init__(
        self,
        connector: Connector,
        on_message: Callable[[bytes, bytes], None],
        on_subscribed: Callable[[bytes], None],
    ) -> None:
        self.channels: set[str] = set()
        self._connector = connector
        self._on_message = on_message
        self._on_subscribed = on_subscribed
        self._changed = asyncio.Event()
        self._task = asyncio.create_task(self._listen_forever(), name="log subscription")

    def add(self, channel: str) -> None:
        """Subscribe to the channel, soon."""
        self.channels.add(channel)
        self._changed.set()

    def remove(self, channel: str) -> None:
        """Unsubscribe from the channel, soon."""
        self.channels.discard(channel)
        self._changed.set()

    async def close(self) -> None:
        """Close the connection."""
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _listen_forever(self) -> None:
        backoff = Backoff()
        while True:
            started = time.monotonic()
            try:
                await self._listen(await self._connector.connect())
            except FAILURES as error:
                logger.info("the log's subscription was interrupted: %s", error)
            except Exception:
                logger.exception("the log's subscription was interrupted")
            if time.monotonic() - started > _STABLE_SECONDS:
                backoff.reset()
            await backoff.wait()

    async def _listen(self, connection: Connection) -> None:
        """Receive and subscribe until one of the two fails."""
        tasks = {
            asyncio.create_task(self._receive(connection), name="log messages"),
            asyncio.create_task(self._subscribe(connection), name="log channels"),
        }
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await disconnect(connection)

    async def _receive(self, connection: Connection) -> None:
        while True:
            message = await connection.read_response(timeout=_SILENCE_SECONDS)
            if message is None:
                raise TimeoutError(f"no message for {_SILENCE_SECONDS:g} seconds")
            match message:
                case [b"message", channel, payload]:
                    self._on_message(channel, payload)
                case [b"subscribe", channel, _]:
                    self._on_subscribed(channel)

    async def _subscribe(self, connection: Connection) -> None:
        """Bring the connection's channels in line with `channels` after each change, and ping it in between."""
        subscribed: set[str] = set()
        while True:
            self._changed.clear()
            wanted = set(self.channels)
            commands: list[Command] = []
            if added := wanted - subscribed:
                commands.append(("SUBSCRIBE", *added))
            if removed := subscribed - wanted:
                commands.append(("UNSUBSCRIBE", *removed))
            await send(connection, commands or [("PING",)])
            subscribed = wanted
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PING_SECONDS):
                    await self._changed.wait()
