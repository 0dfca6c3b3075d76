"""What the stores and the log raise. Each takes the facts and writes its own sentence."""

from __future__ import annotations


class StoreError(Exception):
    """Anything that a store refuses."""


class NotFound(StoreError):
    """The object isn't there, or belongs to another organization: the two are told apart by nobody."""

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
    """Another run has the thread."""

    def __init__(self, message_id: str) -> None:
        super().__init__(f"The thread is busy with run {message_id}.")
        self.message_id = message_id


class ThreadArchived(StoreError):
    """A message was posted to an archived thread."""

    def __init__(self, thread_id: str) -> None:
        super().__init__(f"Thread {thread_id} is archived; un-archive it to post to it.")


class IdempotencyMismatch(StoreError):
    """The Idempotency-Key was used before, with another body."""

    def __init__(self, key: str) -> None:
        super().__init__(f"Idempotency-Key {key!r} was used before with another body.")


class StoreUnavailable(StoreError):
    """The database did not answer."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"The database did not answer: {reason}.")


class StoreFull(StoreUnavailable):
    """The database has no room on its disk."""


class StoreDamaged(StoreUnavailable):
    """The database's file is damaged. To try again does not help: it has to be restored."""

    def __init__(self, reason: str) -> None:
        StoreError.__init__(self, f"The database is damaged ({reason}): restore it from a backup.")


class BlobNotFound(StoreError):
    """No blob has this key. No NotFound: the thread that names the blob is there, and so is its run."""

    def __init__(self, key: str) -> None:
        super().__init__(f"No blob {key} here.")
        self.key = key


class BlobUnavailable(StoreError):
    """The blob store did not answer, or refused."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"The blob store did not answer: {reason}.")


class BlobStorageFull(BlobUnavailable):
    """The disk of the blobs' folder is full."""


class BadBlobsURL(StoreError):
    """CHAT_BLOBS_URL can't be used; the text is what follows its name."""


class DataFolderInUse(StoreError):
    """Another server is using the data folder."""

    def __init__(self, folder: str) -> None:
        super().__init__(f"another server is using the data folder {folder}")


class DataFolderUnusable(StoreError):
    """CHAT_DATA_DIR names no folder that can be made or written to."""

    def __init__(self, folder: str, reason: str) -> None:
        super().__init__(f"CHAT_DATA_DIR: can't keep anything in {folder}: {reason}")


class Gap(Exception):
    """What follows this position can't be proven complete: trimmed, expired, lost, or not a position of this log."""

    def __init__(self, position: str) -> None:
        super().__init__(f"The log does not hold everything after {position}.")


class LogDeleted(Exception):
    """The log has had its last entry; nothing is appended to it any more."""

    def __init__(self, thread_id: str) -> None:
        super().__init__(f"The log of thread {thread_id} is closed: the thread was deleted.")


class LogUnavailable(Exception):
    """The log did not respond in time. Pending events are published later; a failed read may be retried."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"The log did not answer: {reason}.")
