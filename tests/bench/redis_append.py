"""What the log in Redis costs this process, in microseconds of CPU: `python -m tests.bench.redis_append`.

A driver has each of 200 runs say `--rate` tokens a second, a tenth of the runs at each of its ticks, by one RedisLog;
then the same with viewers that follow them in the same process. Redis' own CPU is not in the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time

import uvloop

from agent_chat.server.reading.dialects.native import sse_frame
from agent_chat.stores.contracts import LogWriter
from agent_chat.stores.events import MessageDelta
from agent_chat.stores.models import new_id
from agent_chat.stores.redis.log import RedisLog
from tests.support.services import running_redis

_GROUPS = 10
_WORD = "word "


async def drive(writers: list[LogWriter], rate: float, tokens: int) -> float:
    """Say it all; the CPU seconds from the first token until all of it is in the log."""
    began, cpu = time.perf_counter(), time.process_time()
    message_id = new_id()
    for tick in range(tokens * _GROUPS):
        await asyncio.sleep(max(0.0, began + tick / rate / _GROUPS - time.perf_counter()))
        n, group = divmod(tick, _GROUPS)
        for writer in writers[group::_GROUPS]:
            writer.write(MessageDelta(message_id, n * len(_WORD), _WORD))
    for writer in writers:
        await writer.flush()
    return time.process_time() - cpu


async def view(log: RedisLog, thread_id: str, start: str, tokens: int) -> int:
    """Follow until every token came, joining what a stream would write; the number of events that brought them."""
    cursor, came, events = log.cursor(thread_id, start), 0, 0
    while came < tokens:
        entries = await cursor.next()
        events += len(entries)
        came += b"".join([entry.encoded(sse_frame) for entry in entries]).count(_WORD.encode())
    cursor.close()
    return events


async def measure(runs: int, viewers: int, seconds: float, rate: float, spacing: float) -> None:
    tokens = int(seconds * rate)
    async with running_redis() as server:
        log = RedisLog(server.url, prefix="bench", spacing=spacing)
        threads = [new_id() for _ in range(runs)]
        writers: list[LogWriter] = [log.writer(thread_id) for thread_id in threads]
        writing = await drive(writers, rate, tokens)
        starts = [await log.tail(thread_id) for thread_id in threads]
        reading = [
            asyncio.create_task(view(log, thread_id, start, tokens))
            for thread_id, start in zip(threads, starts, strict=True)
            for _ in range(viewers)
        ]
        await asyncio.sleep(0.5)
        cpu = time.process_time()
        await drive(writers, rate, tokens)
        events = sum(await asyncio.gather(*reading))
        both = time.process_time() - cpu
        await log.close()
    appends = max(1, events // max(1, viewers))
    sys.stdout.write(
        f"{runs} runs, {rate:g} tokens/s, spacing {spacing * 1000:g} ms, {viewers} viewers each: "
        f"{appends / (runs * tokens):.2f} appends per token; "
        f"{writing / (runs * tokens) * 1e6:.1f} µs per token, {writing / appends * 1e6:.1f} µs per append; "
        f"delivery {(both - writing) / max(1, events) * 1e6:.1f} µs per event and viewer\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--viewers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rate", type=float, default=20.0)
    parser.add_argument("--spacing", type=float, default=0.0)
    args = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(measure(args.runs, args.viewers, args.seconds, args.rate, args.spacing))


if __name__ == "__main__":
    main()
