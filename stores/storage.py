"""The contract about what organizations store: bytes that count toward their quota, and blobs that must go.

An organization's record holds one number. A process reserves bytes from it in pieces and spends them locally, so that
no message costs a write; attachments are reserved one by one. Deletions subtract what they delete. The number drifts
(a process dies with a piece that it has not spent), so a sweeper measures each organization now and then and corrects
it. To sum up at every upload was refused: it reads a row per file.

A blob is put before its record and deleted after it, in another system, so either can fail in between. Therefore a
`BlobRemoval` is stored first and dropped when the blob has its record; a sweeper deletes the blobs of those that are
due. To look for blobs without a record was refused: it lists a whole bucket.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from agent_chat.stores.models import Principal

UPLOAD_SECONDS = 1800.0
"""How long storing one file may take; half of the time after which a sweeper takes its process for dead."""
REMOVAL_SECONDS = 60.0
"""After how long a removal is tried (again)."""
MEASURE_SECONDS = 3600.0
REMOVALS_TAKEN = 50
MEASURED_AT_ONCE = 20

RECORD_BYTES = 500
"""What a thread, a message or an attachment takes besides its text, about."""


class BlobRemoval(msgspec.Struct, frozen=True):
    """Blobs that must go: an attachment's, or with `attachment_id` None all of a thread's."""

    id: str
    organization_id: str
    thread_id: str
    attachment_id: str | None
    size: int


class Storage(Protocol):
    """What organizations store. Every call may raise `StoreUnavailable`."""

    async def reserve_bytes(self, organization_id: str, need: int, want: int, limit: int) -> int:
        """Count up to `want` more bytes as stored, as many as `limit` allows; the number, 0 if fewer than `need`."""
        ...

    async def release_bytes(self, organization_id: str, count: int) -> None:
        """Count that many bytes less."""
        ...

    async def stored_bytes(self, organization_id: str) -> int:
        """The number as it is counted now, pieces that processes have reserved included."""
        ...

    async def correct_bytes(self) -> None:
        """Measure the organizations that were not measured for an hour, and correct their numbers."""
        ...

    async def begin_upload(self, who: Principal, thread_id: str, attachment_id: str, size: int) -> None:
        """Store the removal of the blob that is about to be put, due when its process must be dead.

        `add_file` drops it. `size` has been reserved; it is released when the removal is finished.
        """
        ...

    async def take_removals(self) -> list[BlobRemoval]:
        """The removals that are due, each handed to one caller, and again to another a minute later.

        One whose attachment has its record, or whose thread is still there, is dropped: its deletion never happened.
        """
        ...

    async def finish_removal(self, removal_id: str) -> None:
        """Drop it: its blobs are gone. Nothing if it is not there."""
        ...
