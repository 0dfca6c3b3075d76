"""Whether the database answers: what decides if an expired lease means that its process is dead."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from agent_chat.server.timing import Timing
from agent_chat.stores.errors import StoreDamaged, StoreUnavailable

logger = logging.getLogger(__name__)

T = TypeVar("T")


class StoreContact:
    """This process's contact with the database."""

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._lost_at = -math.inf

    @property
    def is_stable(self) -> bool:
        """Whether the database has answered every call for a full lease.

        During an outage every lease expires, and the live processes renew theirs right after it. Until a lease has
        passed, an expired lease does not prove that its process is dead.
        """
        return time.monotonic() - self._lost_at > self._timing.lease

    def lose(self) -> None:
        """Record that a call failed with StoreUnavailable."""
        self._lost_at = time.monotonic()

    async def retry(self, failure: str, call: Callable[[], Awaitable[T]]) -> T:
        """Repeat a call until the store answers.

        The pauses stay under a tenth of a lease, so that after an outage this process is well ahead of the sweepers,
        which wait for a full lease.

        Args:
            failure: what to log for each attempt that fails.

        Raises: StoreDamaged, and what `call` raises except StoreUnavailable.
        """
        pause = self._timing.store_retry
        while True:
            try:
                return await call()
            except StoreDamaged:
                raise
            except StoreUnavailable as error:
                logger.warning("%s: %s", failure, error)
                self.lose()
                await asyncio.sleep(pause)
                pause = min(pause * 2, self._timing.lease / 10)
