"""Making room in a Redis that is full, whatever its eviction policy is.

With `maxmemory-policy volatile-ttl` Redis does this by itself: every log expires, the one that was silent for longest
first. With `noeviction`, its default, it refuses every append of every organization until logs expire, an hour later;
so the process that meets the refusal deletes logs. Their readers get a Gap and then a snapshot. Counters of bytes per
organization were refused: logs expire by themselves, and a counter that is not told drifts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import cast

from agent_chat.stores.buffer import RETAINED_SECONDS
from agent_chat.stores.models import is_id
from agent_chat.stores.redis.writer import Away, Command, Exchange

logger = logging.getLogger(__name__)

_SAMPLE = 5000
_FREED_BYTES = 4 * 2**20


class Room:
    """Deletes logs when Redis is full. `evicted` counts them."""

    def __init__(self, prefix: str) -> None:
        self.evicted = 0
        self._prefix = prefix
        self._cursor = b"0"

    async def make(self, exchange: Exchange) -> None:
        """Delete those of a sample of logs that take the most memory for the longest silence.

        At least 4 MB or an eighth of what the sample takes: the caller tries again, and comes back if that was too
        little. Each log's weight is its bytes times the time since its last event, so that what is being written now
        stays, and many small logs do not give way to one that is large.
        """
        try:
            weighed = await self._sample(exchange)
            goal = max(_FREED_BYTES, sum(size for _, size, _ in weighed) // 8)
            victims: list[bytes] = []
            for _, size, key in sorted(weighed, reverse=True):
                if goal <= 0:
                    break
                goal -= size
                victims.append(key)
            if victims:
                await exchange([("UNLINK", *victims)])
                self.evicted += len(victims)
        except Away as away:
            logger.warning("Redis is full, and no room could be made: %s", away)
            return
        logger.warning(
            "Redis is full: %d event logs deleted; give it more maxmemory, and maxmemory-policy volatile-ttl",
            len(victims),
        )

    async def _sample(self, exchange: Exchange) -> list[tuple[float, int, bytes]]:
        """Some logs as (weight, bytes, key); the next call continues behind them."""
        weighed: list[tuple[float, int, bytes]] = []
        while len(weighed) < _SAMPLE:
            scan = ("SCAN", self._cursor, "MATCH", f"{self._prefix}:*", "COUNT", "1000", "TYPE", "stream")
            self._cursor, keys = cast(tuple[bytes, list[bytes]], (await exchange([scan]))[0])
            keys = [key for key in keys if is_id(key.decode(errors="replace").removeprefix(f"{self._prefix}:"))]
            sizes = await _numbers(exchange, [("MEMORY", "USAGE", key) for key in keys])
            lives = await _numbers(exchange, [("PTTL", key) for key in keys])
            for key, size, life in zip(keys, sizes, lives, strict=True):
                weighed.append((size * max(1.0, RETAINED_SECONDS * 1000 - life), size, key))
            if self._cursor == b"0":
                break
        return weighed


async def _numbers(exchange: Exchange, commands: Sequence[Command]) -> list[int]:
    """The answers as numbers, 0 for a key that is gone meanwhile."""
    answers = await exchange(commands) if commands else []
    return [answer if isinstance(answer, int) else 0 for answer in answers]
