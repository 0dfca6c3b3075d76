"""The bytes of attachments, in a folder or in a bucket on S3, Google or Azure. Files are stored whole, read in pieces.

An upload is streamed to a local file first, which is `put` here; a download is `read` from here. The caller builds keys
from ids only: they contain nothing that a client wrote, and other keys are refused. obstore is used in this module
only. It reads credentials and endpoints from the environment variables of its backends (`AWS_ACCESS_KEY_ID`,
`AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT_URL`, `GOOGLE_APPLICATION_CREDENTIALS`,
`AZURE_STORAGE_ACCOUNT_NAME`, …).

A large file is uploaded in parts that obstore takes from `_Source`. Cancelling obstore's upload was refused: the parts
stay in the bucket, invisible and paid for, and a small file may stay whole. A source that fails makes obstore delete
the parts; a small file is deleted after it was stored.
"""

from __future__ import annotations

import asyncio
import errno
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from obstore.exceptions import BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from agent_chat.stores.errors import BadBlobsURL, BlobNotFound, BlobStorageFull, BlobUnavailable
from agent_chat.stores.folder import make_folder

if TYPE_CHECKING:
    from obstore import PutResult  # exists for type checkers only

PART_BYTES = 5 * 2**20
"""How much of a file is in memory during `put`; S3 accepts no smaller parts."""
PIECE_BYTES = 256 * 2**10
LISTED = 1000

_SCHEMES = ("s3", "gs", "az")
_KEY = re.compile(r"[0-9A-Za-z_-]+(/[0-9A-Za-z_-]+)*")
_NO_ROOM = re.compile(rf"(os error|Errno) ({errno.ENOSPC}|{errno.EDQUOT}|{errno.EFBIG})\b", re.IGNORECASE)
"""How obstore's errors of a full disk end: they have no errno."""
_ABORT_SECONDS = 10.0


