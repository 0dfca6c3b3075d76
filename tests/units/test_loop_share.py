"""The share of the event loop that one organization may take while others are served."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable

import pytest

from agent_chat.server.errors import RateLimited
from agent_chat.server.limits import Limits
from agent_chat.server.loop_share import LoopShare, LoopShares, begin_streaming, measured, pause
from agent_chat.stores.charging import CHARGE

BURST_SECONDS = 0.05


class Clock:
    now = 1000.0
    cpu = 0.0
    """CPU time of the event loop's thread."""

    def __call__(self) -> float:
        return self.now


def shares_with(clock: Clock, **limits: float) -> LoopShares:
    wanted = {"loop_share": 0.2, "loop_target": 0.0, "loop_burst": BURST_SECONDS, "waiting": 3, **limits}
    return LoopShares(Limits(**wanted), clock=clock, cpu_clock=lambda: clock.cpu)  # type: ignore[arg-type]


async def is_immediate(work: Awaitable[None]) -> bool:
    task = asyncio.ensure_future(work)
    await asyncio.sleep(0)
    done = task.done()
    task.cancel()
    return done


async def went_on(task: asyncio.Task[None]) -> bool:
    """Within two polls."""
    await asyncio.wait({task}, timeout=0.25)
    return task.done()


async def test_alone_an_organization_may_take_all_of_the_loop() -> None:
    shares = shares_with(Clock())
    alone = shares.of("a")
    for _ in range(100):
        alone.charge(10.0)
        assert await is_immediate(alone.turn())
    assert shares.waits == 0


async def test_what_goes_beyond_the_share_is_waited_for_while_others_are_served() -> None:
    clock = Clock()
    shares = shares_with(clock)
    heavy, light = shares.of("heavy"), shares.of("light")
    heavy.charge(0.1 + BURST_SECONDS)
    light.charge(0.001)
    assert await is_immediate(light.turn())
    waiting = asyncio.create_task(heavy.turn())
    await asyncio.sleep(0)
    clock.now += 0.45
    light.charge(0.001)
    assert not await went_on(waiting)
    clock.now += 0.06  # 0.1 s of debt at a fifth of the time
    assert await went_on(waiting)
    assert shares.waits == 1


async def seconds_of_waiting(clock: Clock, shares: LoopShares, taken: float, busy: float) -> float:
    """How long a request waits after its organization took some seconds, with the loop this busy with streams."""
    heavy = shares.of("heavy")
    heavy.charge(taken + BURST_SECONDS)
    clock.cpu += taken + BURST_SECONDS
    waiting, waited = asyncio.create_task(heavy.turn()), 0.0
    while not waiting.done():
        shares.of("light").charge(0.0)
        clock.now += 0.01
        clock.cpu += 0.01 * busy
        waited += 0.01
        await asyncio.wait({waiting}, timeout=0.11)
    return waited


@pytest.mark.parametrize(("busy", "fraction"), [(0.0, 0.5), (0.2, 0.3), (0.9, 0.2)])
async def test_what_others_leave_of_half_the_loop_may_be_taken_and_at_least_a_fifth(
    busy: float, fraction: float
) -> None:
    clock = Clock()
    shares = shares_with(clock, loop_target=0.5)
    for _ in range(500):  # so that the average is known
        clock.now += 0.01
        clock.cpu += 0.01 * busy
        shares.fraction(0.0)
    waited = await seconds_of_waiting(clock, shares, 0.03, busy)
    assert waited == pytest.approx(0.03 / fraction, abs=0.03)


async def test_only_the_organization_that_takes_most_waits() -> None:
    shares = shares_with(Clock())
    heavy, moderate = shares.of("heavy"), shares.of("moderate")
    heavy.charge(2.0)
    moderate.charge(1.0)
    assert await is_immediate(moderate.turn())
    assert not await is_immediate(heavy.turn())


async def test_a_debt_ends_with_the_last_request_of_the_others() -> None:
    clock = Clock()
    shares = shares_with(clock)
    heavy = shares.of("heavy")
    shares.of("light").charge(0.001)
    heavy.charge(1000.0)
    waiting = asyncio.create_task(heavy.turn())
    await asyncio.sleep(0)
    assert not waiting.done()
    clock.now += 3.1
    assert await went_on(waiting)


