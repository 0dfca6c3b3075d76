"""`python -m tests.bench.many_streams`: 1,000 streams of one model client, all open at the same time."""

from __future__ import annotations

import asyncio
import time

from tests.bench.first_token import show
from tests.support.anthropic_api import stand_in
from tests.support.claude_runs import streams_at_once

STREAMS = 1_000


async def main() -> None:
    async with stand_in() as service:
        began = time.perf_counter()
        await streams_at_once(service, STREAMS)
        show(f"{STREAMS} streams were open at the same time, in {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    asyncio.run(main())
