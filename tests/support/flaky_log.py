"""A Redis log whose pub/sub messages a test drops, doubles and delays."""

from __future__ import annotations

import random

from agent_chat.stores.redis.log import RedisLog
from agent_chat.stores.redis.timing import RedisTiming


class FlakyLog(RedisLog):
    """Drops, doubles or delays each pub/sub message with the probability `chance`."""

    chance = 0.0
    dropped = doubled = held = 0

    def __init__(self, url: str, *, prefix: str, random: random.Random, timing: RedisTiming) -> None:
        self._random = random
        self._held: list[tuple[bytes, bytes]] = []
        super().__init__(url, prefix=prefix, timing=timing)

    def _on_message(self, channel: bytes, payload: bytes) -> None:
        if self._random.random() >= self.chance:
            super()._on_message(channel, payload)
        else:
            match self._random.randrange(3):
                case 0:
                    self.dropped += 1
                case 1:
                    self.doubled += 1
                    super()._on_message(channel, payload)
                    super()._on_message(channel, payload)
                case _:
                    self.held += 1
                    self._held.append((channel, payload))
                    return
        while self._held:
            super()._on_message(*self._held.pop())
