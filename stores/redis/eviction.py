"""Freeing memory in a Redis that is full, whatever its eviction policy is.

With `maxmemory-policy volatile-ttl` Redis does this by itself: every log expires, and the one that has been silent
longest is evicted first. With its default, `noeviction`, it refuses every append of every organization until logs
expire, up to an hour later; so the process that gets the refusal deletes logs. Their readers get a Gap and then a
snapshot. Counting bytes per organization was refused: logs expire by themselves, so such a counter drifts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import cast

from agent_chat.stores.buffer import RETAINED_SECONDS
from agent_chat.stores.models import is_id
from agent_chat.stores.redis.connection import Command, Exchange, RedisUnreachable

logger = logging.getLogger(__name__)

_SAMPLE = 5000
_FREED_BYTES = 4 * 2**20


class LogEvictor:
    """Deletes logs when Redis is full.

    Attributes:
        evicted: the number of logs that were deleted.
        _cursor: where the next SCAN continues.
    """

    def __init__(self, prefix: str) -> None:
        self.evicted = 0
        self._prefix = prefix
        self._cursor = b"0"

    async def evict(self, exchange: Exchange) -> None:
        """Delete those logs of a sample that take the most memory for the longest silence.

        At least 4 MB or an eighth of what the sample takes; the caller retries, and calls again if that was too little.
        The weight of a log is its bytes times the time since its last event: logs that are being written stay, and many
        small logs are not deleted in favour of a large one.
        """
        try:
            weighted = await self._sample(exchange)
            goal = max(_FREED_BYTES, sum(size for _, size, _ in weighted) // 8)
            victims: list[bytes] = []
            for _, size, key in sorted(weighted, reverse=True):
                if goal <= 0:
                    break
                goal -= size
                victims.append(key)
            if victims:
                await exchange([("UNLINK", *victims)])
                self.evicted += len(victims)
        except RedisUnreachable as error:
            logger.warning("Redis is full, and no event logs could be deleted: %s", error)
            return
        logger.warning(
            "Redis is full: %d event logs deleted; raise its maxmemory and set maxmemory-policy volatile-ttl",
            len(victims),
        )

    async def _sample(self, exchange: Exchange) -> list[tuple[float, int, bytes]]:
        """Return some logs as (weight, bytes, key); the next call continues after them."""
        weighted: list[tuple[float, int, bytes]] = []
        while len(weighted) < _SAMPLE:
            scan = ("SCAN", self._cursor, "MATCH", f"{self._prefix}:*", "COUNT", "1000", "TYPE", "stream")
            self._cursor, keys = cast(tuple[bytes, list[bytes]], (await exchange([scan]))[0])
            keys = [key for key in keys if is_id(key.decode(errors="replace").removeprefix(f"{self._prefix}:"))]
            sizes = await _read_numbers(exchange, [("MEMORY", "USAGE", key) for key in keys])
            lives = await _read_numbers(exchange, [("PTTL", key) for key in keys])
            for key, size, life in zip(keys, sizes, lives, strict=True):
                weighted.append((size * max(1.0, RETAINED_SECONDS * 1000 - life), size, key))
            if self._cursor == b"0":
                break
        return weighted


async def _read_numbers(exchange: Exchange, commands: Sequence[Command]) -> list[int]:
    """Return the replies as numbers, 0 for a key that is gone meanwhile."""
    replies = await exchange(commands) if commands else []
    return [reply if isinstance(reply, int) else 0 for reply in replies]
