"""The contract of the log: one log per thread, which all processes append to and read."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Protocol

from agent_chat.stores.budget import LogBudget
from agent_chat.stores.buffer import Cursor, Entry
from agent_chat.stores.events import Event, MessageSnapshot


class LogWriter(Protocol):
    """A writer of one thread's log: a run, or a request that publishes a fact."""

    def write(self, event: Event) -> None:
        """Append the event after the earlier ones of this writer. Never waits: pending deltas are joined.

        Raises: LogDeleted once the log is known to have had its last entry.
        """
        ...

    async def flush(self) -> None:
        """Wait until everything written is in the log. Raises: LogDeleted, LogUnavailable."""
        ...


class EventLog(Protocol):
    """One log per thread, with any number of writers and readers in any process.

    A log retains 10,000 events or 8 MB, each for an hour at least (I18). While it is unreachable, its calls
    raise `LogUnavailable` within 2 s (I19), and callers continue with what the store contains. So does the `next` of a
    cursor that has to read, which may be called again; a cursor that has read everything keeps waiting.
    """

    @property
    def unreachable(self) -> bool:
        """True while the log accepts no events."""
        ...

    @property
    def failures(self) -> int:
        """The number of attempts to append that have failed since the log was opened."""
        ...

    @property
    def volatile(self) -> bool:
        """True while events are published, but only in the memory of this process: its disk takes no writes."""
        ...

    @property
    def disk_bytes(self) -> int:
        """What the log takes on the disk of this process."""
        ...

    @property
    def budget(self) -> LogBudget:
        """The memory of all logs of this process: their newest entries, for readers that follow or resume."""
        ...

    def writer(self, thread_id: str, snapshot: Callable[[], MessageSnapshot] | None = None) -> LogWriter:
        """Return a new writer.

        Args:
            snapshot: builds the whole message of the run that writes, for where the writer's last entry is gone from
                the log: it is appended in place of the pending parts (I15).

        Once another writer has appended the terminal event of the run that this writer writes for, nothing more of the
        run is appended (I16): a process may have been paused while another one ended its run.
        """
        ...

    async def tail(self, thread_id: str) -> str:
        """Return the position of the last entry. A log that does not exist gets a hidden first entry."""
        ...

    def cursor(self, thread_id: str, after: str) -> Cursor:
        """Return a reader of everything after the position (I13)."""
        ...

    def backwards(self, thread_id: str, position: str | None = None) -> AsyncGenerator[Entry]:
        """Yield the entries from `position` back to the oldest, newest first; for None from the last one.

        Close the generator if it is not read to its end (`contextlib.aclosing`).

        Raises: Gap if the position is not in the log; Gap after the oldest entry if entries were evicted since
            `position` was the last one: what a reader gets after it may then not connect with these entries.
        """
        ...

    async def reset(self, thread_id: str) -> None:
        """Discard the log's entries: every reader gets a Gap, and reads what is appended next after its snapshot.

        For facts that only the store contains any more. A log that has had its last entry is left as it is.

        Raises: LogUnavailable.
        """
        ...

    async def signal(self, run_id: str) -> None:
        """Ask the process that has this run to read its record now. A signal may be lost; the record is decisive."""
        ...

    def on_signal(self, callback: Callable[[str], None]) -> None:
        """Call `callback(run_id)` for every signal, in the event loop."""
        ...

    async def close(self) -> None:
        """Close the log: every cursor gets a Gap."""
        ...
