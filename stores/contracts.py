"""The contracts: Protocols whose docstrings are the law. One suite per contract tests every backend.

No promise here needs more than one atomic document write (ThreadStore) or one atomic script (EventLog): that is
what MongoDB and Redis can keep, and SQLite and memory must not promise more.

Every ThreadStore and Directory call takes the Principal (or the organization) first; another organization's
object is not found. A call may raise `StoreUnavailable` when the database does not answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import msgspec

from agent_chat.stores.budget import LogBudget
from agent_chat.stores.buffer import Cursor
from agent_chat.stores.events import Event, Fact, MessageSnapshot
from agent_chat.stores.fitting import READ_BYTES
from agent_chat.stores.models import (
    Agent,
    Idempotency,
    Key,
    KeySource,
    Message,
    Organization,
    Principal,
    RunRecord,
    StoredFile,
    Thread,
    User,
)
from agent_chat.stores.storage import Storage

SESSIONS_PER_KEY = 1000

Lease = Literal["held", "cancelled", "lost"]

LEASE_SECONDS = 20.0
"""How long a run's lease lasts."""

OUTBOX_FACTS = 200
"""How many facts one thread's outbox holds; an entry names its message and takes about 100 bytes."""

OUTBOX_FACTS_READ = 50
OUTBOX_BYTES_READ = 4 * 2**20
"""How much of one outbox is read at once."""

OUTBOX_LEASE = 0.25
"""How long the process that stored a fact may take to publish it before others do, as a part of a run's lease."""


class Created(msgspec.Struct, frozen=True):
    """`replayed`: the key was used before, and this is the thread that was made then; `cut` as in `ThreadPart`."""

    thread: Thread
    replayed: bool
    cut: bool = False


class Page(msgspec.Struct, frozen=True):
    """One page of threads. `more`: there is a next page. `cut`: messages were left out to keep to the byte bound."""

    threads: list[Thread]
    more: bool
    cut: bool


class ThreadPart(msgspec.Struct, frozen=True):
    """A thread with its latest messages. `cut`: fewer than asked for, to keep to the byte bound."""

    thread: Thread
    cut: bool


class MessagePage(msgspec.Struct, frozen=True):
    """Messages of one thread, oldest first. `cut`: fewer than asked for, to keep to the byte bound.

    The next page is the one before `messages[0]`.
    """

    messages: list[Message]
    cut: bool


class AgentPage(msgspec.Struct, frozen=True):
    """Agents, oldest first. `more`: there are further ones behind them."""

    agents: list[Agent]
    more: bool


class Posted(msgspec.Struct, frozen=True):
    """The messages as stored now, by this call or, `replayed`, by an earlier one with the same key.

    `answer` is the run's message; null where none was started. `again`: the key was free after a failed run, and
    `message` is the user message of that first attempt. `unpublished`: a replayed message that started no run is still
    in the outbox.
    """

    message: Message
    answer: Message | None
    replayed: bool
    again: bool = False
    unpublished: bool = False

    @property
    def message_id(self) -> str:
        return self.message.id

    @property
    def run_id(self) -> str | None:
        return self.answer.id if self.answer else None


class Finished(msgspec.Struct, frozen=True):
    """The message as the store holds it, and whether this call stored it."""

    message: Message
    won: bool


class Outbox(msgspec.Struct, frozen=True):
    """What one thread's log is not known to contain, oldest first.

    `cut`: the thread had more unpublished facts than its outbox holds, and the oldest were dropped. Only the stored
    thread shows those, so a publisher first resets the log: every reader then starts over with a snapshot.
    """

    thread_id: str
    organization_id: str
    facts: list[Fact]
    cut: bool = False

    @property
    def who(self) -> Principal:
        """The thread's organization; its facts have no user."""
        return Principal(self.organization_id, "")


