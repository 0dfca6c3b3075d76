"""The exceptions of the stores and the log. Each constructor takes the facts and writes the sentence."""

from __future__ import annotations


class StoreError(Exception):
    """A call that a store refused or could not complete."""


class NotFound(StoreError):
    """The object does not exist, or belongs to another organization: callers cannot distinguish the two (I1)."""

    noun = "object"

    def __init__(self, id: str) -> None:
        super().__init__(f"No {self.noun} {id} here.")
        self.id = id


class AgentNotFound(NotFound):
    """The organization has no such agent."""

    noun = "agent"


class ThreadNotFound(NotFound):
    """The organization has no such thread, or not with this agent."""

    noun = "thread"


class MessageNotFound(NotFound):
    """The thread has no such message."""

    noun = "message"


class AttachmentNotFound(NotFound):
    """The thread has no such attachment."""

    noun = "attachment"


class KeyNotFound(NotFound):
    """There is no such key."""

    noun = "key"


class ThreadBusy(StoreError):
    """Another run has the thread (I2)."""

    def __init__(self, message_id: str) -> None:
        super().__init__(f"The thread is busy with run {message_id}.")
        self.message_id = message_id


class ThreadArchived(StoreError):
    """A message was posted to an archived thread."""

    def __init__(self, thread_id: str) -> None:
        super().__init__(f"Thread {thread_id} is archived; un-archive it to post to it.")


class IdempotencyMismatch(StoreError):
    """The Idempotency-Key was used before with another body (I6)."""

    def __init__(self, key: str) -> None:
        super().__init__(f"Idempotency-Key {key!r} was used before with another body.")


class StoreUnavailable(StoreError):
    """The database did not respond, or failed."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"The database did not answer: {reason}.")


class StoreFull(StoreUnavailable):
    """The disk of the database is full."""


class StoreDamaged(StoreUnavailable):
    """The database's file is damaged and has to be restored; retrying does not help."""

    def __init__(self, reason: str) -> None:
        StoreError.__init__(self, f"The database is damaged ({reason}): restore it from a backup.")


class BlobNotFound(StoreError):
    """No blob has this key. Not a NotFound, which callers take for a deleted thread: the thread exists."""

    def __init__(self, key: str) -> None:
        super().__init__(f"No blob {key} here.")
        self.key = key


class BlobUnavailable(StoreError):
    """The blob store did not respond, or refused the request."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"The blob store did not answer: {reason}.")


class BlobStorageFull(BlobUnavailable):
    """The disk of the blobs' folder is full."""


class BadBlobsURL(StoreError):
    """CHAT_BLOBS_URL is invalid. The text continues a sentence that begins with its name."""


class DataFolderInUse(StoreError):
    """Another server is using the data folder."""

    def __init__(self, folder: str, advice: str = "") -> None:
        super().__init__(f"another server is using the data folder {folder}{advice and f'; {advice}'}")


class DataFolderUnusable(StoreError):
    """The folder in CHAT_DATA_DIR cannot be created or written to."""

    def __init__(self, folder: str, reason: str) -> None:
        super().__init__(f"CHAT_DATA_DIR: cannot store anything in {folder}: {reason}")


class SchemaTooNew(StoreError):
    """The data were written by a later version of the server, which stores them in another way."""

    def __init__(self, database: str, found: int, known: int) -> None:
        super().__init__(
            f"{database} was written by a later version of this server (schema version {found}; this one knows versions"
            f" up to {known}): start that version, or restore a backup"
        )


class Gap(Exception):
    """What follows this position cannot be proven complete: the log was trimmed or lost, or never had it (I13)."""

    def __init__(self, position: str) -> None:
        super().__init__(f"The log does not hold everything after {position}.")


class LogDeleted(Exception):
    """The log has had its last entry; nothing more is appended (I17)."""

    def __init__(self, thread_id: str) -> None:
        super().__init__(f"The log of thread {thread_id} is closed: the thread was deleted.")


class LogUnavailable(Exception):
    """The log did not respond in time. Pending events are published later; a failed read may be retried."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"The log did not answer: {reason}.")
