"""The contract of usage: what each run consumed, and its totals.

A run has one row, whose id is the run's. `ThreadStore.delete_record` stores it before the run's record is deleted: a
process that dies in between leaves the record, and the repair stores the row (I25). Rows outlive their threads. Those
of a day long ago are replaced by fewer, by organization, user, agent, model and status, with the same totals.
"""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

from agent_chat.stores.models import Message, Principal

UsageGroup = Literal["day", "agent", "model", "user"]
"""What totals are computed for each of."""

TOKEN_KINDS = ("input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
_MOST = 2**53
"""A larger number of tokens is no number of tokens."""


class UsageRow(msgspec.Struct, frozen=True):
    """What one run consumed. `day`: the UTC day on which it ended; `id` is the run's id."""

    id: str
    organization_id: str
    user_id: str
    agent_id: str
    thread_id: str
    model: str | None
    day: str
    status: str
    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    tool_calls: int


class UsageTotal(msgspec.Struct, frozen=True):
    """The totals of the runs that have `key` in common: a day, the id of an agent or a user, or a model.

    A key of null stands for runs without a model.
    """

    key: str | None
    runs: int
    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    tool_calls: int


COUNTS = ("runs", *TOKEN_KINDS, "tool_calls")
"""The names of the numbers of a total."""


def build_usage(principal: Principal, agent_id: str, message: Message, day: str) -> UsageRow:
    """Build the row of the run that made this message."""
    run = message.run or {}
    usage = run.get("usage")
    found = usage if isinstance(usage, dict) else {}
    tokens = {name: _count(found.get(name)) for name in TOKEN_KINDS}
    return UsageRow(
        id=message.id,
        organization_id=principal.organization_id,
        user_id=principal.user_id,
        agent_id=agent_id,
        thread_id=message.thread_id,
        model=run.get("model"),
        day=day,
        status=message.status or "failed",
        tool_calls=len(message.tool_calls),
        **tokens,
    )


def _count(value: object) -> int:
    return value if type(value) is int and 0 <= value <= _MOST else 0


class UsageStore(Protocol):
    """Totals of what the runs of an organization consumed."""

    async def sum_usage(
        self, principal: Principal, *, first_day: str, last_day: str, group_by: UsageGroup, limit: int, offset: int
    ) -> list[UsageTotal]:
        """Return the organization's totals from `first_day` to `last_day`, both included, ordered by key."""
        ...

    async def roll_up_usage(self, before: str) -> bool:
        """Replace rows of some day before this one by rows with their sums, of every organization.

        Returns: whether it did; False if there are none left. The totals are the same at any time, whatever dies.
        """
        ...
