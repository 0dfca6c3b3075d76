"""Which messages a page of threads has room for."""

from __future__ import annotations

from collections.abc import Sequence


def fitting(sizes: Sequence[Sequence[int]], max_bytes: int) -> list[int]:
    """How many of each thread's latest messages to read; `sizes` has, per thread, their bytes, latest first.

    Every thread's latest comes before any thread's second; a thread ends at its first message that doesn't fit.
    """
    counts = [0] * len(sizes)
    for depth in range(max(map(len, sizes), default=0)):
        for index, of_thread in enumerate(sizes):
            if counts[index] == depth < len(of_thread) and of_thread[depth] <= max_bytes:
                max_bytes -= of_thread[depth]
                counts[index] += 1
    return counts