async def test_requests_beyond_those_that_may_wait_are_refused_with_the_seconds() -> None:
    shares = shares_with(Clock(), waiting=3)
    heavy = shares.of("heavy")
    heavy.charge(1.0 + BURST_SECONDS)
    shares.of("light").charge(0.001)
    waiting = [asyncio.create_task(heavy.turn()) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(RateLimited) as refused:
        await heavy.turn()
    assert refused.value.retry_after == 5
    assert not await is_immediate(heavy.turn(refuse=False))
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    assert not await is_immediate(heavy.turn())  # not refused: nothing waits any more


async def test_what_waits_goes_on_in_its_order_and_one_at_a_time() -> None:
    clock = Clock()
    shares = shares_with(clock)
    heavy, order = shares.of("heavy"), list[int]()
    heavy.charge(0.01 + BURST_SECONDS)
    shares.of("light").charge(0.001)

    async def request(number: int) -> None:
        await heavy.turn()
        order.append(number)
        heavy.charge(0.02)
        await asyncio.sleep(0)

    tasks = [asyncio.create_task(request(number)) for number in range(2)]
    await asyncio.sleep(0)
    clock.now += 0.06
    assert await went_on(tasks[0])
    assert order == [0]
    clock.now += 0.11
    assert await went_on(tasks[1])
    assert order == [0, 1]


def burn(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


async def debt_of(share: LoopShare) -> float:
    return share._current_debt()


async def test_every_step_of_a_request_is_charged_and_so_are_its_tasks_and_its_threads() -> None:
    share = shares_with(Clock()).of("a")

    async def task() -> None:
        burn(0.01)
        await asyncio.sleep(0)
        burn(0.01)

    async def request() -> str:
        burn(0.01)
        await asyncio.sleep(0.02)
        await asyncio.create_task(measured(task))
        charge = CHARGE.get()
        assert charge is not None
        charge(0.5)
        return "result"

    assert await share.serve(request()) == "result"
    assert 0.53 <= await debt_of(share) < 0.6


async def test_a_stream_is_not_charged() -> None:
    share = shares_with(Clock()).of("a")

    async def request() -> str:
        begin_streaming()
        await asyncio.sleep(0)
        burn(0.1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await asyncio.Event().wait()
        return "result"

    assert await share.serve(request()) == "result"
    assert await debt_of(share) < 0.05


async def test_errors_and_cancellations_pass_through() -> None:
    share = shares_with(Clock()).of("a")

    async def fails() -> None:
        await asyncio.sleep(0)
        raise KeyError("x")

    async def times_out() -> str:
        try:
            async with asyncio.timeout(0.01):
                await asyncio.Event().wait()
        except TimeoutError:
            return "timed out"
        return "never"

    with pytest.raises(KeyError):
        await share.serve(fails())
    assert await share.serve(times_out()) == "timed out"
    cancelled = asyncio.create_task(share.serve(asyncio.Event().wait()))
    await asyncio.sleep(0)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled


async def test_requests_at_once_begin_with_what_earlier_ones_took() -> None:
    shares = shares_with(Clock())
    heavy, began = shares.of("heavy"), 0

    async def expensive() -> None:
        charge = CHARGE.get()
        assert charge is not None
        charge(0.1)

    async def waits() -> None:
        await asyncio.Event().wait()

    async def request() -> None:
        nonlocal began
        await heavy.turn()
        began += 1
        await heavy.serve(waits())

    for _ in range(20):
        await heavy.turn()
        await heavy.serve(expensive())
    await heavy.turn()
    shares.of("light").charge(0.001)
    heavy._debt = 0.0
    tasks = [asyncio.create_task(request()) for _ in range(3)]
    await asyncio.sleep(0)
    assert began == 1
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def test_the_average_cost_is_never_above_the_most_that_a_request_took_however_many_are_served_at_once() -> None:
    share = shares_with(Clock()).of("a")

    async def costing(seconds: float, last: asyncio.Event) -> None:
        charge = CHARGE.get()
        assert charge is not None
        charge(seconds)
        await last.wait()

    for seconds in (0.1, 0.001, 0.1):
        last = asyncio.Event()
        requests = [asyncio.create_task(share.serve(costing(seconds, last))) for _ in range(20)]
        await asyncio.sleep(0)
        last.set()
        await asyncio.gather(*requests)
        assert 0.0 <= share._per_request <= 0.101


async def test_the_reserve_of_a_request_that_was_cheap_is_returned_and_not_what_time_has_paid() -> None:
    clock = Clock()
    share = shares_with(clock).of("a")
    share._per_request = 1.0

    async def cheap() -> None:
        clock.now += 2.0

    await share.serve(cheap())
    assert await debt_of(share) < 0.01
    share.charge(5.0)

    async def long() -> None:
        clock.now += 10.0

    share._per_request = 1.0
    await share.serve(long())
    assert 3.9 < await debt_of(share) < 4.1


async def test_a_pause_outside_of_a_request_lets_others_run_and_no_more() -> None:
    assert await is_immediate(pause()) is False
    await pause()


async def test_organizations_that_are_gone_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_chat.server.loop_share._KNOWN", 10)
    clock = Clock()
    shares = shares_with(clock)
    for number in range(30):
        shares.of(str(number)).charge(0.001)
        clock.now += 10.0
    assert len(shares._shares) <= 11
