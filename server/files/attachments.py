"""Attachments: an upload's bytes go to the blob store, its text is extracted once, its record is written last.

An attachment exists once its record does, and a record needs an existing thread. Before a blob is put, its removal is
stored; writing the record drops the removal. The sweeper deletes the blobs of what failed in between, and blobs that
could not be deleted while the blob store was unreachable.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from agent_chat.agents import AgentError, File
from agent_chat.server.errors import InvalidRequest, RateLimited, StorageFull
from agent_chat.server.files.extraction import Extractor, small_copy_path
from agent_chat.server.inputs import FILE_BYTES, FILES, Upload, clean_name
from agent_chat.server.loop_share import measured
from agent_chat.server.quota import Quota
from agent_chat.server.timing import Timing
from agent_chat.stores.blobs import Blobs
from agent_chat.stores.contracts import Store, ThreadStore
from agent_chat.stores.contracts.storage import RECORD_BYTES, UPLOAD_SECONDS, BlobRemoval
from agent_chat.stores.errors import (
    AttachmentNotFound,
    BlobNotFound,
    BlobStorageFull,
    BlobUnavailable,
    StoreUnavailable,
    ThreadNotFound,
)
from agent_chat.stores.models import Attachment, Clock, Principal, StoredFile, is_id, new_id, timestamp

logger = logging.getLogger(__name__)

_CONCURRENT_FILES = 2
"""How many files of one upload are stored at the same time. An organization may have 20 uploads, so that at most 40 of
its files wait to be read, which is fewer than WAITING_FILES."""
_SMALL = "-small"
"""Suffix of the key of a large image's smaller copy for models."""


