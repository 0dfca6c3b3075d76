"""On whose behalf a store is called: for charging the time that it spends in its threads, and for fair queues."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

CHARGE: ContextVar[Callable[[float], None] | None] = ContextVar("charge", default=None)
"""A store calls this, in the context of a call, with the seconds for which the call occupied one of its threads."""
ORGANIZATION_ID: ContextVar[str] = ContextVar("organization_id", default="")
"""The organization that the caller serves; "" for the server's own work."""
