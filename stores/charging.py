"""Charging an organization for the time that a store spends in its threads on behalf of a request."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

CHARGE: ContextVar[Callable[[float], None] | None] = ContextVar("charge", default=None)
"""A store calls this, in the context of a call, with the seconds for which the call occupied one of its threads."""
