"""The EventLog in Redis: one stream per thread, which is its channel too; any number of processes.

Three connections per process, each with one task that owns it: appends (`redis_writer`), reads, and pub/sub for all
followed threads (`redis_feed`). redis-py's client and pool stand aside: its retries send appends twice, its PubSub
reconnects without a word, and a pool costs a connection for every reader that waits. What stays is its `Connection`:
the URL, TLS, the login and the parser.

Redis away: writers keep and join what they have, feeds wait, whoever asks gets `LogUnavailable` within two seconds.
Redis empty: writers say a snapshot, readers get a Gap. Nothing but resuming depends on what lies here. Redis full: logs
that were silent for long are deleted (`redis_room`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar, cast

from hiredis import pack_command
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    OutOfMemoryError,
    RedisError,
    ResponseError,
)

from agent_chat.stores.budget import LogBudget
from agent_chat.stores.buffer import Cursor, Entry, in_run, position_before, run_events
from agent_chat.stores.errors import Gap, LogUnavailable
from agent_chat.stores.events import Event, MessageSnapshot
from agent_chat.stores.redis.feed import PAGE, Feed
from agent_chat.stores.redis.reads import READ_SECONDS, Reads
from agent_chat.stores.redis.room import Room
from agent_chat.stores.redis.script import APPEND, APPEND_SHA, RESET
from agent_chat.stores.redis.writer import Answer, Away, Backoff, Command, Flusher, RedisWriter, Refusal

logger = logging.getLogger(__name__)

_ANSWER_SECONDS = 5.0
_CLOSE_SECONDS = 2.0
_REFILL_SECONDS = 15.0
_LINGER_SECONDS = 5.0
_TICK_SECONDS = 1.0
_PING_SECONDS = 10.0
_SILENCE_SECONDS = 25.0
_SOUND_SECONDS = 5.0
_FAILURES = (RedisError, OSError, RuntimeError, TimeoutError, AttributeError)
"""uvloop raises RuntimeError on a closed transport, redis-py AttributeError where a connection closed meanwhile."""

_POSITION = re.compile(r"(\d{1,20})-(\d{1,20})", re.ASCII)
_T = TypeVar("_T")


def _is_position(position: str) -> bool:
    match = _POSITION.fullmatch(position)
    return match is not None and all(int(number) < 2**64 for number in match.groups())


class Dial:
    """Makes connections to one URL, without redis-py's retries and timeouts: ours are around whole exchanges.

    Raises: ValueError if the URL is none of Redis', or has options that no connection takes.
    """

    def __init__(self, url: str) -> None:
        try:
            self._read(url)
        except (TypeError, ValueError, RedisError) as error:
            raise ValueError(f"this Redis URL is not understood: {error}") from error

    def _read(self, url: str) -> None:
        pool = ConnectionPool.from_url(url)
        self._class = pool.connection_class
        self._kwargs = {
            **pool.connection_kwargs,
            "protocol": 2,
            "decode_responses": False,
            "socket_timeout": None,
            "socket_connect_timeout": READ_SECONDS,
            "retry": Retry(NoBackoff(), 0),
            "retry_on_timeout": False,
            "health_check_interval": 0,
        }
        self._class(**self._kwargs)  # which options it takes, only a connection tells

    async def connect(self) -> AbstractConnection:
        connection: AbstractConnection = self._class(**self._kwargs)
        try:
            async with asyncio.timeout(READ_SECONDS):
                await connection.connect()  # type: ignore[no-untyped-call]
        except BaseException:
            await hang_up(connection)
            raise
        return connection


def _packed(commands: Sequence[Command]) -> bytes:
    return b"".join([pack_command(command) for command in commands])  # type: ignore[arg-type]


async def hang_up(connection: AbstractConnection) -> None:
    with contextlib.suppress(*_FAILURES):
        await connection.disconnect(nowait=True)


class Wire:
    """A connection for pipelines that one task sends. The script is loaded whenever it connects."""

    def __init__(self, dial: Dial) -> None:
        self._dial = dial
        self._connection: AbstractConnection | None = None

    async def exchange(self, commands: Sequence[Command]) -> list[Answer]:
        """Send all in one write; the answers in their order. Raises: Away."""
        answers: list[Answer] = []
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                if self._connection is None:
                    self._connection = await self._dial.connect()
                    await self._send([("SCRIPT", "LOAD", APPEND)])
                    await self._connection.read_response()
                await self._send(commands)
                for _ in commands:
                    answers.append(await self._answer(self._connection))
        except _FAILURES as error:
            await self.close()
            raise Away(answers, str(error) or type(error).__name__) from error
        except BaseException:
            await self.close()
            raise
        if any(isinstance(answer, Refusal) for answer in answers):
            # the script is gone, or this server is no master any more: the next connection finds out
            await self.close()
        return answers

    async def _send(self, commands: Sequence[Command]) -> None:
        assert self._connection is not None
        await self._connection.send_packed_command(_packed(commands), check_health=False)

    @staticmethod
    async def _answer(connection: AbstractConnection) -> Answer:
        try:
            return cast(Answer, await connection.read_response())
        except ResponseError as error:
            return Refusal(str(error), full=isinstance(error, OutOfMemoryError))

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await hang_up(connection)


class Subscription:
    """The one pub/sub connection, and the channels that it is to have.

    `heard(channel, payload)` gets every message, `subscribed(channel)` every acknowledgement: after a reconnect that
    is the only sign that messages were missed.
    """

    def __init__(self, dial: Dial, heard: Callable[[bytes, bytes], None], subscribed: Callable[[bytes], None]) -> None:
        self.channels: set[str] = set()
        self._dial = dial
        self._heard = heard
        self._subscribed = subscribed
        self._changed = asyncio.Event()
        self._task = asyncio.create_task(self._listen_forever(), name="log subscription")

    def add(self, channel: str) -> None:
        self.channels.add(channel)
        self._changed.set()

    def remove(self, channel: str) -> None:
        self.channels.discard(channel)
        self._changed.set()

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _listen_forever(self) -> None:
        backoff = Backoff()
        while True:
            began = time.monotonic()
            try:
                await self._listen(await self._dial.connect())
            except _FAILURES as error:
                logger.info("the log's subscription broke: %s", error)
            except Exception:
                logger.exception("the log's subscription broke")
            if time.monotonic() - began > _SOUND_SECONDS:
                backoff.reset()
            await backoff.wait()

    async def _listen(self, connection: AbstractConnection) -> None:
        """Hear and subscribe until one of the two breaks."""
        tasks = {
            asyncio.create_task(self._hear(connection), name="log messages"),
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
            await hang_up(connection)

    async def _hear(self, connection: AbstractConnection) -> None:
        while True:
            message = await connection.read_response(timeout=_SILENCE_SECONDS)
            if message is None:
                raise TimeoutError("silence")
            match message:
                case [b"message", channel, payload]:
                    self._heard(channel, payload)
                case [b"subscribe", channel, _]:
                    self._subscribed(channel)

    async def _subscribe(self, connection: AbstractConnection) -> None:
        """Keep the connection's channels as wanted, and a sign of life going."""
        have: set[str] = set()
        while True:
            self._changed.clear()
            want = set(self.channels)
            commands: list[Command] = []
            if new := want - have:
                commands.append(("SUBSCRIBE", *new))
            if old := have - want:
                commands.append(("UNSUBSCRIBE", *old))
            await connection.send_packed_command(_packed(commands or [("PING",)]), check_health=False)
            have = want
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PING_SECONDS):
                    await self._changed.wait()