class Directory(Protocol):
    """Organizations, users, keys and agents."""

    async def create_organization(self, name: str) -> Organization:
        """Make it. A name that is there already, even if only just, is answered as it is."""
        ...

    async def find_organization(self, id_or_name: str) -> Organization | None: ...

    async def create_user(self, organization_id: str, name: str) -> User:
        """Make the organization's user. A name that it has already is answered as it is."""
        ...

    async def find_user(self, organization_id: str, id_or_name: str) -> User | None: ...

    async def create_key(self, user: User, secret: str, source: KeySource | None = None) -> Key:
        """Store the hash of `secret`, held from now on.

        A valid key of the same secret is returned as it is; it gets `source` if it has none.
        """
        ...

    async def hold_key(self, key_id: str) -> bool:
        """Record that a process uses the key now, by the database's clock; False if it is revoked or unknown."""
        ...

    async def revoke_unheld_keys(self, source: KeySource, *, keep: str | None, seconds: float) -> list[Key]:
        """Revoke the valid keys of this source, except the one with id `keep`, that nobody has held for `seconds`.

        Returns those that this call revoked.
        """
        ...

    async def list_keys(self) -> list[Key]:
        """Every key of the installation, revoked ones too, oldest first: for the operator, not for the API."""
        ...

    async def revoke_key(self, key_id: str) -> Key:
        """Raises: KeyNotFound."""
        ...

    async def find_principal(self, secret: str) -> Principal | None:
        """The Principal of an unrevoked key; null for any other string."""
        ...

    async def create_session(
        self, secret: str, token: str, *, seconds: float, limit: int = SESSIONS_PER_KEY
    ) -> Principal | None:
        """Store the hash of `token`, which stands for the valid key `secret` that long; None for any other secret.

        Deletes the sessions that have expired, and the oldest of this key beyond `limit`.
        """
        ...

    async def find_session_principal(self, token: str) -> Principal | None:
        """The Principal of a session that has not expired and whose key is not revoked; None for any other string."""
        ...

    async def delete_session(self, token: str) -> None:
        """Delete the session, if it exists."""
        ...

    async def create_agent(self, who: Principal, agent: Agent) -> Agent:
        """Store it. It becomes the default if it says so, or if the organization has none."""
        ...

    async def list_agents(
        self, who: Principal, *, limit: int = 100, offset: int = 0, max_bytes: int = READ_BYTES
    ) -> AgentPage:
        """The organization's agents that are not deleted, oldest first.

        Where they would exceed `max_bytes` of JSON, fewer are read, but one in any case.
        """
        ...

    async def get_agent(self, who: Principal, agent_id: str | None, *, deleted: bool = False) -> Agent:
        """One agent; the organization's default for null. `deleted` finds deleted ones too.

        Raises: AgentNotFound.
        """
        ...

    async def update_agent(self, who: Principal, agent: Agent, *, is_default: bool | None = None) -> Agent:
        """Replace it. `is_default` true makes it the default; false on the default leaves the organization without.

        Null leaves the default as it is now: what `agent` says of it may have changed since it was read.

        Raises: AgentNotFound.
        """
        ...

    async def delete_agent(self, who: Principal, agent_id: str) -> None:
        """Hide it; its threads stay readable. In place of the default the oldest remaining agent becomes it.

        Raises: AgentNotFound.
        """
        ...


