"""Which messages a read returns: every read has a bound in bytes, decided before a message is loaded (I9)."""

from __future__ import annotations

from collections.abc import Sequence

READ_BYTES = 8 * 2**20
"""How many bytes of messages, as JSON, one read returns by default."""


def count_fitting(sizes: Sequence[Sequence[int]], max_bytes: int) -> list[int]:
    """Return how many of each thread's latest messages to read; `sizes` has, per thread, their bytes, latest first.

    Every thread's latest message comes before any thread's second; each thread ends at its first that does not fit.
    """
    counts = [0] * len(sizes)
    for depth in range(max(map(len, sizes), default=0)):
        for index, of_thread in enumerate(sizes):
            if counts[index] == depth < len(of_thread) and of_thread[depth] <= max_bytes:
                max_bytes -= of_thread[depth]
                counts[index] += 1
    return counts


def select_fitting(sizes: Sequence[int], max_bytes: int, running: int | None = None) -> list[int]:
    """Return the indexes of the messages to read of one thread; `sizes` has their bytes, latest first.

    The latest is always read, so that a client can continue paging; so is the one at `running`, which a reader of the
    log applies deltas to. The others end at the first that does not fit.
    """
    count = 0
    for size in sizes:
        max_bytes -= size
        if max_bytes < 0 and count:
            break
        count += 1
    chosen = list(range(count))
    if running is not None and running >= count:
        chosen.append(running)
    return chosen