class Attachments:
    """The attachments of threads.

    Args:
        quota: counts what is stored.
        folder: for files of agents while they are being stored.
    """

    def __init__(
        self,
        store: Store,
        blobs: Blobs,
        extractor: Extractor,
        *,
        quota: Quota,
        clock: Clock,
        folder: Path,
        timing: Timing = Timing(),
    ) -> None:
        self._store = store
        self._folder = folder
        self._blobs = blobs
        self._extractor = extractor
        self.turns = extractor.turns
        self._quota = quota
        self._clock = clock
        self._timing = timing

    async def add(self, principal: Principal, thread_id: str, uploads: Sequence[Upload]) -> list[Attachment]:
        """Store uploaded files in a thread: all of them, or none.

        A file that cannot be read is stored too; its status and error say why.

        Raises:
            StorageFull: the organization's quota is used up.
            ThreadNotFound, BlobUnavailable.
        """
        turns = asyncio.Semaphore(_CONCURRENT_FILES)

        async def store(upload: Upload) -> Attachment:
            async with turns:
                return await self._store_upload(principal, thread_id, upload)

        storing = [asyncio.create_task(measured(store, upload)) for upload in uploads]
        try:
            return list(await asyncio.gather(*storing))
        except BaseException:
            for task in storing:
                task.cancel()
            await asyncio.wait(storing)  # each undoes its own upload
            stored = [task.result() for task in storing if not task.cancelled() and task.exception() is None]
            await self.remove(principal, thread_id, stored)
            raise

    async def add_generated(self, principal: Principal, thread_id: str, file: File) -> Attachment:
        """Store a file that an agent generated, as if it had been uploaded.

        Raises:
            AgentError: the file is too large, or the quota is used up.
            ThreadNotFound, BlobUnavailable.
        """
        if len(file.data) > FILE_BYTES:
            raise AgentError(f"The agent's file is larger than {FILE_BYTES // 2**20} MB.")
        try:
            folder = Path(await asyncio.to_thread(tempfile.mkdtemp, dir=self._folder))
            try:
                upload = await asyncio.to_thread(_write, file, folder / "0")
                (attachment,) = await self.add(principal, thread_id, [upload])
            finally:
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        except RateLimited as error:
            raise AgentError("Too many files are being stored.", code="agent_overloaded", retryable=True) from error
        except StorageFull as error:
            raise AgentError(str(error), code="storage_full") from error
        except (BlobStorageFull, OSError) as error:
            logger.warning("An agent's file could not be stored: %s", error)
            raise AgentError("The server could not store the file.", code="storage_full") from error
        return attachment

    async def remove(self, principal: Principal, thread_id: str, attachments: Sequence[Attachment]) -> None:
        """Remove attachments that no message has. Those that cannot be removed now are deleted with the thread."""
        for attachment in attachments:
            await self._undo_upload(principal, thread_id, attachment.id)

    async def _undo_upload(self, principal: Principal, thread_id: str, attachment_id: str) -> None:
        """Remove the record, if there is one, then the blobs.

        The blobs stay while it is unknown whether the record was stored. If it was not, the stored removal makes the
        sweeper delete them.
        """
        try:
            with contextlib.suppress(ThreadNotFound):
                await self._store.remove_file(principal, thread_id, attachment_id)
        except StoreUnavailable as error:
            logger.warning("Attachment %s of thread %s could not be removed: %s", attachment_id, thread_id, error)
            return
        await self._delete_blobs(BlobRemoval(attachment_id, principal.organization_id, thread_id, attachment_id, 0))

    async def _store_upload(self, principal: Principal, thread_id: str, upload: Upload) -> Attachment:
        attachment_id = new_id()
        await self._quota.reserve(principal.organization_id, upload.size)
        try:
            await self._store.begin_upload(principal, thread_id, attachment_id, upload.size)
            async with asyncio.timeout(UPLOAD_SECONDS):
                return await self._put_and_record(principal, thread_id, attachment_id, upload)
        except BaseException as error:
            await self._undo_upload(
                principal, thread_id, attachment_id
            )  # after a cancellation the record may be stored
            if isinstance(error, TimeoutError):
                raise BlobUnavailable("storing the file took too long") from error
            raise

    async def _put_and_record(
        self, principal: Principal, thread_id: str, attachment_id: str, upload: Upload
    ) -> Attachment:
        found = await self._extractor.extract(
            principal.organization_id, upload.path, upload.filename, upload.content_type
        )
        attachment = Attachment(
            id=attachment_id,
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
        key = _key(principal, thread_id, attachment.id)
        await self._blobs.put(key, upload.path)
        if found.small:
            await self._blobs.put(key + _SMALL, small_copy_path(upload.path))
        await self._store.add_file(principal, StoredFile(attachment, thread_id, found.text, found.small))
        self._quota.charge(principal.organization_id, RECORD_BYTES + len(found.text))
        return attachment

    async def _delete_blobs(self, removal: BlobRemoval) -> None:
        """Delete the blobs. The sweeper deletes later what cannot be deleted now."""
        try:
            prefix = f"{removal.organization_id}/{removal.thread_id}"
            if removal.attachment_id is None:
                await self._blobs.delete_all(prefix)
            else:
                await self._blobs.delete(f"{prefix}/{removal.attachment_id}")
                await self._blobs.delete(f"{prefix}/{removal.attachment_id}{_SMALL}")
            await self._store.finish_removal(removal.id)
        except (BlobUnavailable, StoreUnavailable) as error:
            logger.warning("Blobs of thread %s could not be deleted, will be retried: %s", removal.thread_id, error)

    async def sweep(self) -> None:
        """Delete the blobs whose removal is due.

        Raises:
            StoreUnavailable.
        """
        for removal in await self._store.take_removals():
            await self._delete_blobs(removal)

    async def sweep_forever(self) -> None:
        """Every 30 s, delete the blobs that are due and correct the count of each organization's stored bytes."""
        while True:
            try:
                await self.sweep()
                await self._store.correct_bytes()
            except StoreUnavailable as error:
                logger.warning("Sweeping the storage failed, will be retried: %s", error)
            await asyncio.sleep(self._timing.storage_sweep)

    async def get_referenced(self, principal: Principal, thread_id: str, ids: Sequence[str]) -> list[Attachment]:
        """Return the attachments that a message's body references.

        Raises:
            InvalidRequest: there are too many, or one is not in the thread.
        """
        if len(ids) > FILES:
            raise InvalidRequest("attachments", f"A message may have at most {FILES} attachments.")
        found: list[Attachment] = []
        for index, attachment_id in enumerate(ids):
            try:
                found.append(await self.get(principal, thread_id, attachment_id))
            except AttachmentNotFound as error:
                raise InvalidRequest(
                    f"attachments[{index}].id", "There is no such attachment in this thread."
                ) from error
        return found

    async def get(self, principal: Principal, thread_id: str, attachment_id: str) -> Attachment:
        """Return an attachment's metadata.

        Raises:
            ThreadNotFound, AttachmentNotFound.
        """
        if not is_id(attachment_id):
            raise AttachmentNotFound(attachment_id)
        return (await self._store.get_file(principal, thread_id, attachment_id)).attachment

    async def read(
        self, principal: Principal, thread_id: str, attachment: Attachment, start: int, end: int
    ) -> AsyncIterator[bytes]:
        """Return the bytes from `start` (inclusive) to `end` (exclusive), in pieces.

        Raises:
            BlobNotFound, BlobUnavailable.
        """
        return await self._blobs.read(_key(principal, thread_id, attachment.id), start, end)

    async def picture(self, principal: Principal, file: StoredFile) -> bytes | None:
        """Return an image in a size for models: the smaller copy of a large one. None if its blob is missing.

        Raises:
            BlobUnavailable.
        """
        key = _key(principal, file.thread_id, file.attachment.id)
        try:
            pieces = await self._blobs.read(key + _SMALL if file.small else key)
            return b"".join([piece async for piece in pieces])
        except BlobNotFound:
            logger.warning("Blob of image %s is missing", key)
            return None

    async def delete_thread_blobs(self, principal: Principal, thread_id: str) -> None:
        """Delete the blobs of a deleted thread."""
        await self._delete_blobs(BlobRemoval(thread_id, principal.organization_id, thread_id, None, 0))

    def files_of(self, principal: Principal, thread_id: str) -> ThreadFiles:
        """Return the files that an agent may read during a run of this thread."""
        return ThreadFiles(self, self._store, principal, thread_id)


class ThreadFiles:
    """The `Files` of a run: the attachments of its thread."""

    def __init__(self, attachments: Attachments, store: ThreadStore, principal: Principal, thread_id: str) -> None:
        self._attachments = attachments
        self._store = store
        self._who = principal
        self._thread_id = thread_id

    async def text(self, attachment: Attachment) -> str | None:
        """See Files."""
        file = await self._file(attachment)
        return file.text if file else None

    async def picture(self, attachment: Attachment) -> bytes | None:
        """See Files."""
        file = await self._file(attachment)
        return await self._attachments.picture(self._who, file) if file else None

    async def _file(self, attachment: Attachment) -> StoredFile | None:
        with contextlib.suppress(AttachmentNotFound):
            return await self._store.get_file(self._who, self._thread_id, attachment.id)
        return None


def _write(file: File, path: Path) -> Upload:
    path.write_bytes(file.data)
    digest = hashlib.sha256(file.data).hexdigest()
    return Upload(clean_name(file.name), file.content_type, path, len(file.data), digest)


def _key(principal: Principal, thread_id: str, attachment_id: str) -> str:
    return f"{principal.organization_id}/{thread_id}/{attachment_id}"
