"""Usage: its totals for clients, and the loop that rolls up the rows of days long ago."""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta

from agent_chat.server.errors import InvalidRequest
from agent_chat.stores.contracts import Store
from agent_chat.stores.contracts.usage import UsageGroup, UsageTotal
from agent_chat.stores.errors import StoreUnavailable
from agent_chat.stores.models import Clock, Principal, utcnow

logger = logging.getLogger(__name__)

ROW_DAYS = 90
"""For how many days each run has a row of its own."""
DAYS = 30
"""How many days a request gets that names no first day."""


class Usage:
    """What the runs of each organization consumed."""

    def __init__(self, store: Store, *, sweep: float, clock: Clock = utcnow) -> None:
        self._store = store
        self._sweep = sweep
        self._clock = clock

    async def sum_up(
        self,
        principal: Principal,
        *,
        first_day: str | None,
        last_day: str | None,
        group_by: UsageGroup,
        limit: int,
        offset: int,
    ) -> list[UsageTotal]:
        """Return the organization's totals, by default of the last 30 days. Raises: InvalidRequest."""
        last_day = last_day or self._day(0)
        first_day = first_day or min(self._day(DAYS - 1), last_day)
        if first_day > last_day:
            raise InvalidRequest("from", "from must not be later than to.")
        return await self._store.sum_usage(
            principal, first_day=first_day, last_day=last_day, group_by=group_by, limit=limit, offset=offset
        )

    async def sweep(self) -> None:
        """Roll up the rows of more than 90 days ago. Raises: StoreUnavailable."""
        while await self._store.roll_up_usage(self._day(ROW_DAYS)):
            pass

    async def sweep_forever(self) -> None:
        """Sweep immediately, then at each interval; failures are logged."""
        while True:
            try:
                await self.sweep()
            except StoreUnavailable as error:
                logger.warning("usage could not be rolled up: %s", error)
            await asyncio.sleep(self._sweep)

    def _day(self, ago: int) -> str:
        return (self._clock().date() - timedelta(days=ago)).isoformat()
