"""The contract of threads: their messages, the attachments' records, and the runs in progress."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Protocol

import msgspec

from agent_chat.stores.contracts.outbox import OutboxStore
from agent_chat.stores.contracts.usage import UsageRow
from agent_chat.stores.fitting import READ_BYTES
from agent_chat.stores.models import Idempotency, Message, Principal, RunRecord, StoredFile, Thread

Lease = Literal["held", "cancelled", "lost"]

LEASE_SECONDS = 20.0
"""How long a run's lease lasts."""


class Created(msgspec.Struct, frozen=True):
    """A new thread, or the one that exists already.

    Attributes:
        thread: the thread.
        replayed: it was created by an earlier call with the same key.
        found: it has the external id and was created by another call.
        cut: as in `ThreadPart`.
    """

    thread: Thread
    replayed: bool
    found: bool = False
    cut: bool = False


class ThreadPage(msgspec.Struct, frozen=True):
    """Threads. `more`: there is a next page. `cut`: messages were left out to stay within the bound in bytes."""

    threads: list[Thread]
    more: bool
    cut: bool


class ThreadPart(msgspec.Struct, frozen=True):
    """A thread with its latest messages. `cut`: fewer than requested, to stay within the bound in bytes."""

    thread: Thread
    cut: bool


class MessagePage(msgspec.Struct, frozen=True):
    """Messages of one thread, oldest first. `cut`: fewer than requested, to stay within the bound in bytes.

    The next page ends before `messages[0]`.
    """

    messages: list[Message]
    cut: bool


class Posted(msgspec.Struct, frozen=True):
    """The messages of a post, as they are stored now.

    Attributes:
        message: the message that was posted.
        answer: the run's message; None if no run was started.
        replayed: an earlier call with the same key stored them.
        again: the key was free after a failed run, and `message` is the user message of that first attempt.
        unpublished: a replayed message that started no run is still in the outbox.
        position: a position of the log before anything of this post; the server sets it for a post that is streamed.
    """

    message: Message
    answer: Message | None
    replayed: bool
    again: bool = False
    unpublished: bool = False
    position: str | None = None

    @property
    def message_id(self) -> str:
        """The id of the message that was posted."""
        return self.message.id

    @property
    def run_id(self) -> str | None:
        """The id of the run; None if no run was started."""
        return self.answer.id if self.answer else None


class Finished(msgspec.Struct, frozen=True):
    """A finished message as it is stored. `won`: this call stored it."""

    message: Message
    won: bool


