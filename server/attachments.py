"""Attachments: an upload's bytes go to the blob store, its text is extracted once, its record is written last.

The record makes the attachment exist, and only an existing thread takes one: what fails before it leaves at most a
blob that nobody can reach, and that is deleted here or with its thread.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Sequence

from server.errors import InvalidRequest, StorageFull
from server.extraction import Extractor, small_of
from server.uploads import FILES, Upload
from stores.blobs import Blobs
from stores.contracts import ThreadStore
from stores.errors import AttachmentNotFound, BlobNotFound, BlobUnavailable, StoreUnavailable, ThreadNotFound
from stores.models import Attachment, Clock, KeptFile, Principal, is_id, new_id, timestamp

logger = logging.getLogger(__name__)

_SMALL = "-small"
"""Behind the key of a large picture: its smaller copy, for models."""


class Attachments:
    """The attachments of threads.

    Args:
        kept_bytes: how much one organization may keep.
    """

    def __init__(
        self, store: ThreadStore, blobs: Blobs, extractor: Extractor, *, kept_bytes: int, clock: Clock
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._extractor = extractor
        self._kept_bytes = kept_bytes
        self._clock = clock

    async def add(self, who: Principal, thread_id: str, uploads: Sequence[Upload]) -> list[Attachment]:
        """Keep uploaded files in a thread. A file that can't be read is kept all the same, and says so.

        All of them, or none.

        Raises: StorageFull, ThreadNotFound, BlobUnavailable.
        """
        if uploads:
            kept = await self._store.kept_bytes(who)
            if kept + sum(upload.size for upload in uploads) > self._kept_bytes:
                raise StorageFull(self._kept_bytes)
        added: list[Attachment] = []
        try:
            for upload in uploads:
                added.append(await self._add(who, thread_id, upload))
        except BaseException:
            await self.remove(who, thread_id, added)
            raise
        return added

    async def remove(self, who: Principal, thread_id: str, attachments: Sequence[Attachment]) -> None:
        """Take back attachments that no message has; what can't be reached now goes with the thread."""
        for attachment in attachments:
            with contextlib.suppress(StoreUnavailable, ThreadNotFound, BlobUnavailable):
                await self._store.remove_file(who, thread_id, attachment.id)
                await self._delete(_key(who, thread_id, attachment.id))

    async def _add(self, who: Principal, thread_id: str, upload: Upload) -> Attachment:
        found = await self._extractor.extract(who.organization_id, upload.path, upload.filename, upload.content_type)
        attachment = Attachment(
            id=new_id(),
            filename=upload.filename,
            content_type=found.content_type,
            size=upload.size,
            sha256=upload.sha256,
            status=found.status,
            text_chars=len(found.text),
            truncated=found.truncated,
            error=found.error,
            created_at=timestamp(self._clock()),
        )
        key = _key(who, thread_id, attachment.id)
        try:
            await self._blobs.put(key, upload.path)
            if found.small:
                await self._blobs.put(key + _SMALL, small_of(upload.path))
            await self._store.add_file(who, KeptFile(attachment, thread_id, found.text, found.small))
        except BaseException:
            with contextlib.suppress(BlobUnavailable):
                await self._delete(key)
            raise
        return attachment

    async def _delete(self, key: str) -> None:
        await self._blobs.delete(key)
        await self._blobs.delete(key + _SMALL)

    async def named(self, who: Principal, thread_id: str, ids: Sequence[str]) -> list[Attachment]:
        """The attachments that a message's body names. Raises: InvalidRequest for one that isn't in the thread."""
        if len(ids) > FILES:
            raise InvalidRequest("attachments", f"A message may have at most {FILES} attachments.")
        found: list[Attachment] = []
        for index, attachment_id in enumerate(ids):
            try:
                found.append(await self.get(who, thread_id, attachment_id))
            except AttachmentNotFound as error:
                raise InvalidRequest(
                    f"attachments[{index}].id", "There is no such attachment in this thread."
                ) from error
        return found

    async def get(self, who: Principal, thread_id: str, attachment_id: str) -> Attachment:
        """Raises: ThreadNotFound, AttachmentNotFound."""
        if not is_id(attachment_id):
            raise AttachmentNotFound(attachment_id)
        return (await self._store.file(who, thread_id, attachment_id)).attachment

    async def read(
        self, who: Principal, thread_id: str, attachment: Attachment, start: int, end: int
    ) -> AsyncIterator[bytes]:
        """The bytes from `start` to before `end`, in pieces. Raises: BlobUnavailable."""
        return await self._blobs.read(_key(who, thread_id, attachment.id), start, end)

    async def picture(self, who: Principal, file: KeptFile) -> bytes | None:
        """A picture as a model is shown it: smaller, if it was large; null if it is lost. Raises: BlobUnavailable."""
        key = _key(who, file.thread_id, file.attachment.id)
        try:
            pieces = await self._blobs.read(key + _SMALL if file.small else key)
            return b"".join([piece async for piece in pieces])
        except BlobNotFound:
            logger.warning("the picture %s is lost", key)
            return None

    async def forget(self, who: Principal, thread_id: str) -> None:
        """Delete a deleted thread's blobs."""
        try:
            await self._blobs.delete_all(_prefix(who, thread_id))
        except BlobUnavailable as error:
            logger.warning("the blobs of deleted thread %s remain: %s", thread_id, error)

    def of_thread(self, who: Principal, thread_id: str) -> ThreadFiles:
        """What an agent may read during a run."""
        return ThreadFiles(self, self._store, who, thread_id)


class ThreadFiles:
    """The `Files` of a run: its thread's attachments."""

    def __init__(self, attachments: Attachments, store: ThreadStore, who: Principal, thread_id: str) -> None:
        self._attachments = attachments
        self._store = store
        self._who = who
        self._thread_id = thread_id

    async def text(self, attachment: Attachment) -> str | None:
        file = await self._file(attachment)
        return file.text if file else None

    async def picture(self, attachment: Attachment) -> bytes | None:
        file = await self._file(attachment)
        return await self._attachments.picture(self._who, file) if file else None

    async def _file(self, attachment: Attachment) -> KeptFile | None:
        with contextlib.suppress(AttachmentNotFound):
            return await self._store.file(self._who, self._thread_id, attachment.id)
        return None


def _prefix(who: Principal, thread_id: str) -> str:
    return f"{who.organization_id}/{thread_id}"


def _key(who: Principal, thread_id: str, attachment_id: str) -> str:
    return f"{_prefix(who, thread_id)}/{attachment_id}"
