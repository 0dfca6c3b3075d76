"""A fair queue: slots at something scarce (worker processes), shared by organizations.

Round robin over the organizations that wait, first come first served within one. Of several slots an organization never
holds all, so that the first request of another organization does not wait for a long one. The queue of each
organization is bounded. A semaphore was refused: it serves the organization that sends the most.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

Waiter = asyncio.Future[None]


class QueueFull(Exception):
    """The organization's queue is full."""


class Turns:
    """Slots for several organizations.

    Args:
        slots: how many turns run at the same time.
        max_waiting: the largest total weight in one organization's queue.

    Attributes:
        refused: number of requests that met a full queue.
    """

    def __init__(self, slots: int, *, max_waiting: int) -> None:
        self.refused = 0
        self._slots = slots
        self._max_waiting = max_waiting
        self._share = max(1, slots - 1)
        self._running: Counter[str] = Counter()
        self._queues: dict[str, deque[Waiter]] = {}
        """By organization, the one whose turn is next first."""
        self._weights: Counter[str] = Counter()
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def running(self) -> int:
        """How many turns are taken."""
        return self._running.total()

    @property
    def waiting(self) -> int:
        """How many wait for a turn."""
        return sum(map(len, self._queues.values()))

    @asynccontextmanager
    async def turn(self, organization_id: str, weight: int = 1, *, bounded: bool = True) -> AsyncIterator[None]:
        """Wait for a slot and hold it for the duration of the context.

        Args:
            weight: what the request counts in its organization's queue while it waits.
            bounded: False for requests that must not be refused; the caller bounds their number in another way.

        Raises:
            QueueFull: the queue is not empty and has no room for this weight.
        """
        await self._enter(organization_id, weight, bounded)
        try:
            yield
        finally:
            self._leave(organization_id)

    async def wait_until_idle(self) -> None:
        """Wait until no slot is held and no request waits."""
        await self._empty.wait()

    async def _enter(self, organization_id: str, weight: int, bounded: bool) -> None:
        if organization_id not in self._queues and self._may_run(organization_id):
            self._start(organization_id)
            return
        waiting = self._weights[organization_id]
        if bounded and waiting and waiting + weight > self._max_waiting:
            self.refused += 1
            raise QueueFull
        turn: Waiter = asyncio.get_running_loop().create_future()
        self._queues.setdefault(organization_id, deque()).append(turn)
        self._weights[organization_id] += weight
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._withdraw(organization_id, turn)
            else:  # the slot was assigned in the same iteration of the event loop
                self._leave(organization_id)
            raise
        finally:
            self._weights[organization_id] -= weight
            if not self._weights[organization_id]:
                del self._weights[organization_id]

    def _may_run(self, organization_id: str) -> bool:
        return self.running < self._slots and self._running[organization_id] < self._share

    def _start(self, organization_id: str) -> None:
        self._running[organization_id] += 1
        self._empty.clear()

    def _withdraw(self, organization_id: str, turn: Waiter) -> None:
        queue = self._queues.get(organization_id, deque())
        if turn in queue:
            queue.remove(turn)
            if not queue:
                del self._queues[organization_id]

    def _leave(self, organization_id: str) -> None:
        self._running[organization_id] -= 1
        if not self._running[organization_id]:
            del self._running[organization_id]
        while (following := next(filter(self._may_run, self._queues), None)) is not None:
            queue = self._queues.pop(following)
            turn = queue.popleft()
            if queue:
                self._queues[following] = queue  # behind the others
            if not turn.done():  # otherwise it was cancelled and is about to withdraw
                self._start(following)
                turn.set_result(None)
        if not self._running and not self._queues:
            self._empty.set()