class ThreadStore(Protocol):
    """Threads, their messages, and the runs in progress.

    Within a thread, `created_at` strictly increases from message to message: a store moves a message's time past
    its predecessor's where clocks disagree. `updated_at` strictly increases with every write to the thread except
    `checkpoint`. Reading a thread in mid-run shows the run's message as the last checkpoint left it.

    The outbox: `append_message`, `update` and `delete` add the fact that they store (`message.created`,
    `thread.updated`, `thread.deleted`) to the thread's outbox in the same atomic write, so that it reaches every
    consumer though the process dies. (A run needs none: its record outlives the publication of its terminal event.)

    - Who publishes: the process whose write was acknowledged, immediately. Whoever `unpublished` hands a fact to, once
      it has been there for a quarter of a lease.
    - When a fact is removed: by `mark_published`, after the log has acknowledged it. A crash in between publishes it
      twice, which no reducer notices; consumers outside must use `fact_id` to ignore the second.
    - Order: the facts of one thread are handed out in the order in which they were stored. A later `thread.updated`
      replaces an earlier one, since of two the later wins: it is handed out with the thread as it is then, and marking
      it as published removes the earlier ones too. `thread.deleted` replaces everything. They may be published in
      another order where two processes store them, or one of them stays here for a while: readers converge all the
      same, since they order messages by `created_at` and of two thread.updated the later wins. That a process waits
      for what another one could not publish yet was refused: it would need a read of the outbox before every append.
    - Bound: OUTBOX_FACTS per thread (`Outbox.cut`). A full outbox never refuses a write.
    """

    async def create(self, who: Principal, thread: Thread, idempotency: Idempotency | None = None) -> Created:
        """Store a new thread, once per user, agent and key within 24 hours.

        Raises: IdempotencyMismatch if the key came with another fingerprint.
        """
        ...

    async def get(self, who: Principal, thread_id: str, *, message_limit: int = 50) -> Thread:
        """The thread of `read`. Raises: ThreadNotFound."""
        ...

    async def read(
        self, who: Principal, thread_id: str, *, message_limit: int, max_bytes: int = READ_BYTES
    ) -> ThreadPart:
        """The thread with its latest messages, oldest first.

        Where they would exceed `max_bytes` of JSON, fewer are read; but the very latest in any case, and that of a
        run in progress.

        Raises: ThreadNotFound.
        """
        ...

    async def list_threads(
        self,
        who: Principal,
        agent_id: str,
        *,
        limit: int,
        offset: int,
        archived: bool | None,
        message_limit: int,
        max_bytes: int,
    ) -> Page:
        """The organization's threads with this agent, newest updated first.

        Where their messages would exceed `max_bytes` of JSON, fewer (the latest) of each thread are read.
        """
        ...

    async def update(
        self, who: Principal, thread_id: str, *, title: str | None = None, archived: bool | None = None
    ) -> Thread:
        """Set what is given; the thread without messages. Raises: ThreadNotFound."""
        ...

    async def delete(self, who: Principal, thread_id: str) -> str | None:
        """Delete the thread and all of it; the id of the run that had it.

        The removal of its blobs, if it has any, is stored under the thread's id.

        Raises: ThreadNotFound.
        """
        ...

    async def list_messages(
        self, who: Principal, thread_id: str, *, before: str | None, limit: int, max_bytes: int = READ_BYTES
    ) -> MessagePage:
        """The latest `limit` messages, or those before message `before`; oldest first.

        Where they would exceed `max_bytes` of JSON, fewer are read, the latest, but one in any case. None is missing
        between them.

        Raises: ThreadNotFound; MessageNotFound if `before` isn't in the thread.
        """
        ...

    async def get_message(self, who: Principal, thread_id: str, message_id: str) -> Message:
        """Raises: ThreadNotFound, MessageNotFound."""
        ...

    async def append_message(self, who: Principal, message: Message, idempotency: Idempotency | None = None) -> Posted:
        """Store a message that starts no run, once per user, thread and key.

        Raises: ThreadNotFound, ThreadArchived, IdempotencyMismatch.
        """
        ...

    async def replay(self, who: Principal, thread_id: str, idempotency: Idempotency) -> Posted | None:
        """What this user's key stored in this thread before; null if nothing, or if the key is free again.

        Raises: ThreadNotFound, IdempotencyMismatch.
        """
        ...

    async def add_file(self, who: Principal, file: StoredFile) -> None:
        """Store an attachment's record in its thread, not in one that is being deleted, and drop its removal.

        Raises: ThreadNotFound; StoreUnavailable if a sweeper has taken its removal, so that its blob may be gone.
        """
        ...

    async def get_file(self, who: Principal, thread_id: str, attachment_id: str) -> StoredFile:
        """Raises: ThreadNotFound, AttachmentNotFound."""
        ...

    async def remove_file(self, who: Principal, thread_id: str, attachment_id: str) -> None:
        """Delete an attachment's record, if it is there, and store the removal of its blob. Messages keep naming it.

        Raises: ThreadNotFound.
        """
        ...

    async def claim(
        self,
        who: Principal,
        question: Message,
        answer: Message,
        *,
        worker: str,
        idempotency: Idempotency | None = None,
    ) -> Posted:
        """Append both messages and take the thread for the run `answer.id`, in one atomic write.

        The run's record (lease held by `worker`) is there before the write and never after a refusal. A key that
        was used before is answered from what it stored, busy or not; except a key whose run failed and may be
        retried: then only `answer` is appended, as a reply to the first user message, and the key is that run's.

        Raises: ThreadNotFound, ThreadArchived, ThreadBusy, IdempotencyMismatch.
        """
        ...

    async def checkpoint(self, who: Principal, run_id: str, *, worker: str, partial: Message | None) -> Lease:
        """Keep the partial message (null: as it was), renew the lease, and say whether this run may go on.

        `cancelled` keeps the partial too. `lost`: another worker took the run over, or its record or thread is
        gone; then nothing is written.
        """
        ...

    async def cancel(self, who: Principal, thread_id: str, run_id: str) -> None:
        """Mark the run cancelled; its worker learns of it at the next checkpoint. Nothing if it is finished."""
        ...

    async def finish(self, who: Principal, message: Message) -> Finished:
        """Replace the run's message by `message` and release the thread, if the thread is still this run's.

        A compare-and-set: of any number of finishers one wins, and only the winner may say the terminal event.
        A failure that may be retried frees the idempotency key of the run.

        Raises: ThreadNotFound, MessageNotFound.
        """
        ...

    async def take_orphans(self, worker: str) -> list[RunRecord]:
        """Take over every run whose lease has expired by the database's clock, of every organization.

        Each is handed to one caller: its record is then held by `worker`, with a new lease. A record that can't be
        read is logged and left out: it must not keep the others from being repaired.
        """
        ...

    async def take_orphan(self, who: Principal, run_id: str, worker: str) -> RunRecord | None:
        """Take over that one run if its lease has expired; else null."""
        ...

    async def find_record(self, who: Principal, run_id: str) -> RunRecord | None:
        """That run's record, whatever its lease; null once it is forgotten."""
        ...

    async def delete_record(self, who: Principal, run_id: str) -> None:
        """Delete the run's record: its terminal event is in the log, or nothing points to it."""
        ...

    async def take_outboxes(self, thread_id: str | None = None) -> list[Outbox]:
        """Take over outboxes that have waited for a quarter of a lease, of every organization.

        With `thread_id`, take over that thread's outbox, however long it has waited: its publisher does so once the log
        is back, to publish new facts of the thread immediately again.

        Each is handed to one caller, and to the next after another quarter of a lease. At most 50 facts or 4 MB
        per outbox: what is left comes after those are marked as published. A fact that no longer exists, or that cannot
        be decoded (which is logged), is removed: nobody can ever publish it, and no other fact waits for it.
        """
        ...

    async def mark_published(self, who: Principal, thread_id: str, facts: Sequence[Fact]) -> None:
        """Remove these facts from the outbox. Those that are not in it, and a deleted thread, are ignored."""
        ...