class Blobs:
    """One folder or bucket. For every reader, at any time, a blob exists whole or not at all.

    Keys are ids joined by slashes: ASCII letters, digits, `-` and `_`. Any other raises ValueError.
    Every method may raise BlobUnavailable if the storage does not respond, or refuses the request.
    """

    def __init__(self, store: ObjectStore, *, folder: Path | None = None) -> None:
        self._store = store
        self._folder = folder

    async def put(self, key: str, path: Path) -> None:
        """Store the file under `key`, replacing an earlier blob. If it is cancelled, there is no blob."""
        file = await asyncio.to_thread(path.open, "rb")
        try:
            first = await asyncio.to_thread(file.read, PART_BYTES + 1)
            with _translating(_check_key(key), missing_is_unavailable=True):
                if len(first) <= PART_BYTES:
                    await self._put_whole(key, first)
                else:
                    await self._put_parts(key, _Source(first, file))
        finally:
            file.close()

    async def _put_whole(self, key: str, data: bytes) -> None:
        upload = asyncio.ensure_future(self._store.put_async(key, data, use_multipart=False))
        try:
            await asyncio.shield(upload)
        except asyncio.CancelledError:
            await self._revert(key, upload)
            raise

    async def _put_parts(self, key: str, source: _Source) -> None:
        upload = asyncio.ensure_future(
            self._store.put_async(key, source, use_multipart=True, chunk_size=PART_BYTES, max_concurrency=1)
        )
        try:
            await asyncio.shield(upload)
        except asyncio.CancelledError:
            source.stopped = True
            await self._revert(key, upload)
            raise

    async def _revert(self, key: str, upload: asyncio.Future[PutResult]) -> None:
        """Wait for the end of a cancelled upload, and delete the blob if it was stored nevertheless."""
        await asyncio.wait([upload], timeout=_ABORT_SECONDS)
        if not upload.cancel() and not upload.cancelled() and upload.exception() is None:
            with suppress(BlobUnavailable):
                await self.delete(key)

    async def read(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """Open a blob and return its bytes from `start` to `end` (exclusive; None: its end), in pieces of about 256 KB.

        A range that exceeds the blob is cut. Reading may take any time.

        Raises: BlobNotFound, before the first piece.
        """
        if start < 0 or (end is not None and end < start):
            raise ValueError(f"There are no bytes from {start} to {end}.")
        with _translating(_check_key(key)):
            if start or end is not None:  # storages refuse an empty range and one that begins at the end
                size = (await self._store.head_async(key))["size"]
                end = size if end is None else min(end, size)
                if start >= end:
                    return _no_pieces()
            result = await self._store.get_async(key, options={"range": (start, end)} if end is not None else {})
            return _read_pieces(key, aiter(result.stream(PIECE_BYTES)))

    async def delete(self, key: str) -> None:
        """Delete the blob, if it exists, and what a killed process left of it: obstore's files `<key>#<number>`."""
        try:
            with _translating(_check_key(key)):
                await self._store.delete_async(key)
        except BlobNotFound:
            pass
        if self._folder is not None:
            await asyncio.to_thread(_delete_unfinished, self._folder / key)

    async def delete_all(self, prefix: str) -> None:
        """Delete every blob whose key begins with `prefix` and a slash: for `a/b` also `a/b/c`, but not `a/bc`."""
        with _translating(_check_key(prefix)):
            async for listed in self._store.list(prefix, chunk_size=LISTED):
                keys = [found["path"] for found in listed]
                try:
                    await self._store.delete_async(keys)
                except FileNotFoundError:  # another process deletes them too: the others must still be deleted
                    for key in keys:
                        await self.delete(key)


def open_blobs(url: str | None, data_dir: Path) -> Blobs:
    """Open the folder or bucket of CHAT_BLOBS_URL; for None create and open `blobs` in the data folder.

    The bucket is not accessed here: an unreachable storage fails uploads, not the start of the server.

    Raises:
        BadBlobsURL: the URL is invalid.
        DataFolderUnusable: the folder cannot be created or written to.
    """
    if url is None:
        folder = data_dir / "blobs"
        for each in (data_dir, folder):  # one by one: created parents would get the mode of the process
            make_folder(each)
        return Blobs(LocalStore(folder, automatic_cleanup=True), folder=folder)
    if url.partition("://")[0] not in _SCHEMES:
        raise BadBlobsURL("must be a URL that begins with " + " or ".join(f"{scheme}://" for scheme in _SCHEMES))
    try:
        # allow_http: AWS_ENDPOINT_URL may name a server in the same network. A whole request has practically no
        # timeout, because a download takes as long as its client; a storage that sends nothing for 30 s is unreachable.
        store = from_url(
            url,
            client_options={"allow_http": True, "timeout": "7days", "read_timeout": "30s", "connect_timeout": "5s"},
            retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=30)},
        )
    except (BaseError, ValueError) as error:
        raise BadBlobsURL(f"cannot be opened: {_reason(error)}") from error
    return Blobs(store)


class _Source:
    """A local file in parts, read in threads. Once `stopped` it raises, and obstore deletes the parts."""

    def __init__(self, first: bytes, file: BinaryIO) -> None:
        self._first: bytes | None = first
        self._file = file
        self.stopped = False

    def __aiter__(self) -> _Source:
        return self

    async def __anext__(self) -> bytes:
        first, self._first = self._first, None
        part = first or await asyncio.to_thread(self._file.read, PART_BYTES)
        if self.stopped:
            raise InterruptedError("the upload was cancelled")
        if not part:
            raise StopAsyncIteration
        return part


async def _read_pieces(key: str, stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    with _translating(key):
        async for piece in stream:
            yield piece


async def _no_pieces() -> AsyncIterator[bytes]:
    return
    yield b""


def _check_key(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key!r} is not a valid key of a blob.")
    return key


def _delete_unfinished(blob: Path) -> None:
    with suppress(OSError):  # the folder may be gone, or another process may delete them
        for unfinished in blob.parent.glob(f"{blob.name}#*"):
            unfinished.unlink()


@contextmanager
def _translating(key: str, *, missing_is_unavailable: bool = False) -> Iterator[None]:
    """Translate obstore's exceptions. A missing bucket is not a missing blob."""
    try:
        yield
    except FileNotFoundError as error:
        if missing_is_unavailable or "NoSuchBucket" in str(error):
            raise BlobUnavailable(_reason(error)) from error
        raise BlobNotFound(key) from error
    except (BaseError, OSError, ValueError) as error:
        raise (BlobStorageFull if _NO_ROOM.search(str(error)) else BlobUnavailable)(_reason(error)) from error


def _reason(error: Exception) -> str:
    """Return the first line of obstore's text; the others dump its structures."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")[:300]
