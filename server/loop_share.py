"""How much of the event loop each organization takes. One that takes too much is slowed down while others are served.

Requests are limited in number, but a page of 8 MB costs as much as fifty small reads. So their cost is limited too, and
it is measured, not estimated: the CPU time of every step of a request or a run, and the time for which it occupies a
thread of the embedded store. While others are served, an organization may take what they leave of a half of the time
(`Limits.loop_target`), and at least a fifth (`Limits.loop_share`). What it takes beyond that is a debt, and its next
requests wait until the debt is paid, in the order in which they came. Only the organization that takes most waits, so
that nobody waits because of another's excess; without others it may take all of the loop. A request begins with what
the organization's requests took on average, so that a hundred at once do not all begin before the first has been
measured.

Relayed tokens are not counted: runs and streams have limits of their own, and nothing is added to the path of a token.

Refused: a weight by bytes, which is wrong wherever the cost is not in the bytes (runs, rendering, parsing); a refusal
in place of the wait, since the client keeps to the rate that is documented.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

from agent_chat.server.errors import RateLimited
from agent_chat.server.limits import Limits
from agent_chat.server.timing import Timing
from agent_chat.stores.charging import CHARGE, ORGANIZATION_ID

T = TypeVar("T")
P = ParamSpec("P")

_POLL_SECONDS = 0.1
_WEIGHT_OF_LATEST = 0.2
"""Of the latest request in the average cost of an organization's requests."""
_KNOWN = 1000
"""Beyond so many organizations those that are idle are dropped."""
_WINDOW_SECONDS = 1.0

_CURRENT: ContextVar[LoopShare | None] = ContextVar("loop_share", default=None)
_MEASURED: ContextVar[_Measured[Any] | None] = ContextVar("measured", default=None)


class _Rate:
    """CPU seconds per second, averaged over about the last second."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._rate = 0.0
        self._at = clock()

    def add(self, seconds: float) -> None:
        self._rate = self.current() + seconds / _WINDOW_SECONDS

    def current(self) -> float:
        now = self._clock()
        if now > self._at:
            self._rate *= math.exp((self._at - now) / _WINDOW_SECONDS)
            self._at = now
        return self._rate


class LoopShares:
    """The shares of all organizations of a process.

    Args:
        clock: monotonic seconds.
        cpu_clock: seconds of CPU time that the event loop's thread has taken.
        others_seconds: `Timing.others`.

    Attributes:
        waits: how often a request had to wait.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.thread_time,
        others_seconds: float = Timing().others,
    ) -> None:
        self.others_seconds = others_seconds
        self.waits = 0
        self.limits = limits
        self.clock = clock
        self._cpu_clock = cpu_clock
        self._cpu = cpu_clock()
        self._rate = _Rate(clock)
        self._shares: dict[str, LoopShare] = {}
        self._latest: LoopShare | None = None
        self._latest_at = -math.inf
        self._other_at = -math.inf

    def of(self, organization_id: str) -> LoopShare:
        """Return the share of this organization."""
        share = self._shares.get(organization_id)
        if share is None:
            if len(self._shares) >= _KNOWN:
                self._shares = {name: known for name, known in self._shares.items() if not known.is_idle()}
            share = self._shares[organization_id] = LoopShare(self, organization_id)
        return share

    def count_step(self, share: LoopShare, now: float) -> None:
        """Note that this organization is being served."""
        if share is not self._latest:
            self._latest, self._other_at = share, self._latest_at
        self._latest_at = now

    def fraction(self, rate: float) -> float:
        """Return the fraction of the time that an organization with this rate may take while others are served."""
        cpu = self._cpu_clock()
        self._rate.add(cpu - self._cpu)
        self._cpu = cpu
        return max(self.limits.loop_share, self.limits.loop_target - max(0.0, self._rate.current() - rate))

    def takes_most(self, share: LoopShare) -> bool:
        """Whether no other organization has taken more of the loop lately: only the one that takes most waits."""
        return share.rate >= max((other.rate for other in self._shares.values()), default=0.0)

    def has_others(self, share: LoopShare) -> bool:
        """Whether another organization is being served."""
        last = self._other_at if share is self._latest else self._latest_at
        return self.clock() - last < self.others_seconds