class Store(Directory, ThreadStore, Storage, Protocol):
    """One database: all three contracts, and its lifetime."""

    @property
    def failures(self) -> int:
        """How many calls have failed with StoreUnavailable since it was opened."""
        ...

    async def ready(self) -> bool:
        """True if the database answers and its last write succeeded, or one does now."""
        ...

    async def close(self) -> None: ...


class LogWriter(Protocol):
    """One writer of a thread's log: a run, or one request that says a fact."""

    def write(self, event: Event) -> None:
        """Take an event to be appended, in order. Never waits: what can't be appended yet is kept and joined.

        Raises: LogDeleted once the log has had its last entry.
        """
        ...

    async def flush(self) -> None:
        """Wait until everything written is in the log. Raises: LogDeleted."""
        ...


class EventLog(Protocol):
    """One log per thread: any number of writers and readers, on any process.

    A position is an opaque id, never used twice, compared only for equality. A log keeps 10,000 events or 8 MB,
    an hour after the last; what follows a position is given whole or not at all (Gap).

    Nothing but `flush` waits long for a log that is away: what asks it raises `LogUnavailable` within seconds, and
    so does a cursor's `next` that must read, which may be called again; one that has read everything goes on waiting.
    What is written is kept and goes out later. Whoever gets LogUnavailable goes on with what the store says.
    """

    @property
    def unreachable(self) -> bool:
        """True while the log takes no events."""
        ...

    @property
    def failures(self) -> int:
        """How many attempts to append have failed since it was opened."""
        ...

    @property
    def budget(self) -> LogBudget:
        """What all logs of this process hold in memory: the newest entries, for readers who follow or resume."""
        ...

    def writer(self, thread_id: str, snapshot: Callable[[], MessageSnapshot] | None = None) -> LogWriter:
        """A new writer.

        Where this writer's last entry is gone from the log (it was lost), what it has pending is dropped, and
        `snapshot()` is appended in its place. Once somebody else has said the end of the run of which this writer
        writes, nothing more of that run is appended: a process that was paused may wake with more to say.
        """
        ...

    async def tail(self, thread_id: str) -> str:
        """The position of the last entry. A log that isn't there is opened with a hidden first entry."""
        ...

    def cursor(self, thread_id: str, after: str) -> Cursor:
        """A reader of everything after the position. Its `next` raises Gap if that can't be proven."""
        ...

    async def find(self, thread_id: str, message_id: str, run_id: str | None) -> str | None:
        """The position before the `message.created` that `run_id`'s run.started stands behind.

        For null, a message that started no run: the position before its first `message.created`. Null if the log
        doesn't hold it (yet, or any more).
        """
        ...

    async def in_run(self, thread_id: str, position: str) -> bool:
        """True if a reader at `position` was in the middle of a run: more of it follows, now or later.

        Raises: Gap if the position isn't in the log.
        """
        ...

    async def run_events(self, thread_id: str, run_id: str, upto: str) -> list[Event]:
        """That run's events up to and including `upto`, from its newest run.started, message.snapshot or terminal
        event, or from the log's start.

        Raises: Gap if `upto` isn't in the log, or if a reader who continues behind it from the last checkpoint would
            miss events that were evicted.
        """
        ...

    async def reset(self, thread_id: str) -> None:
        """Discard what the log contains: every reader gets a Gap, and what is appended next is read behind it.

        For facts that only the store has any more. A log that has had its last entry stays as it is.

        Raises: LogUnavailable.
        """
        ...

    async def signal(self, run_id: str) -> None:
        """Tell the process that has this run to look at its record now. May be lost; the record is the truth."""
        ...

    def on_signal(self, callback: Callable[[str], None]) -> None:
        """Call `callback(run_id)` for every signal, in the event loop."""
        ...

    async def close(self) -> None: ...
