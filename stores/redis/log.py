"""The EventLog in Redis: one stream per thread, which is its channel too; any number of processes.

Three connections per process, each owned by one task: appends (`flusher`), reads (`reads`), and pub/sub for all threads
that are followed (`subscription`, `feed`).

While Redis is unreachable, writers store and join what they have, feeds wait, and reads raise `LogUnavailable` within
two seconds (I19). If Redis lost its data, writers append a snapshot (I15) and readers get a Gap (I13): only resuming
depends on what it holds. If it is full, logs are deleted (`eviction`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import cast

from agent_chat.stores.budget import LogBudget
from agent_chat.stores.buffer import Cursor, Entry
from agent_chat.stores.errors import Gap, LogUnavailable
from agent_chat.stores.events import MessageSnapshot
from agent_chat.stores.redis.connection import Command, Connector, Pipeline
from agent_chat.stores.redis.eviction import LogEvictor
from agent_chat.stores.redis.feed import PAGE, Feed
from agent_chat.stores.redis.flusher import Flusher
from agent_chat.stores.redis.reads import Reads
from agent_chat.stores.redis.script import APPEND_SHA, RESET
from agent_chat.stores.redis.subscription import Subscription
from agent_chat.stores.redis.timing import RedisTiming
from agent_chat.stores.redis.writer import RedisWriter

logger = logging.getLogger(__name__)

_BACKWARDS_FIRST = 50
"""How many entries the first page of a reading backwards has; each further one has twice as many."""

_POSITION = re.compile(r"(\d{1,20})-(\d{1,20})", re.ASCII)


def _is_position(position: str) -> bool:
    """Return True if Redis accepts it as a stream id: two numbers of 64 bits."""
    match = _POSITION.fullmatch(position)
    return match is not None and all(int(number) < 2**64 for number in match.groups())


class RedisLog:
    """Every thread's log, as this process sees it.

    Attributes:
        timing: its time constants. They may be replaced while it is open, except `read`.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str,
        spacing: float = 0.0,
        budget: LogBudget | None = None,
        timing: RedisTiming = RedisTiming(),
    ) -> None:
        self.timing = timing
        self.budget = budget or LogBudget()
        connector = Connector(url)
        self._prefix = prefix
        self._process = secrets.token_hex(8)
        self._feeds: dict[bytes, Feed] = {}
        self._callbacks: list[Callable[[str], None]] = []
        self._signals = f"{prefix}:signals"
        self._pipelines = Pipeline(connector), Pipeline(connector)
        self._evictor = LogEvictor(prefix)
        self._reads = Reads(self._pipelines[0].exchange, self._evictor, timing.read)
        self._flusher = Flusher(
            self._pipelines[1].exchange,
            self._process,
            self._append_command,
            _random_number,
            spacing=spacing,
            full=self._evictor.evict,
        )
        self._subscription = Subscription(connector, self._on_message, self._on_subscribed)
        self._subscription.add(self._signals)
        self._ticks = asyncio.create_task(self._tick_forever(), name="log ticks")

    @property
    def unreachable(self) -> bool:
        """True while Redis accepts no events."""
        return self._flusher.unreachable

    @property
    def volatile(self) -> bool:
        """False: what Redis does not take waits."""
        return False

    @property
    def disk_bytes(self) -> int:
        """0: it is in Redis."""
        return 0

    @property
    def failures(self) -> int:
        """As in EventLog."""
        return self._flusher.failures

    @property
    def evicted(self) -> int:
        """The number of logs that this process has deleted because Redis was full."""
        return self._evictor.evicted

    @property
    def pending_bytes(self) -> int:
        """What the writers of this process hold that Redis has not acknowledged, besides the deltas of runs."""
        return self._flusher.pending_bytes

    def writer(self, thread_id: str, snapshot: Callable[[], MessageSnapshot] | None = None) -> RedisWriter:
        """As in EventLog."""
        return RedisWriter(self._flusher, thread_id, snapshot)

    async def tail(self, thread_id: str) -> str:
        """As in EventLog. Raises: LogUnavailable."""
        reply = await self._reads.request(*self._append_command(thread_id, ["", "", "", _random_number(), "", "0"]))
        return cast(bytes, reply).decode()

    def cursor(self, thread_id: str, after: str) -> Cursor:
        """As in EventLog."""
        channel = self._key(thread_id)
        feed = self._feeds.get(channel.encode())
        if feed is None:
            feed = self._feeds[channel.encode()] = Feed(
                thread_id, after, self._read_page, self.tail, self.budget, self.timing.page
            )
            self._subscription.add(channel)
        return feed.cursor(after)

    async def backwards(self, thread_id: str, position: str | None = None) -> AsyncGenerator[Entry]:
        """As in EventLog. Raises: Gap, LogUnavailable."""
        if position is not None and not _is_position(position):
            raise Gap(position)
        start, count = position or "+", _BACKWARDS_FIRST
        while True:
            page = await self._range("XREVRANGE", thread_id, start, "-", count)
            if start == position and (not page or page[0].position != position):
                raise Gap(position)
            for entry in page:
                yield entry
            if len(page) < count:
                return
            start, count = f"({page[-1].position}", min(count * 2, PAGE)

    async def reset(self, thread_id: str) -> None:
        """As in EventLog. Raises: LogUnavailable."""
        await self._reads.request("EVAL", RESET, "1", self._key(thread_id))

    async def signal(self, run_id: str) -> None:
        """As in EventLog."""
        self._call_back(run_id)
        with contextlib.suppress(LogUnavailable):
            await self._reads.request("PUBLISH", self._signals, f"{self._process} {run_id}")

    def on_signal(self, callback: Callable[[str], None]) -> None:
        """As in EventLog."""
        self._callbacks.append(callback)

    async def close(self) -> None:
        """Send what can be sent within two seconds; every cursor gets a Gap."""
        await self._flusher.close(self.timing.close)
        self._ticks.cancel()
        await asyncio.wait({self._ticks})
        await self._subscription.close()
        for feed in list(self._feeds.values()):
            await feed.close()
        self._feeds.clear()
        await self._reads.close()
        for pipeline in self._pipelines:
            await pipeline.close()

    def _key(self, thread_id: str) -> str:
        return f"{self._prefix}:{thread_id}"

    def _append_command(self, thread_id: str, argv: Sequence[str | bytes]) -> Command:
        return ("EVALSHA", APPEND_SHA, "1", self._key(thread_id), *argv)

    async def _read_page(self, thread_id: str, position: str) -> list[Entry]:
        if not _is_position(position):
            return []
        return await self._range("XRANGE", thread_id, position, "+", PAGE)

    async def _range(self, command: str, thread_id: str, start: str, end: str, count: int) -> list[Entry]:
        reply = await self._reads.request(command, self._key(thread_id), start, end, "COUNT", str(count))
        rows = cast(list[tuple[bytes, list[bytes]]], reply)
        return [Entry(position.decode(), fields[1]) for position, fields in rows]

    def _on_message(self, channel: bytes, payload: bytes) -> None:
        if (feed := self._feeds.get(channel)) is not None:
            position, previous, data = payload.split(b" ", 2)
            feed.offer(position.decode(), previous.decode(), data)
        elif channel == self._signals.encode():
            process, run_id = payload.decode().split(" ")
            if process != self._process:
                self._call_back(run_id)

    def _call_back(self, run_id: str) -> None:
        for callback in self._callbacks:
            callback(run_id)

    def _on_subscribed(self, channel: bytes) -> None:
        if (feed := self._feeds.get(channel)) is not None:
            feed.refill()

    async def _tick_forever(self) -> None:
        """Refill every feed from time to time, whatever pub/sub brought, and close those without readers."""
        while True:
            await asyncio.sleep(self.timing.tick)
            try:
                await self._tick()
            except Exception:
                logger.exception("the log's feeds could not be refilled")

    async def _tick(self) -> None:
        now = time.monotonic()
        for channel, feed in list(self._feeds.items()):
            if not feed.readers and now - feed.idle_since > self.timing.linger:
                del self._feeds[channel]
                self._subscription.remove(channel.decode())
                await feed.close()
            elif now - feed.filled_at > self.timing.refill:
                feed.refill()


def _random_number() -> str:
    return str(secrets.randbits(60))


async def open_redis_log(
    url: str, *, prefix: str = "chat", budget: LogBudget | None = None, timing: RedisTiming = RedisTiming()
) -> RedisLog:
    """Open the log; Redis may still be unreachable.

    Args:
        url: `redis://…`, `rediss://…` or `unix://…`.
        prefix: begins every key and channel, so that several installations can share one Redis.
        budget: how much memory all logs of this process may take.

    Raises: ValueError if the URL is not understood, or Redis refuses its user or password.
    """
    await Connector(url).check_login()
    return RedisLog(url, prefix=prefix, budget=budget, timing=timing)
