"""The contract of what organizations store: bytes that count toward their quota, and blobs to be removed.

An organization's record holds one number. A process reserves bytes from it in pieces and spends them locally, so that
a message costs no write; attachments are reserved one by one. Deletions subtract what they delete. The number drifts (a
process dies with an unspent piece), so a sweeper measures every organization from time to time and corrects it. Summing
up at every upload was refused: it reads a row per file.

A blob is put before its record and deleted after it, in another system, so either can fail in between. Therefore a
`BlobRemoval` is stored first and dropped when the blob has its record (I10); a sweeper deletes the blobs of removals
that are due. Looking for blobs without a record was refused: it lists a whole bucket.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from agent_chat.stores.models import Principal

UPLOAD_SECONDS = 1800.0
"""How long storing one file may take; half of the time after which a sweeper considers its process dead."""
REMOVAL_SECONDS = 60.0
"""How long after a removal was stored, or last tried, it is tried again."""
MEASURE_SECONDS = 3600.0
REMOVALS_TAKEN = 50
MEASURED_AT_ONCE = 20

RECORD_BYTES = 500
"""About how many bytes a thread, a message or an attachment takes besides its text."""


class BlobRemoval(msgspec.Struct, frozen=True):
    """Blobs to be deleted: an attachment's, or all of a thread's if `attachment_id` is None. `size` is in bytes."""

    id: str
    organization_id: str
    thread_id: str
    attachment_id: str | None
    size: int


class Storage(Protocol):
    """The bytes that organizations store, and the blobs to be deleted."""

    async def reserve_bytes(self, organization_id: str, need: int, want: int, limit: int) -> int:
        """Count up to `want` more bytes as stored, as many as `limit` allows.

        Returns how many; 0 if the limit allows fewer than `need`.
        """
        ...

    async def release_bytes(self, organization_id: str, count: int) -> None:
        """Count that many bytes less."""
        ...

    async def stored_bytes(self, organization_id: str) -> int:
        """Return the present count, including the pieces that processes have reserved."""
        ...

    async def correct_bytes(self) -> None:
        """Measure the organizations that were not measured for an hour, and correct their counts."""
        ...

    async def begin_upload(self, principal: Principal, thread_id: str, attachment_id: str, size: int) -> None:
        """Store the removal of a blob before it is put, due when the process must be considered dead.

        `add_file` drops it. `size` has been reserved; it is released when the removal is finished.
        """
        ...

    async def take_removals(self) -> list[BlobRemoval]:
        """Return the removals that are due, each to one caller, and to the next caller a minute later.

        A removal whose attachment has its record, or whose thread still exists, is dropped: the deletion that stored it
        did not happen.
        """
        ...

    async def finish_removal(self, removal_id: str) -> None:
        """Drop the removal after its blobs were deleted. Does nothing if it does not exist."""
        ...
