"""The bytes of attachments: files put whole, read in pieces, deleted. A folder, or a bucket on S3, Google or Azure.

The routes stream an upload to a local file and `put` it here; a download is `read` from here. Above this stands the
service, which makes the keys from ids alone: nothing that a client wrote is in them, and whatever else comes is
refused. obstore is met in this file only, and reads credentials and endpoints from the variables that its backends
know (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT_URL`, `GOOGLE_APPLICATION_CREDENTIALS`,
`AZURE_STORAGE_ACCOUNT_NAME`, …).

A large file goes in parts that a source of ours hands over. To cancel obstore's own upload was refused: it leaves the
parts in the bucket, unseen and paid for, and a small file perhaps whole. A source that fails makes obstore take the
parts back; a small file is deleted once it is there.
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
    from obstore import PutResult  # there for type checkers alone

PART_BYTES = 5 * 2**20
"""What is in memory at a time of a file that is put; S3 takes no smaller parts."""
PIECE_BYTES = 256 * 2**10
LISTED = 1000

_SCHEMES = ("s3", "gs", "az")
_KEY = re.compile(r"[0-9A-Za-z_-]+(/[0-9A-Za-z_-]+)*")
_NO_ROOM = re.compile(rf"(os error|Errno) ({errno.ENOSPC}|{errno.EDQUOT}|{errno.EFBIG})\b", re.IGNORECASE)
"""What obstore's errors of a local folder end with; they have no number of their own."""
_ABORT_SECONDS = 10.0


class Blobs:
    """One folder or bucket. A blob is there whole or not at all, for every reader, at any time.

    Keys are ids joined by slashes: ASCII letters, digits, `-` and `_`. Any other raises ValueError.
    Everything may raise BlobUnavailable when the storage doesn't answer or refuses.
    """

    def __init__(self, store: ObjectStore, *, folder: Path | None = None) -> None:
        self._store = store
        self._folder = folder

    async def put(self, key: str, path: Path) -> None:
        """Store the file under `key`, in place of what was there. Cancelled, it leaves nothing there."""
        file = await asyncio.to_thread(path.open, "rb")
        try:
            first = await asyncio.to_thread(file.read, PART_BYTES + 1)
            with _told(_checked(key), missing_is_unavailable=True):
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
            await self._taken_back(key, upload)
            raise

    async def _put_parts(self, key: str, source: _Source) -> None:
        upload = asyncio.ensure_future(
            self._store.put_async(key, source, use_multipart=True, chunk_size=PART_BYTES, max_concurrency=1)
        )
        try:
            await asyncio.shield(upload)
        except asyncio.CancelledError:
            source.stopped = True
            await self._taken_back(key, upload)
            raise

    async def _taken_back(self, key: str, upload: asyncio.Future[PutResult]) -> None:
        """Wait for the end of an upload that nobody wants any more, and delete what it has put all the same."""
        await asyncio.wait([upload], timeout=_ABORT_SECONDS)
        if not upload.cancel() and not upload.cancelled() and upload.exception() is None:
            with suppress(BlobUnavailable):
                await self.delete(key)

    async def read(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """Open a blob's bytes from `start` up to `end` (exclusive; null: its end), in pieces of some 256 KB.

        What lies beyond the blob's end is left out. A reader may take its time.

        Raises: BlobNotFound, before the first piece.
        """
        if start < 0 or (end is not None and end < start):
            raise ValueError(f"There are no bytes from {start} to {end}.")
        with _told(_checked(key)):
            if start or end is not None:  # storages refuse a range that is empty or begins at the end
                size = (await self._store.head_async(key))["size"]
                end = size if end is None else min(end, size)
                if start >= end:
                    return _nothing()
            result = await self._store.get_async(key, options={"range": (start, end)} if end is not None else {})
            return _pieces(key, aiter(result.stream(PIECE_BYTES)))

    async def delete(self, key: str) -> None:
        """Delete the blob, if it is there, and what a killed process left of one: obstore's files `<key>#<number>`."""
        try:
            with _told(_checked(key)):
                await self._store.delete_async(key)
        except BlobNotFound:
            pass
        if self._folder is not None:
            await asyncio.to_thread(_delete_unfinished, self._folder / key)

    async def delete_all(self, prefix: str) -> None:
        """Delete every blob whose key begins with `prefix` and a slash: `a/b` has `a/b/c`, but not `a/bc`."""
        with _told(_checked(prefix)):
            async for listed in self._store.list(prefix, chunk_size=LISTED):
                keys = [found["path"] for found in listed]
                try:
                    await self._store.delete_async(keys)
                except FileNotFoundError:  # somebody deletes them too: all the others must still go
                    for key in keys:
                        await self.delete(key)


def open_blobs(url: str | None, data_dir: Path) -> Blobs:
    """Open what CHAT_BLOBS_URL names; null: the folder `blobs` in the data folder, made if need be.

    The bucket isn't asked for here: a storage that is away stops an upload, not the server's start.

    Raises:
        BadBlobsURL: says what is wrong with the URL.
        DataFolderUnusable: the folder can't be made, or written to.
    """
    if url is None:
        folder = data_dir / "blobs"
        for made in (data_dir, folder):  # one by one: parents of a folder that is made get the process' own mode
            make_folder(made)
        return Blobs(LocalStore(folder, automatic_cleanup=True), folder=folder)
    if url.partition("://")[0] not in _SCHEMES:
        raise BadBlobsURL("must be a URL that begins with " + " or ".join(f"{scheme}://" for scheme in _SCHEMES))
    try:
        # allow_http: AWS_ENDPOINT_URL may name a server next door. No end to a whole request, for a download takes as
        # long as its client likes; a storage that says nothing for 30 s is away.
        store = from_url(
            url,
            client_options={"allow_http": True, "timeout": "7days", "read_timeout": "30s", "connect_timeout": "5s"},
            retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=30)},
        )
    except (BaseError, ValueError) as error:
        raise BadBlobsURL(f"can't be opened: {_reason(error)}") from error
    return Blobs(store)


class _Source:
    """A local file in parts, read in threads. Once `stopped`, it fails: obstore then takes the upload back."""

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


async def _pieces(key: str, stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    with _told(key):
        async for piece in stream:
            yield piece


async def _nothing() -> AsyncIterator[bytes]:
    return
    yield b""


def _checked(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key!r} is no key of a blob.")
    return key


def _delete_unfinished(blob: Path) -> None:
    with suppress(OSError):  # the folder may be gone, or cleaned up by another process
        for unfinished in blob.parent.glob(f"{blob.name}#*"):
            unfinished.unlink()


@contextmanager
def _told(key: str, *, missing_is_unavailable: bool = False) -> Iterator[None]:
    """Turn what obstore raises into our two errors. A missing bucket is no missing blob."""
    try:
        yield
    except FileNotFoundError as error:
        if missing_is_unavailable or "NoSuchBucket" in str(error):
            raise BlobUnavailable(_reason(error)) from error
        raise BlobNotFound(key) from error
    except (BaseError, OSError, ValueError) as error:
        raise (BlobStorageFull if _NO_ROOM.search(str(error)) else BlobUnavailable)(_reason(error)) from error


def _reason(error: Exception) -> str:
    """The first line of obstore's text; its further ones are a dump of structures."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")[:300]
