"""The contract of the outbox: every fact that is stored reaches the log, though the process that stored it dies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from agent_chat.stores.events import Fact
from agent_chat.stores.models import Principal

OUTBOX_FACTS = 200
"""How many facts the outbox of a thread holds; an entry names its message and takes about 100 bytes."""

OUTBOX_FACTS_READ = 50
OUTBOX_BYTES_READ = 4 * 2**20
"""How much of one outbox a call returns."""

OUTBOX_LEASE = 0.25
"""How long the process that stored a fact may take to publish it before others do, as a fraction of a run's lease."""


class Outbox(msgspec.Struct, frozen=True):
    """The facts that one thread's log is not known to contain, oldest first.

    `cut`: the thread had more unpublished facts than its outbox holds, and the oldest were dropped. Only the stored
    thread contains those, so a publisher first resets the log: every reader then starts over with a snapshot.
    """

    thread_id: str
    organization_id: str
    facts: list[Fact]
    cut: bool = False

    @property
    def principal(self) -> Principal:
        """The thread's organization; its facts have no user."""
        return Principal(self.organization_id, "")


class OutboxStore(Protocol):
    """The outboxes of all threads.

    `append_message`, `update` and `delete` of a thread add the fact that they store to its outbox in the same atomic
    write (I8). A run needs no outbox: its record exists until its terminal event is in the log (I3).

    - Publisher: the process whose write was acknowledged, immediately. After a quarter of a lease the fact goes to the
      first process that calls `take_outboxes`.
    - Removal: by `mark_published`, after the log has acknowledged the fact. A crash in between publishes it twice.
      Reducers ignore the second (I23); other consumers have to compare `fact_id`.
    - Order: the facts of a thread are returned in the order in which they were stored. A `thread.updated` replaces the
      earlier ones: it is returned with the thread's present state, and marking it as published removes them too.
      `thread.deleted` replaces everything. Two processes may publish in another order. Readers converge all the same:
      they order messages by `created_at`, and of two thread.updated the later one wins. Waiting for the facts of other
      processes was refused: it needs a read of the outbox before every append.
    - Bound: OUTBOX_FACTS per thread, see `Outbox.cut`. A full outbox never refuses a write.
    """

    async def take_outboxes(self, thread_id: str | None = None) -> list[Outbox]:
        """Take over the outboxes of every organization that have waited for a quarter of a lease.

        Each goes to one caller, and to the next caller after another quarter of a lease. At most OUTBOX_FACTS_READ
        facts or OUTBOX_BYTES_READ per outbox; the rest is returned after those are marked as published. A fact that no
        longer exists, or that cannot be decoded (which is logged), is removed, so that the others do not wait for it.

        Args:
            thread_id: take over the outbox of this thread only, however long it has waited. Its publisher does so once
                the log is reachable again, in order to publish the thread's new facts immediately.
        """
        ...

    async def mark_published(self, principal: Principal, thread_id: str, facts: Sequence[Fact]) -> None:
        """Remove these facts from the outbox. Facts that are not in it, and a deleted thread, are ignored."""
        ...
