"""Turns are shared fairly: whoever sends much waits for itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from agent_chat.server.files.turns import QueueFull, Turns


class Worker:
    """Takes turns, and holds each until it is told to leave."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.served: list[str] = []
        self._leave = asyncio.Semaphore(0)

    async def take(self, organization: str, weight: int = 1, *, bounded: bool = True) -> None:
        async with self.turns.turn(organization, weight, bounded=bounded):
            self.served.append(organization)
            await self._leave.acquire()

    async def leave(self, count: int = 1) -> None:
        for _ in range(count):
            self._leave.release()
            await steps()


async def steps() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@asynccontextmanager
async def taking(worker: Worker, organizations: str) -> AsyncIterator[list[asyncio.Task[None]]]:
    """One turn asked for each letter, in this order."""
    tasks = [asyncio.create_task(worker.take(name)) for name in organizations]
    await steps()
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=5)


async def test_organizations_take_turns_whatever_one_of_them_has_waiting() -> None:
    worker = Worker(Turns(1, max_waiting=100))
    async with taking(worker, "AAAAAABBC"):
        assert (worker.turns.running, worker.turns.waiting) == (1, 8)
        await worker.leave(8)
        assert "".join(worker.served) == "AABCABAAA"


async def test_one_organization_never_holds_every_slot() -> None:
    worker = Worker(Turns(3, max_waiting=100))
    async with taking(worker, "AAAA") as tasks:
        assert worker.served == ["A", "A"]
        async with taking(worker, "B"):
            assert worker.served == ["A", "A", "B"]
        assert not tasks[2].done()


async def test_what_waits_of_one_organization_is_bounded_and_another_is_not_refused() -> None:
    worker = Worker(Turns(1, max_waiting=3))
    async with taking(worker, "AAAA"):
        with pytest.raises(QueueFull):
            await worker.take("A")
        assert worker.turns.refused == 1
        async with taking(worker, "B"):
            assert worker.turns.waiting == 4
            unbounded = asyncio.create_task(worker.take("A", bounded=False))
            await steps()
            assert worker.turns.waiting == 5
            unbounded.cancel()


async def test_a_single_request_may_weigh_more_than_may_wait() -> None:
    worker = Worker(Turns(1, max_waiting=3))
    async with taking(worker, "A") as tasks:
        tasks.append(asyncio.create_task(worker.take("A", 10)))
        await steps()
        with pytest.raises(QueueFull):
            await worker.take("A", 1)
        await worker.leave()
        assert worker.served == ["A", "A"]


async def test_a_turn_that_is_cancelled_as_it_is_given_goes_to_the_next() -> None:
    worker = Worker(Turns(1, max_waiting=100))
    async with taking(worker, "ABC") as (first, second, _):
        first.cancel()
        await asyncio.sleep(0)  # now the second has the turn and has not run yet
        second.cancel()
        await steps()
        assert worker.served == ["A", "C"]


async def test_nothing_is_kept_of_organizations_that_have_left() -> None:
    turns = Turns(2, max_waiting=100)
    worker = Worker(turns)
    async with taking(worker, "AABBCC"):
        emptied = asyncio.create_task(turns.wait_until_idle())
        await steps()
        assert not emptied.done()
    async with asyncio.timeout(1):
        await emptied
    assert not turns._running
    assert not turns._queues
    assert not turns._weights
