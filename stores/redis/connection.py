"""Connections to Redis: how they are made, and pipelines of commands over one of them.

redis-py's client and its pool are not used: the retries of the client send appends twice, its PubSub reconnects without
reporting it, and a pool costs a connection for every reader that waits. What is used of redis-py is its `Connection`:
the URL, TLS, the login and the parser.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import cast

import msgspec
from hiredis import pack_command
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, AuthorizationError, OutOfMemoryError, RedisError, ResponseError

from agent_chat.stores.redis.script import APPEND

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 2.0
_EXCHANGE_SECONDS = 5.0
_RETRY_SECONDS = (0.0, 0.05, 0.1, 0.2, 0.5)

# uvloop raises RuntimeError on a closed transport, redis-py AttributeError where the connection was closed meanwhile
FAILURES = (RedisError, OSError, RuntimeError, TimeoutError, AttributeError)
"""What a connection raises when Redis is unreachable."""

Connection = AbstractConnection
Command = tuple[str | bytes, ...]
Reply = object


class RedisUnreachable(Exception):
    """Redis did not reply to the whole pipeline. `replies`: those to its first commands."""

    def __init__(self, replies: Sequence[Reply], reason: str) -> None:
        super().__init__(reason)
        self.replies = replies


class ErrorReply(msgspec.Struct, frozen=True):
    """A reply that is an error: nothing was done, or a part of a command that may be sent again.

    `full`: the memory of Redis is used up.
    """

    reason: str
    full: bool = False


Exchange = Callable[[Sequence[Command]], Awaitable[list[Reply]]]
"""Send the commands in one write and return the replies in their order. Raises: RedisUnreachable."""


class Backoff:
    """Waits before the next attempt: not at all after the first failure, then up to half a second."""

    def __init__(self) -> None:
        self._failures = 0

    def reset(self) -> None:
        """Begin again, after a success."""
        self._failures = 0

    async def wait(self) -> None:
        """Count a failure and wait."""
        self._failures += 1
        await asyncio.sleep(_RETRY_SECONDS[min(self._failures, len(_RETRY_SECONDS)) - 1])


class Connector:
    """Makes connections to one URL, without redis-py's retries and timeouts: ours are around whole exchanges.

    Raises: ValueError if the URL is not one of Redis, or has options that no connection accepts.
    """

    def __init__(self, url: str) -> None:
        try:
            pool = ConnectionPool.from_url(url)
            self._class = pool.connection_class
            self._kwargs = {
                **pool.connection_kwargs,
                "protocol": 2,
                "decode_responses": False,
                "socket_timeout": None,
                "socket_connect_timeout": CONNECT_SECONDS,
                # by default redis-py sends a whole pipeline again, and with it appends that were already done
                "retry": Retry(NoBackoff(), 0),
                "retry_on_timeout": False,
                "health_check_interval": 0,
            }
            self._class(**self._kwargs)  # only a connection checks the options
        except (TypeError, ValueError, RedisError) as error:
            raise ValueError(f"this Redis URL is not understood: {error}") from error

    async def connect(self) -> Connection:
        """Open a connection within two seconds. Raises: one of FAILURES."""
        connection: Connection = self._class(**self._kwargs)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await connection.connect()  # type: ignore[no-untyped-call]
        except BaseException:
            await disconnect(connection)
            raise
        return connection

    async def check_login(self) -> None:
        """Log in once; an unreachable Redis is only logged. Raises: ValueError if it refuses the user or password."""
        try:
            connection = await self.connect()
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    await send(connection, [("PING",)])
                    await connection.read_response()
            finally:
                await disconnect(connection)
        except (AuthenticationError, AuthorizationError) as error:
            raise ValueError(f"Redis refuses the login: {error}") from error
        except FAILURES as error:
            logger.warning("Redis is unreachable, events are stored and sent later: %s", error or type(error).__name__)


async def send(connection: Connection, commands: Sequence[Command]) -> None:
    """Send the commands in one write."""
    packed = b"".join([pack_command(command) for command in commands])  # type: ignore[arg-type]
    await connection.send_packed_command(packed, check_health=False)


async def disconnect(connection: Connection) -> None:
    """Close the connection, whatever its state."""
    with contextlib.suppress(*FAILURES):
        await connection.disconnect(nowait=True)


class Pipeline:
    """A connection that one task sends pipelines over. It loads the append script whenever it connects."""

    def __init__(self, connector: Connector) -> None:
        self._connector = connector
        self._connection: Connection | None = None

    async def exchange(self, commands: Sequence[Command]) -> list[Reply]:
        """Send all commands in one write and return the replies in their order. Raises: RedisUnreachable."""
        replies: list[Reply] = []
        try:
            async with asyncio.timeout(_EXCHANGE_SECONDS):
                if self._connection is None:
                    self._connection = await self._connector.connect()
                    await send(self._connection, [("SCRIPT", "LOAD", APPEND)])
                    await self._connection.read_response()
                await send(self._connection, commands)
                for _ in commands:
                    replies.append(await _read_reply(self._connection))
        except FAILURES as error:
            await self.close()
            raise RedisUnreachable(replies, str(error) or type(error).__name__) from error
        except BaseException:
            await self.close()
            raise
        if any(isinstance(reply, ErrorReply) for reply in replies):
            # the script may be gone, or this server no longer the master: only a new connection finds out
            await self.close()
        return replies

    async def close(self) -> None:
        """Close the connection; the next exchange opens a new one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await disconnect(connection)


async def _read_reply(connection: Connection) -> Reply:
    try:
        return cast(Reply, await connection.read_response())
    except ResponseError as error:
        return ErrorReply(str(error), full=isinstance(error, OutOfMemoryError))
