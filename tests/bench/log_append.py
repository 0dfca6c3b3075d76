"""What an append to the embedded log costs, and what the logs of a process take.

`python -m tests.bench.log_append`: µs of CPU per append without a reader, and with one that takes each event's SSE
frame; the resident memory of 300 threads × 2,000 tokens read as SSE, and of 160 messages of 1.9 MB in 40 threads.
"""

from __future__ import annotations

import asyncio
import gc
import time
from pathlib import Path

from agent_chat.server.reading.dialects.native import sse_frame
from agent_chat.stores.embedded.log import EmbeddedLog
from agent_chat.stores.events import MessageCreated, MessageDelta
from agent_chat.stores.models import Message, new_id

_COUNT = 20_000


def rss() -> float:
    """The resident memory of this process, in MB."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


async def append(*, read: bool) -> float:
    """The best of seven: µs of CPU per append of a delta."""
    best = float("inf")
    for _ in range(7):
        log = EmbeddedLog()
        thread_id, message_id = new_id(), new_id()
        cursor = log.cursor(thread_id, await log.tail(thread_id))
        writer = log.writer(thread_id)
        deltas = [MessageDelta(message_id, n * 5, "word ") for n in range(_COUNT)]
        began = time.process_time()
        for delta in deltas:
            writer.write(delta)
            if read:
                for entry in await cursor.next():
                    _ = entry.encoded(sse_frame)
        best = min(best, (time.process_time() - began) / _COUNT * 1e6)
        cursor.close()
        await log.close()
    return best


async def tokens() -> float:
    """MB for 300 threads of 2,000 tokens, each read as SSE."""
    log, before = EmbeddedLog(), rss()
    for _ in range(300):
        thread_id, message_id = new_id(), new_id()
        cursor = log.cursor(thread_id, await log.tail(thread_id))
        writer = log.writer(thread_id)
        for n in range(2000):
            writer.write(MessageDelta(message_id, n * 5, f"tok{n % 10} "))
            for entry in await cursor.next():
                _ = entry.encoded(sse_frame)
        cursor.close()
    took = rss() - before
    await log.close()
    return took


async def posts() -> float:
    """MB for 160 messages of 1.9 MB in 40 threads."""
    log, before = EmbeddedLog(), rss()
    threads = [new_id() for _ in range(40)]
    for n in range(160):
        thread_id = threads[n % 40]
        message = Message(new_id(), thread_id, "x" * 1_900_000, "", "system", [], [], {}, "2026-01-31T12:00:00.000Z")
        log.writer(thread_id).write(MessageCreated(message))
    took = rss() - before
    await log.close()
    return took


async def main() -> None:
    print(f"append {await append(read=False):.2f} µs, read as SSE {await append(read=True):.2f} µs")  # noqa: T201
    print(f"300 threads × 2,000 tokens read as SSE: {await tokens():.0f} MB")  # noqa: T201
    print(f"160 messages of 1.9 MB in 40 threads: {await posts():.0f} MB")  # noqa: T201


if __name__ == "__main__":
    asyncio.run(main())
