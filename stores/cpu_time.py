"""Who pays for the CPU time that a store spends in threads on behalf of a request."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

CPU_TIME: ContextVar[Callable[[float], None] | None] = ContextVar("cpu_time", default=None)
"""A store calls this with the seconds that a call took in its threads, in the context of that call."""
