"""Numbers that parts of the server count, and /metrics reads."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

from agent_chat.stores.models import Message

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Upper bounds of the buckets of a duration, in seconds."""

_TOKENS = ("input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")


class Durations:
    """A histogram of durations.

    Attributes:
        counts: how many durations fell into each bucket, not cumulated; the last one is above all bounds.
        seconds: the sum of all durations.
    """

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.seconds = 0.0

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds

    def cumulated(self) -> list[tuple[str, float]]:
        """The buckets in the form of Prometheus: each count includes those of the smaller buckets."""
        total, buckets = 0, []
        for bound, count in zip([*map(str, BOUNDS), "+Inf"], self.counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        return buckets


class RunStatistics:
    """How the runs ended whose finished message this process stored.

    Attributes:
        ended: runs by status.
        failures: failed runs by their error's code.
        tokens: tokens that models reported, by kind.
        tool_calls: tool calls by outcome.
        first_text: the time from a run's start to its first text.
    """

    def __init__(self) -> None:
        self.ended: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.tool_calls: Counter[str] = Counter()
        self.first_text = Durations()

    def count(self, message: Message, interrupted_calls: int) -> None:
        """Count a finished message, of whose tool calls `interrupted_calls` were open when the run ended."""
        run = message.run or {}
        self.ended[message.status or "failed"] += 1
        if error := run.get("error"):
            self.failures[error["code"]] += 1
        usage = run.get("usage") or {}
        for kind in _TOKENS:
            if isinstance(number := usage.get(kind), int):
                self.tokens[kind.removesuffix("_tokens")] += number
        failed = sum(call.error is not None for call in message.tool_calls) - interrupted_calls
        self.tool_calls["interrupted"] += interrupted_calls
        self.tool_calls["failed"] += failed
        self.tool_calls["succeeded"] += len(message.tool_calls) - failed - interrupted_calls
