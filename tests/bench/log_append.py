"""What an append to the embedded log costs, and what the logs of a process take.

`python -m tests.bench.log_append`: µs of CPU per append, in memory and on disk in turn, without readers and with one
for each thread that takes each event's SSE frame; the resident memory of 300 threads × 2,000 tokens read as SSE, and of
160 messages of 1.9 MB in 40 threads.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from agent_chat.server.reading.dialects.native import sse_frame
from agent_chat.stores.buffer import Cursor
from agent_chat.stores.embedded.log import EmbeddedLog, open_embedded_log
from agent_chat.stores.events import MessageCreated, MessageDelta
from agent_chat.stores.models import Message, new_id

_COUNT = 12_000
_THREADS = 200
_ITERATION = 12
_ROUNDS = 9


def rss() -> float:
    """The resident memory of this process, in MB."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


async def opened(folder: Path | None) -> EmbeddedLog:
    """A log in a new folder inside `folder`; None for one in memory."""
    return await open_embedded_log(folder / new_id()) if folder else EmbeddedLog()


async def append(folder: Path | None, *, read: bool) -> float:
    """µs of CPU per delta of 200 threads, 12 deltas an iteration of the event loop."""
    log = await opened(folder)
    message_id, readers = new_id(), list[asyncio.Task[None]]()
    threads = [new_id() for _ in range(_THREADS)]
    writers = [log.writer(thread_id) for thread_id in threads]

    async def follow(cursor: Cursor) -> None:
        while True:
            for entry in await cursor.next():
                _ = entry.encoded(sse_frame)

    for thread_id in threads if read else []:
        readers.append(asyncio.create_task(follow(log.cursor(thread_id, await log.tail(thread_id)))))
    await asyncio.sleep(0)
    began = time.process_time()
    for number in range(_COUNT):
        writers[number % _THREADS].write(MessageDelta(message_id, number // _THREADS * 5, "word "))
        if number % _ITERATION == 0:
            await asyncio.sleep(0)
    for _ in range(5):
        await asyncio.sleep(0)
    took = (time.process_time() - began) / _COUNT * 1e6
    for reader in readers:
        reader.cancel()
    await log.close()
    return took


async def compare(folder: Path) -> None:
    """Memory and disk in turn: the best and the median of each."""
    for read in (False, True):
        runs: dict[str, list[float]] = {"memory": [], "disk": []}
        for _ in range(_ROUNDS):
            runs["memory"].append(await append(None, read=read))
            runs["disk"].append(await append(folder, read=read))
        for name, took in runs.items():
            what = "append, read as SSE" if read else "append"
            print(f"{what}, {name}: best {min(took):.2f} µs, median {statistics.median(took):.2f} µs")  # noqa: T201


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
    with TemporaryDirectory() as folder:
        await compare(Path(folder))
    print(f"300 threads × 2,000 tokens read as SSE: {await tokens():.0f} MB")  # noqa: T201
    print(f"160 messages of 1.9 MB in 40 threads: {await posts():.0f} MB")  # noqa: T201


if __name__ == "__main__":
    asyncio.run(main())