class ThreadStore(OutboxStore, Protocol):
    """Threads, their messages, and the runs in progress.

    A store moves the time of a message or a thread past the previous one where clocks disagree (I7). A thread that is
    read during a run contains the run's message as of the last checkpoint.

    The last activity of a thread is the time of its latest message, or of the end of an answer where that is later; of
    a thread without messages its `created_at`. Other writes do not change it. It is stored, and orders lists, but is no
    part of a Thread.
    """

    async def create(self, principal: Principal, thread: Thread, idempotency: Idempotency | None = None) -> Created:
        """Store a new thread, once per key (I6); or return the one that has its external id (I24).

        The key is checked first. It belongs to the call that created the thread: one that only finds the thread stores
        nothing.

        Raises: IdempotencyMismatch if the key was used with another fingerprint.
        """
        ...

    async def find_thread(self, principal: Principal, agent_id: str, external_id: str) -> Thread | None:
        """Return this user's thread with the external id (I24), without its messages; None if there is none."""
        ...

    async def import_thread(self, principal: Principal, thread: Thread, messages: Iterable[Message]) -> bool:
        """Store a new thread with these messages exactly as they are, ids and times included: all of it or nothing.

        No fact is stored, since nobody can watch a thread that does not exist. The bytes count as stored.

        Args:
            messages: of this thread, none of them in progress, each later than the one before it. They are iterated
                once, perhaps in another thread, and never all in memory.

        Returns:
            False, and nothing is stored, if the thread's id is taken, whatever organization has it, or its external id;
            if its id is that of a thread whose deletion is not complete; or if the id of a message is taken and this
            store needs them to differ.
        """
        ...

    async def scan_threads(
        self, principal: Principal, *, user_id: str | None, agent_id: str | None, after: str | None, limit: int
    ) -> list[Thread]:
        """Return the organization's threads without their messages, ordered by id, those after the id `after`.

        Args:
            user_id: only threads of this user; None for all.
            agent_id: only threads with this agent; None for all.
            limit: how many at most.
        """
        ...

    async def get(self, principal: Principal, thread_id: str, *, message_limit: int = 50) -> Thread:
        """Return the thread of `read`. Raises: ThreadNotFound."""
        ...

    async def read(
        self, principal: Principal, thread_id: str, *, message_limit: int, max_bytes: int = READ_BYTES
    ) -> ThreadPart:
        """Return the thread with its latest messages, oldest first.

        Fewer than `message_limit` where they would exceed `max_bytes` of JSON (I9), but always the latest message and
        the message of a run in progress.

        Raises: ThreadNotFound.
        """
        ...

    async def list_threads(
        self,
        principal: Principal,
        agent_id: str,
        *,
        limit: int,
        offset: int,
        archived: bool | None,
        message_limit: int,
        max_bytes: int,
        external_id: str | None = None,
    ) -> ThreadPage:
        """Return the organization's threads with this agent, latest activity first, ties by id.

        Where their messages would exceed `max_bytes` of JSON, each thread has fewer, the latest (I9).

        Args:
            external_id: only threads with this external id, of any user; None for all.
        """
        ...

    async def update(
        self, principal: Principal, thread_id: str, *, title: str | None = None, archived: bool | None = None
    ) -> Thread:
        """Set what is not None, and return the thread without messages. Raises: ThreadNotFound."""
        ...

    async def delete(self, principal: Principal, thread_id: str) -> str | None:
        """Delete the thread with all its records, and return the id of the run in progress, if there is one.

        If the thread has blobs, their removal is stored with the thread's id (I10).

        Raises: ThreadNotFound.
        """
        ...

    async def list_messages(
        self, principal: Principal, thread_id: str, *, before: str | None, limit: int, max_bytes: int = READ_BYTES
    ) -> MessagePage:
        """Return the latest `limit` messages, or those before message `before`; oldest first and without holes.

        Fewer, the latest, where they would exceed `max_bytes` of JSON, but at least one (I9).

        Raises: ThreadNotFound; MessageNotFound if `before` is not in the thread.
        """
        ...

    async def get_message(self, principal: Principal, thread_id: str, message_id: str) -> Message:
        """Return one message. Raises: ThreadNotFound, MessageNotFound."""
        ...

    async def append_message(
        self, principal: Principal, message: Message, idempotency: Idempotency | None = None
    ) -> Posted:
        """Store a message that starts no run, once per key (I6).

        Raises: ThreadNotFound, ThreadArchived, IdempotencyMismatch.
        """
        ...

    async def replay(self, principal: Principal, thread_id: str, idempotency: Idempotency) -> Posted | None:
        """Return what this user's key has stored in this thread; None if nothing, or if the key is free again.

        Raises: ThreadNotFound, IdempotencyMismatch.
        """
        ...

    async def add_file(self, principal: Principal, file: StoredFile) -> None:
        """Store an attachment's record in its thread, unless that is being deleted, and drop its removal (I10).

        Raises: ThreadNotFound; StoreUnavailable if a sweeper has taken the removal, so that the blob may be gone.
        """
        ...

    async def get_file(self, principal: Principal, thread_id: str, attachment_id: str) -> StoredFile:
        """Return an attachment's record. Raises: ThreadNotFound, AttachmentNotFound."""
        ...

    async def remove_file(self, principal: Principal, thread_id: str, attachment_id: str) -> None:
        """Delete an attachment's record, if it exists, and store the removal of its blob (I10).

        Messages that have the attachment still name it.

        Raises: ThreadNotFound.
        """
        ...

    async def claim(
        self,
        principal: Principal,
        question: Message,
        answer: Message,
        *,
        worker: str,
        idempotency: Idempotency | None = None,
    ) -> Posted:
        """Append both messages and take the thread for the run `answer.id`, in one atomic write (I2).

        The run's record, its lease held by `worker`, is inserted before that write; after a refusal there is none (I3).
        A key that was used before gets what it stored, whether the thread is busy or not. The exception is a key whose
        run failed and may be retried: then only `answer` is appended, as a reply to the first user message, and the
        key belongs to the new run.

        Raises: ThreadNotFound, ThreadArchived, ThreadBusy, IdempotencyMismatch.
        """
        ...

    async def checkpoint(self, principal: Principal, run_id: str, *, worker: str, partial: Message | None) -> Lease:
        """Store the partial message, renew the lease, and return whether the run may continue.

        Args:
            partial: None leaves the stored one.

        Returns:
            `held`; `cancelled`, where the partial message is stored too; `lost` if another worker has taken the run
            over, or its record or thread is gone: then nothing is written.
        """
        ...

    async def cancel(self, principal: Principal, thread_id: str, run_id: str) -> None:
        """Mark the run as cancelled, which its next checkpoint returns. Does nothing if the run is finished."""
        ...

    async def finish(self, principal: Principal, message: Message) -> Finished:
        """Replace the run's message by `message` and release the thread, if this run has the thread (I4).

        A failure that may be retried frees the run's idempotency key.

        Raises: ThreadNotFound, MessageNotFound.
        """
        ...

    async def take_orphans(self, worker: str) -> list[RunRecord]:
        """Take over every run whose lease has expired, of every organization (I5).

        Each is returned to one caller, and its record has a new lease, held by `worker`. A record that cannot be read
        is logged and left out, so that the others are repaired.
        """
        ...

    async def take_orphan(self, principal: Principal, run_id: str, worker: str) -> RunRecord | None:
        """Take over this run if its lease has expired; else return None."""
        ...

    async def find_record(self, principal: Principal, run_id: str) -> RunRecord | None:
        """Return the run's record, whatever its lease; None once it is deleted."""
        ...

    async def delete_record(self, principal: Principal, run_id: str, usage: UsageRow | None = None) -> None:
        """Delete the run's record: its terminal event is in the log (I3), or nothing refers to the run.

        Args:
            usage: stored before the record is deleted, unless it is stored already (I25).
        """
        ...