class LoopShare:
    """What one organization took of the event loop and has not paid for yet, in seconds."""

    def __init__(self, all: LoopShares, organization_id: str) -> None:
        self._organization_id = organization_id
        self._all = all
        self._rate = _Rate(all.clock)
        self._debt = 0.0
        self._debt_at = all.clock()
        self._per_request = 0.0
        self._waiting = 0
        self._first = asyncio.Lock()  # of those that wait

    def is_idle(self) -> bool:
        """Whether it has used nothing lately and nothing waits for it."""
        return (
            not self._waiting
            and self._debt_at < self._all.clock() - self._all.others_seconds
            and not self._current_debt()
        )

    def charge(self, seconds: float) -> None:
        """Count CPU time that was taken for this organization."""
        self._rate.add(seconds)
        self._owe(seconds)

    def _owe(self, seconds: float) -> None:
        self._all.count_step(self, self._all.clock())
        self._debt = max(0.0, self._current_debt() + seconds)

    @property
    def rate(self) -> float:
        """CPU seconds per second that were taken lately."""
        return self._rate.current()

    def _fraction(self) -> float:
        return self._all.fraction(self.rate)

    def _current_debt(self) -> float:
        """It shrinks by the organization's fraction of the time that passes."""
        now = self._all.clock()
        if self._debt:
            self._debt = max(0.0, self._debt - (now - self._debt_at) * self._fraction())
        self._debt_at = now
        return self._debt

    def _wait_seconds(self) -> float:
        debt, burst = self._current_debt(), self._all.limits.loop_burst
        if debt > burst and not (self._all.has_others(self) and self._all.takes_most(self)):
            self._debt = debt = burst
        return max(0.0, debt - burst) / self._fraction()

    async def turn(self, *, refuse: bool = True) -> None:
        """Wait until the organization may take more of the loop.

        Args:
            refuse: raise if as many requests wait already as may.

        Raises: RateLimited.
        """
        if not self._waiting and not self._wait_seconds():
            return
        most = self._all.limits.waiting
        if refuse and self._waiting >= most:
            raise RateLimited("requests waiting for their turn", most, max(1, math.ceil(self._wait_seconds())))
        self._all.waits += 1
        self._waiting += 1
        try:
            async with self._first:
                await self._until_paid()
        finally:
            self._waiting -= 1

    async def _until_paid(self) -> None:
        while wait := self._wait_seconds():  # noqa: ASYNC110 (it waits for time to pass)
            await asyncio.sleep(min(wait, _POLL_SECONDS))

    async def serve(self, request: Awaitable[T]) -> T:
        """Serve a request and charge what it takes, at first what requests took on average."""
        expected, began = self._per_request, self._all.clock()
        took = 0.0

        def charge(seconds: float) -> None:
            nonlocal took
            took += seconds
            self.charge(seconds)

        self._owe(expected)
        try:
            return await self._measure(request, charge)
        finally:
            unpaid = expected - (self._all.clock() - began) * self._fraction()
            self._owe(-max(0.0, unpaid))
            self._per_request += (took - self._per_request) * _WEIGHT_OF_LATEST

    async def serve_socket(self, socket: Awaitable[T]) -> T:
        """Serve a WebSocket and charge what it takes."""
        return await self._measure(socket, self.charge)

    async def _measure(self, work: Awaitable[T], charge: Callable[[float], None]) -> T:
        _CURRENT.set(self)
        CHARGE.set(charge)
        ORGANIZATION_ID.set(self._organization_id)
        return await _Measured(charge, work)


class _Measured(Awaitable[T]):
    """Does some work, and charges the CPU time of each of its steps until it is `is_streaming`."""

    def __init__(self, charge: Callable[[float], None], work: Awaitable[T]) -> None:
        self.is_streaming = False
        self._charge = charge
        self._work = work

    def __await__(self) -> Generator[Any, Any, T]:
        _MEASURED.set(self)
        steps, charge, clock = self._work.__await__(), self._charge, time.thread_time
        error: BaseException | None = None
        while not self.is_streaming or error is not None:
            began = clock()
            try:
                waits_for = next(steps) if error is None else steps.throw(error)
            except StopIteration as end:
                result: T = end.value
                return result
            finally:
                charge(clock() - began)
            error = None
            try:
                yield waits_for
            except BaseException as thrown:
                error = thrown
            del waits_for  # a stream that follows must not keep the result, which may have megabytes
        return (yield from steps)


def measured(work: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T]:
    """The call as the coroutine of a task, charged to the organization in whose request the task is created."""
    charge = CHARGE.get()
    if charge is None:
        return work(*args, **kwargs)

    async def charged() -> T:
        return await _Measured(charge, work(*args, **kwargs))

    charged.__qualname__ = work.__qualname__  # which asyncio shows of a task
    return charged()


def begin_streaming() -> None:
    """Charge no more steps of this task: from here on it relays a stream."""
    if (work := _MEASURED.get()) is not None:
        work.is_streaming = True


async def pause() -> None:
    """Let others run, in the middle of something long; until it is the organization's turn again."""
    await asyncio.sleep(0)
    if (share := _CURRENT.get()) is not None:
        await share.turn(refuse=False)
