"""The blob store: a blob exists whole or not at all. In a folder, and in S3 as moto implements it."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from obstore.store import ObjectStore

from agent_chat.stores.blobs import PART_BYTES, PIECE_BYTES, Blobs, open_blobs
from agent_chat.stores.errors import BadBlobsURL, BlobNotFound, BlobUnavailable, NotFound
from agent_chat.stores.models import new_id
from tests.support.peak_memory import Peak
from tests.support.s3_server import S3Server
from tests.support.s3_server import s3_server as s3_server

LARGE_BYTES = 100 * 2**20


class Opened(msgspec.Struct):
    """A blob store, and functions that inspect it from outside.

    `left`: the number of blobs and unfinished uploads. `begun`: whether an upload has begun.
    """

    blobs: Blobs
    left: Callable[[], int]
    begun: Callable[[], bool]


def files(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


@pytest.fixture(params=["folder", "s3"])
def opened(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Opened:
    if request.param == "folder":
        folder = tmp_path / "data" / "blobs"
        return Opened(open_blobs(None, tmp_path / "data"), lambda: files(folder), lambda: files(folder) > 0)
    server: S3Server = request.getfixturevalue("s3_server")
    bucket = f"test-{new_id()}"
    server.create(bucket)
    environment = {
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "something",
        "AWS_REGION": "us-east-1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return Opened(
        open_blobs(f"s3://{bucket}/some/prefix", tmp_path),
        lambda: server.keys(bucket) + server.unfinished(bucket),
        lambda: server.unfinished(bucket) > 0,
    )


@pytest.fixture
def blobs(opened: Opened) -> Blobs:
    return opened.blobs


@pytest.fixture
def file(tmp_path: Path) -> Callable[[bytes], Path]:
    def make(data: bytes) -> Path:
        path = tmp_path / new_id()
        path.write_bytes(data)
        return path

    return make


async def content(blobs: Blobs, key: str, start: int = 0, end: int | None = None) -> bytes:
    return b"".join([piece async for piece in await blobs.read(key, start, end)])


@pytest.mark.parametrize("size", [0, 1, 10_000, PART_BYTES, PART_BYTES + 1, 2 * PART_BYTES + 7])
async def test_read_returns_what_was_put(blobs: Blobs, file: Callable[[bytes], Path], size: int) -> None:
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    await blobs.put("organization/thread/attachment", file(data))
    assert await content(blobs, "organization/thread/attachment") == data


@pytest.mark.parametrize(
    ("start", "end", "text"),
    [
        (0, None, b"0123456789"),
        (3, None, b"3456789"),
        (3, 5, b"34"),
        (0, 1, b"0"),
        (9, 10, b"9"),
        (8, 99, b"89"),
        (4, 4, b""),
        (10, None, b""),
        (99, 100, b""),
    ],
)
async def test_a_range_is_read(
    blobs: Blobs, file: Callable[[bytes], Path], start: int, end: int | None, text: bytes
) -> None:
    await blobs.put("a/b", file(b"0123456789"))
    assert await content(blobs, "a/b", start, end) == text


@pytest.mark.parametrize(("start", "end"), [(-1, None), (3, 2)])
async def test_an_invalid_range_is_refused(blobs: Blobs, start: int, end: int | None) -> None:
    with pytest.raises(ValueError, match="no bytes"):
        await blobs.read("a/b", start, end)


@pytest.mark.parametrize("start", [0, 1])
async def test_a_missing_blob_is_reported_before_the_first_piece(blobs: Blobs, start: int) -> None:
    with pytest.raises(BlobNotFound, match="No blob a/b here") as raised:
        await blobs.read("a/b", start)
    assert not isinstance(raised.value, NotFound), "callers take a NotFound for a deleted thread"


async def test_put_replaces_an_earlier_blob(blobs: Blobs, file: Callable[[bytes], Path]) -> None:
    await blobs.put("a/b", file(b"a longer text"))
    await blobs.put("a/b", file(b"short"))
    assert await content(blobs, "a/b") == b"short"


async def test_a_blob_can_be_deleted_twice(opened: Opened, file: Callable[[bytes], Path]) -> None:
    await opened.blobs.put("a/b", file(b"data"))
    await opened.blobs.delete("a/b")
    await opened.blobs.delete("a/b")
    with pytest.raises(BlobNotFound):
        await opened.blobs.read("a/b")
    assert opened.left() == 0


async def test_delete_all_deletes_the_blobs_under_a_prefix_only(blobs: Blobs, file: Callable[[bytes], Path]) -> None:
    data = file(b"data")
    for key in ("a/b/1", "a/b/2", "a/b/deeper/3", "a/bc/4", "a/c"):
        await blobs.put(key, data)
    await asyncio.gather(blobs.delete_all("a/b"), blobs.delete_all("a/b"), blobs.delete("a/b/1"))
    await blobs.delete_all("a/nothing")
    for key in ("a/b/1", "a/b/2", "a/b/deeper/3"):
        with pytest.raises(BlobNotFound):
            await blobs.read(key)
    assert await content(blobs, "a/bc/4") == await content(blobs, "a/c") == b"data"


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "a//b", "..", "../a", "a/../b", "a/./b", "a b", "a\n", "a#1", "é", "a\0"]
)
async def test_a_key_cannot_name_a_path_outside_the_store(
    blobs: Blobs, file: Callable[[bytes], Path], key: str
) -> None:
    data = file(b"data")
    for refused in (blobs.put(key, data), blobs.read(key), blobs.delete(key), blobs.delete_all(key)):
        with pytest.raises(ValueError, match="is not a valid key"):
            await refused


async def test_a_cancelled_put_leaves_no_blob(opened: Opened, file: Callable[[bytes], Path]) -> None:
    data = file(bytes(LARGE_BYTES))
    putting = asyncio.create_task(opened.blobs.put("a/b", data))
    async with asyncio.timeout(10):
        while not await asyncio.to_thread(opened.begun):
            assert not putting.done()
        putting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await putting
    assert opened.left() == 0
    with pytest.raises(BlobNotFound):
        await opened.blobs.read("a/b")


class Unstoppable:
    """obstore's store with puts that continue after they are cancelled, as its own sometimes do."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.begun: asyncio.Future[asyncio.Future[object]] = asyncio.get_running_loop().create_future()

    async def put_async(self, *args: Any, **kwargs: Any) -> object:
        upload: asyncio.Future[object] = asyncio.ensure_future(self._store.put_async(*args, **kwargs))
        self.begun.set_result(upload)
        return await asyncio.shield(upload)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


