"""The contracts that every backend keeps: Protocols, one module per noun, and the invariants behind them.

No invariant needs more than one atomic document write (stores) or one atomic script (log). That is what MongoDB and
Redis can guarantee; SQLite and the log in files must not promise more. One test suite per contract runs on every
backend.

A *fact* is an event that is stored before it is published and starts no run: `message.created`, `thread.updated`,
`thread.deleted`.

The code that keeps an invariant and the tests of it cite its number:

Stores
    I1. A call sees and changes only the organization of its principal. Another organization's object is not found.
    I2. A thread has at most one run. `claim` appends both messages and takes the thread in one atomic write.
    I3. A run has a record, with a lease, from before its claim until its terminal event is in the log.
    I4. `finish` is a compare-and-set: one of any number of finishers wins, and only it publishes the terminal event.
    I5. An expired run is handed to one process. Leases use the database's clock.
    I6. An Idempotency-Key stores once per user and thread (new threads: per user and agent) within 24 hours.
    I7. In a thread, `created_at` increases from message to message, and `updated_at` with every write except
        checkpoints.
    I8. A fact is in its thread's outbox from the write that stores it until the log has acknowledged it.
    I9. A read has a bound in bytes, decided before a message is loaded.
    I10. A blob has a record or a pending removal, whatever process dies.
    I11. Secrets are stored as hashes.

Log
    I12. A position is an opaque id, never used twice, compared only for equality.
    I13. What follows a position is returned whole, in order and byte for byte, or `Gap` is raised.
    I14. An event is appended once, after the earlier events of its writer, though the append is retried.
    I15. A writer whose last entry is gone appends a snapshot of its message in place of the parts that are pending.
    I16. After a run's terminal event no other writer appends an event of that run.
    I17. `thread.deleted` is a log's last entry.
    I18. A log is bounded in events, bytes and time, and all logs of a process together in bytes.
    I19. While the log is unreachable, every call except `flush` ends within 2 s; what is written is sent later.
    I20. An event is encoded once per process, and each of its wire forms once for all viewers that are up to date.

Events
    I21. Facts and terminal events are stored before they are published.
    I22. `fold` of a run's events without its terminal event has the content, the tool calls and the reasoning of the
         stored message.
    I23. Applying an event twice changes nothing.

Ids and usage
    I24. An external id names at most one thread of a user with an agent. Deleting the thread releases it.
    I25. A run whose message is stored has one usage row once its record is deleted, whatever process dies.
"""

from __future__ import annotations

from typing import Protocol

from agent_chat.stores.contracts.directory import SESSIONS_PER_KEY, AgentPage, Directory
from agent_chat.stores.contracts.log import EventLog, LogWriter
from agent_chat.stores.contracts.outbox import (
    OUTBOX_BYTES_READ,
    OUTBOX_FACTS,
    OUTBOX_FACTS_READ,
    OUTBOX_LEASE,
    Outbox,
    OutboxStore,
)
from agent_chat.stores.contracts.storage import BlobRemoval, Storage
from agent_chat.stores.contracts.threads import (
    LEASE_SECONDS,
    Created,
    Finished,
    Lease,
    MessagePage,
    Posted,
    ThreadPage,
    ThreadPart,
    ThreadStore,
)
from agent_chat.stores.contracts.usage import UsageRow, UsageStore, UsageTotal

__all__ = [
    "LEASE_SECONDS",
    "OUTBOX_BYTES_READ",
    "OUTBOX_FACTS",
    "OUTBOX_FACTS_READ",
    "OUTBOX_LEASE",
    "SESSIONS_PER_KEY",
    "AgentPage",
    "BlobRemoval",
    "Created",
    "Directory",
    "EventLog",
    "Finished",
    "Lease",
    "LogWriter",
    "MessagePage",
    "Outbox",
    "OutboxStore",
    "Posted",
    "Storage",
    "Store",
    "ThreadPage",
    "ThreadPart",
    "ThreadStore",
    "UsageRow",
    "UsageStore",
    "UsageTotal",
]


class Store(Directory, ThreadStore, Storage, UsageStore, Protocol):
    """One database: all its contracts, and its lifetime.

    Any call of any of them may raise `StoreUnavailable`.
    """

    @property
    def failures(self) -> int:
        """The number of calls that have failed with StoreUnavailable since the store was opened."""
        ...

    async def ready(self) -> bool:
        """Return True if the database responds and its last write succeeded, or a write succeeds now."""
        ...

    async def close(self) -> None:
        """Close the database."""
        ...