class RedisLog:
    """Every thread's log, as this process sees it."""

    def __init__(self, url: str, *, prefix: str, spacing: float = 0.0, budget: LogBudget | None = None) -> None:
        self.budget = budget or LogBudget()
        dial = Dial(url)
        self._prefix = prefix
        self._process = secrets.token_hex(8)
        self._feeds: dict[bytes, Feed] = {}
        self._callbacks: list[Callable[[str], None]] = []
        self._signals = f"{prefix}:signals"
        self._wires = Wire(dial), Wire(dial)
        self._room = Room(prefix)
        self._reads = Reads(self._wires[0].exchange, self._room)
        self._flusher = Flusher(
            self._wires[1].exchange, self._process, self._append, _seed, spacing=spacing, full=self._room.make
        )
        self._subscription = Subscription(dial, self._heard, self._subscribed)
        self._subscription.add(self._signals)
        self._ticking = asyncio.create_task(self._tick_forever(), name="log ticks")

    @property
    def unreachable(self) -> bool:
        """True while Redis takes no events."""
        return self._flusher.unreachable

    @property
    def failures(self) -> int:
        return self._flusher.failures

    @property
    def evicted(self) -> int:
        """How many logs this process has deleted because Redis was full."""
        return self._room.evicted

    @property
    def pending_bytes(self) -> int:
        """What the writers of this process hold that Redis has not acknowledged, but for the deltas of runs."""
        return self._flusher.pending_bytes

    def writer(self, thread_id: str, snapshot: Callable[[], MessageSnapshot] | None = None) -> RedisWriter:
        return RedisWriter(self._flusher, thread_id, snapshot)

    async def tail(self, thread_id: str) -> str:
        """Raises: LogUnavailable."""
        answer = await self._reads.ask(*self._append(thread_id, ["", "", "", _seed()]))
        return cast(bytes, answer).decode()

    def cursor(self, thread_id: str, after: str) -> Cursor:
        channel = self._key(thread_id)
        feed = self._feeds.get(channel.encode())
        if feed is None:
            feed = self._feeds[channel.encode()] = Feed(thread_id, after, self._page, self.tail, self.budget)
            self._subscription.add(channel)
        return feed.cursor(after)

    async def find(self, thread_id: str, message_id: str, run_id: str | None) -> str | None:
        """Raises: LogUnavailable."""
        entries: list[Entry] = []
        start = "-"
        while True:
            page = await self._range("XRANGE", thread_id, start, "+", PAGE)
            entries += page
            if len(page) < PAGE:
                return position_before(entries, message_id, run_id)
            start = f"({page[-1].position}"

    async def in_run(self, thread_id: str, position: str) -> bool:
        """Raises: Gap, LogUnavailable."""
        return await self._judged(thread_id, position, in_run)

    async def run_events(self, thread_id: str, run_id: str, upto: str) -> list[Event]:
        """Raises: Gap, LogUnavailable."""
        return await self._judged(thread_id, upto, lambda backwards: run_events(backwards, run_id))

    async def reset(self, thread_id: str) -> None:
        """Raises: LogUnavailable."""
        await self._reads.ask("EVAL", RESET, "1", self._key(thread_id))

    async def signal(self, run_id: str) -> None:
        self._called(run_id)
        with contextlib.suppress(LogUnavailable):
            await self._reads.ask("PUBLISH", self._signals, f"{self._process} {run_id}")

    def on_signal(self, callback: Callable[[str], None]) -> None:
        self._callbacks.append(callback)

    async def close(self) -> None:
        """Send what can be sent within two seconds; end every cursor with a Gap."""
        await self._flusher.close(_CLOSE_SECONDS)
        self._ticking.cancel()
        await asyncio.wait({self._ticking})
        await self._subscription.close()
        for feed in list(self._feeds.values()):
            await feed.close()
        self._feeds.clear()
        await self._reads.close()
        for wire in self._wires:
            await wire.close()

    def _key(self, thread_id: str) -> str:
        return f"{self._prefix}:{thread_id}"

    def _append(self, thread_id: str, argv: Sequence[str | bytes]) -> Command:
        return ("EVALSHA", APPEND_SHA, "1", self._key(thread_id), *argv)

    async def _page(self, thread_id: str, position: str) -> list[Entry]:
        if not _is_position(position):
            return []
        return await self._range("XRANGE", thread_id, position, "+", PAGE)

    async def _range(self, command: str, thread_id: str, start: str, end: str, count: int) -> list[Entry]:
        answer = await self._reads.ask(command, self._key(thread_id), start, end, "COUNT", str(count))
        rows = cast(list[tuple[bytes, list[bytes]]], answer)
        return [Entry(position.decode(), fields[1]) for position, fields in rows]

    async def _judged(self, thread_id: str, position: str, judge: Callable[[Iterable[Entry]], _T]) -> _T:
        """What `judge` says of the entries from the position backwards, reading no further than it looks."""
        if not _is_position(position):
            raise Gap(position)
        entries: list[Entry] = []
        start, count = position, 50
        while True:
            page = await self._range("XREVRANGE", thread_id, start, "-", count)
            entries += page
            if not entries or entries[0].position != position:
                raise Gap(position)
            try:
                return judge(_backwards(entries, begins=len(page) < count))
            except _FurtherBack:
                start, count = f"({page[-1].position}", count * 2

    def _heard(self, channel: bytes, payload: bytes) -> None:
        if (feed := self._feeds.get(channel)) is not None:
            position, previous, data = payload.split(b" ", 2)
            feed.offer(position.decode(), previous.decode(), data)
        elif channel == self._signals.encode():
            process, run_id = payload.decode().split(" ")
            if process != self._process:
                self._called(run_id)

    def _called(self, run_id: str) -> None:
        for callback in self._callbacks:
            callback(run_id)

    def _subscribed(self, channel: bytes) -> None:
        if (feed := self._feeds.get(channel)) is not None:
            feed.refill()

    async def _tick_forever(self) -> None:
        """Refill every feed now and then, whatever pub/sub brought; forget those that nobody reads any more."""
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            try:
                await self._tick()
            except Exception:
                logger.exception("the log's feeds could not be refilled")

    async def _tick(self) -> None:
        now = time.monotonic()
        for channel, feed in list(self._feeds.items()):
            if not feed.readers and now - feed.idle_since > _LINGER_SECONDS:
                del self._feeds[channel]
                self._subscription.remove(channel.decode())
                await feed.close()
            elif now - feed.filled_at > _REFILL_SECONDS:
                feed.refill()


