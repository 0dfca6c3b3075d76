"""How many bytes organizations may store. Everything counts, and no message costs a write for it.

A process reserves a piece of the organization's quota in the database and spends it locally. A run's answer is stored
even if it exceeds the quota; the next request that stores something pays for it first. The sweeper's correction does
not know of pieces that are not spent yet, so an organization can exceed its quota by one piece per process.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import msgspec

from agent_chat.server.errors import StorageFull
from agent_chat.stores.contracts.storage import Storage
from agent_chat.stores.errors import StoreUnavailable

PIECE_BYTES = 16 * 2**20


class Quota:
    """The organizations' quotas, and the pieces of them that this process has reserved.

    Args:
        limit: how many bytes one organization may store in all.
    """

    def __init__(self, store: Storage, limit: int) -> None:
        self._store = store
        self._limit = limit
        self._piece = min(PIECE_BYTES, limit // 100)
        self._unspent: defaultdict[str, int] = defaultdict(int)
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def spend(self, organization_id: str, count: int) -> None:
        """Take bytes for something that is about to be stored. Raises: StorageFull, StoreUnavailable."""
        async with self._locks[organization_id]:
            need = count - self._unspent[organization_id]
            if need > 0:
                granted = await self._store.reserve_bytes(organization_id, need, max(need, self._piece), self._limit)
                if not granted:
                    raise StorageFull(self._limit)
                self._unspent[organization_id] += granted
            self._unspent[organization_id] -= count

    @asynccontextmanager
    async def spending(self, organization_id: str, count: int) -> AsyncIterator[Spent]:
        """Spend bytes for what the block stores.

        They are returned if the block raises, except StoreUnavailable: then it may be stored all the same.

        Raises: StorageFull, StoreUnavailable.
        """
        await self.spend(organization_id, count)
        spent = Spent(self, organization_id, count)
        try:
            yield spent
        except StoreUnavailable:
            raise
        except BaseException:
            spent.give_back()
            raise

    def charge(self, organization_id: str, count: int) -> None:
        """Spend bytes for what is stored already, beyond the quota if necessary; a negative count returns bytes."""
        self._unspent[organization_id] -= count

    async def reserve(self, organization_id: str, count: int) -> None:
        """Reserve exactly so many bytes in the database. If they exceed the quota, unspent pieces are returned first.

        Raises: StorageFull, StoreUnavailable.
        """
        if not count or await self._store.reserve_bytes(organization_id, count, count, self._limit):
            return
        await self._return_unspent(organization_id)
        if not await self._store.reserve_bytes(organization_id, count, count, self._limit):
            raise StorageFull(self._limit)

    async def _return_unspent(self, organization_id: str) -> None:
        async with self._locks[organization_id]:
            unspent = self._unspent.pop(organization_id, 0)
            await self._store.release_bytes(organization_id, unspent)

    async def close(self) -> None:
        """Return the unspent pieces."""
        with suppress(StoreUnavailable):  # the sweeper corrects the number later
            for organization_id in list(self._unspent):
                await self._return_unspent(organization_id)


class Spent:
    """Bytes that were spent for one write."""

    def __init__(self, quota: Quota, organization_id: str, count: int) -> None:
        self._quota = quota
        self._organization_id = organization_id
        self._count = count

    def give_back(self) -> None:
        """Return the bytes: nothing was stored."""
        self._quota.charge(self._organization_id, -self._count)
        self._count = 0


def size_of(value: msgspec.Struct) -> int:
    """Roughly how many bytes storing it takes."""
    return len(msgspec.json.encode(value))
