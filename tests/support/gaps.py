"""How long the event loop was blocked."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

STEP_SECONDS = 0.005
_SCHEDULED = Path("/proc/thread-self/schedstat")


@asynccontextmanager
async def gaps() -> AsyncIterator[list[float]]:
    """The delays of a timer of 5 ms, in seconds.

    Less what its thread spent ready to run and waiting for a processor, which the kernel counts: that is other
    processes' doing. https://docs.kernel.org/scheduler/sched-stats.html
    """
    found: list[float] = []

    async def tick() -> None:
        while True:
            begun, waited = time.monotonic(), _waited()
            await asyncio.sleep(STEP_SECONDS)
            found.append(time.monotonic() - begun - STEP_SECONDS - (_waited() - waited))

    ticking = asyncio.create_task(tick())
    try:
        yield found
    finally:
        ticking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await ticking


def _waited() -> float:
    """Seconds for which this thread has waited for a processor; 0 where the kernel does not count them."""
    try:
        return int(_SCHEDULED.read_text().split()[1]) / 1e9
    except OSError:
        return 0.0