class _FurtherBack(Exception):
    """The judge looked further back than has been read."""


def _backwards(entries: list[Entry], *, begins: bool) -> Iterator[Entry]:
    yield from entries
    if not begins:
        raise _FurtherBack


def _seed() -> str:
    return str(secrets.randbits(60))


async def open_redis_log(url: str, *, prefix: str = "chat", budget: LogBudget | None = None) -> RedisLog:
    """Open the log; Redis may be unreachable yet.

    Raises: ValueError if the URL is not understood, or Redis refuses its user or password.

    Args:
        prefix: begins every key and channel, so that several installations can share one Redis.
        budget: what this process may hold of all logs together.
    """
    await _check_login(Dial(url))
    return RedisLog(url, prefix=prefix, budget=budget)


async def _check_login(dial: Dial) -> None:
    """Raises: ValueError."""
    try:
        connection = await dial.connect()
        try:
            async with asyncio.timeout(READ_SECONDS):
                await connection.send_packed_command(_packed([("PING",)]), check_health=False)
                await connection.read_response()
        finally:
            await hang_up(connection)
    except (AuthenticationError, AuthorizationError) as error:
        raise ValueError(f"Redis refuses the login: {error}") from error
    except _FAILURES as error:
        logger.warning("Redis is unreachable, events are stored and sent later: %s", error or type(error).__name__)