async def test_a_cancelled_put_of_a_small_file_leaves_no_blob(opened: Opened, file: Callable[[bytes], Path]) -> None:
    store = Unstoppable(opened.blobs._store)
    putting = asyncio.create_task(Blobs(cast(ObjectStore, store)).put("a/b", file(b"small")))
    async with asyncio.timeout(10):
        upload = await store.begun
        putting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await putting
        await upload
    assert opened.left() == 0


async def test_a_reader_sees_the_old_blob_or_the_new_one(blobs: Blobs, file: Callable[[bytes], Path]) -> None:
    old, new = file(b"o" * (PART_BYTES + 9)), file(b"n" * (PART_BYTES + 9))
    await blobs.put("a/b", old)
    putting = asyncio.create_task(blobs.put("a/b", new))
    seen = set()
    while not putting.done():
        seen.add(bytes(set(await content(blobs, "a/b"))))
    await putting
    assert seen <= {b"o", b"n"}
    assert set(await content(blobs, "a/b")) == set(b"n")


async def test_concurrent_calls_do_not_affect_each_other(opened: Opened, file: Callable[[bytes], Path]) -> None:
    async def one(n: int) -> None:
        data = str(n).encode() * 1000
        await opened.blobs.put(f"thread{n % 3}/{n}", file(data))
        assert await content(opened.blobs, f"thread{n % 3}/{n}") == data
        await opened.blobs.delete(f"thread{n % 3}/{n}")

    async with asyncio.timeout(20):
        await asyncio.gather(*(one(n) for n in range(30)))
    assert opened.left() == 0


@pytest.mark.slow
async def test_a_large_file_takes_little_memory(blobs: Blobs, tmp_path: Path) -> None:
    path, put, got = tmp_path / "large", hashlib.sha256(), hashlib.sha256()
    with path.open("wb") as out:
        for n in range(LARGE_BYTES // 2**20):
            piece = bytes([n]) * 2**20
            put.update(piece)
            out.write(piece)
    peak = Peak()
    await blobs.put("a/large", path)
    largest = 0
    async for piece in await blobs.read("a/large"):
        got.update(piece)
        largest = max(largest, len(piece))
    grown = peak.grown() / 2**20
    print(f"100 MB put and read: the process grew by {grown:.0f} MB")  # noqa: T201
    assert got.digest() == put.digest()
    assert largest <= 8 * PIECE_BYTES
    assert grown < 50


async def test_a_reader_may_stop_early(blobs: Blobs, file: Callable[[bytes], Path]) -> None:
    await blobs.put("a/b", file(bytes(2 * PART_BYTES)))
    pieces = await blobs.read("a/b")
    assert await anext(pieces)
    await blobs.delete("a/b")


def test_the_folder_and_the_data_folder_are_private(tmp_path: Path) -> None:
    open_blobs(None, tmp_path / "data")
    for folder in (tmp_path / "data", tmp_path / "data" / "blobs"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("blobs", "must be a URL that begins with s3:// or gs:// or az://"),
        ("/var/blobs", "must be a URL that begins with"),
        ("http://127.0.0.1/bucket", "must be a URL that begins with"),
        ("s3://", "cannot be opened: .*s3://"),
        ("az://container/x", "cannot be opened: .*[Aa]ccount"),
    ],
)
def test_an_invalid_url_is_explained_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, reason: str
) -> None:
    for name in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(BadBlobsURL, match=reason) as raised:
        open_blobs(url, tmp_path)
    assert "\n" not in str(raised.value)


async def test_a_missing_bucket_is_unavailable(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: Callable[[bytes], Path]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "something")
    blobs = open_blobs("s3://nowhere", tmp_path)
    for refused in (blobs.put("a/b", file(b"data")), blobs.read("a/b")):
        with pytest.raises(BlobUnavailable, match=r"NoSuchBucket|not found"):
            await refused


async def test_an_unreachable_server_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: Callable[[bytes], Path]
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "something")
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))  # and never listens
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unheard.getsockname()[1]}")
        blobs = open_blobs("s3://bucket", tmp_path)
        async with asyncio.timeout(20):
            with pytest.raises(BlobUnavailable):
                await blobs.put("a/b", file(b"data"))
