"""`python -m tests.bench.token_delay`: how long a token takes from the model to a client, at 50 paced streams.

The stand-in writes the time into each token; the model, the server and the client are processes of their own.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

from tests.bench.first_token import serving, show
from tests.support.client import Client, frames

STREAMS = 50
ROUNDS = 2


async def delays(client: Client, thread: str) -> list[float]:
    """Milliseconds that each token of one answer took."""
    found = []
    async with client.posting(thread, "timed") as response:
        async for frame in frames(response):
            if frame.event == "message.delta":
                now = time.time()
                found += [(now - float(sent)) * 1000 for sent in frame.data["text"].split()]
    return found


async def measure(server: Client, streams: int = STREAMS, rounds: int = ROUNDS) -> list[float]:
    threads = [await server.thread() for _ in range(streams)]
    found: list[float] = []
    for _ in range(rounds):
        for each in await asyncio.gather(*(delays(server, thread) for thread in threads)):
            found += each
    return found


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with serving(Path(folder)) as (server, _):
            found = sorted(await measure(server))
            percentiles = statistics.quantiles(found, n=100)
            show(
                f"token delay at {STREAMS} streams, {len(found)} tokens: median {percentiles[49]:.1f} ms, "
                f"p99 {percentiles[98]:.1f} ms, worst {found[-1]:.0f} ms"
            )


if __name__ == "__main__":
    asyncio.run(main())
