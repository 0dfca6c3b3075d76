"""Unreferenced blobs are deleted, whether the storage or the process failed."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import cast

import pytest

from agent_chat.server.ai_chat_service import AIChatService
from agent_chat.stores.errors import StoreUnavailable
from agent_chat.stores.models import Principal, StoredFile
from agent_chat.stores.sqlite import storage as sqlite_storage
from tests.support.servers import Live, live_server, server_process
from tests.support.shapes import is_problem

FILES = [("files", ("a.txt", b"text"))]


def blobs(data_dir: Path) -> list[str]:
    return [path.name for path in (data_dir / "blobs").rglob("*") if path.is_file()]


@asynccontextmanager
async def unreachable_blobs(data_dir: Path) -> AsyncIterator[None]:
    """Put a file in the place of the blobs' folder."""
    folder, aside = data_dir / "blobs", data_dir / "aside"
    folder.rename(aside)
    folder.touch()
    yield
    folder.unlink()
    aside.rename(folder)


async def sweep(live: Live) -> None:
    await cast(AIChatService, live.server.lifespan.state["service"]).attachments.sweep()


async def test_what_is_deleted_while_the_storage_is_unreachable_goes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_storage, "REMOVAL_SECONDS", -1.0)
    async with live_server(tmp_path) as live:
        thread = await live.scripted_thread()
        assert (await live.http.post(f"{thread}/attachments", files=FILES)).status_code == 201
        async with unreachable_blobs(tmp_path):
            assert (await live.http.delete(thread)).status_code == 204
            await sweep(live)
        assert len(blobs(tmp_path)) == 1
        await sweep(live)
        assert blobs(tmp_path) == []


async def test_an_upload_that_is_cancelled_as_its_record_is_stored_leaves_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with live_server(tmp_path) as live:
        thread = await live.scripted_thread()
        store = cast(AIChatService, live.server.lifespan.state["service"]).store
        add_file = store.add_file

        async def cancelled(principal: Principal, file: StoredFile) -> None:
            await add_file(principal, file)
            raise asyncio.CancelledError

        monkeypatch.setattr(store, "add_file", cancelled)
        assert (await live.http.post(f"{thread}/attachments", files=FILES)).status_code == 500
        assert blobs(tmp_path) == []
        with closing(sqlite3.connect(tmp_path / "chat.db")) as db:
            assert db.execute("SELECT COUNT(*) FROM attachments").fetchone() == (0,)


@pytest.mark.parametrize("stored", [True, False], ids=["record", "no record"])
async def test_the_blob_stays_while_it_is_unknown_whether_its_record_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: bool
) -> None:
    monkeypatch.setattr(sqlite_storage, "UPLOAD_SECONDS", -1.0)
    async with live_server(tmp_path) as live:
        thread = await live.scripted_thread()
        store = cast(AIChatService, live.server.lifespan.state["service"]).store
        add_file = store.add_file

        async def lost(principal: Principal, file: StoredFile) -> None:
            if stored:
                await add_file(principal, file)
            raise StoreUnavailable("connection lost")

        async def unavailable(principal: Principal, thread_id: str, attachment_id: str) -> None:
            raise StoreUnavailable("still lost")

        monkeypatch.setattr(store, "add_file", lost)
        monkeypatch.setattr(store, "remove_file", unavailable)
        is_problem(await live.http.post(f"{thread}/attachments", files=FILES), 503, "store_unavailable")
        assert len(blobs(tmp_path)) == 1
        await sweep(live)
        assert len(blobs(tmp_path)) == int(stored)
        with closing(sqlite3.connect(tmp_path / "chat.db")) as db:
            assert db.execute("SELECT COUNT(*) FROM attachments").fetchone() == (int(stored),)


async def test_a_failed_upload_leaves_nothing(tmp_path: Path) -> None:
    async with live_server(tmp_path) as live:
        thread = await live.scripted_thread()
        async with unreachable_blobs(tmp_path):
            is_problem(await live.http.post(f"{thread}/attachments", files=FILES), 503, "store_unavailable")
        assert (await live.http.post(f"{thread}/attachments", files=FILES)).status_code == 201
        await live.http.delete(thread)
        assert blobs(tmp_path) == []


async def test_a_blob_whose_process_died_before_its_record_is_deleted(tmp_path: Path) -> None:
    """The process is killed while it stores ten files: some have their records, others only their blobs."""
    async with server_process(tmp_path) as server:
        thread = await server.thread()
        many = [("files", (f"{n}.txt", b"text")) for n in range(10)]
        uploading = [asyncio.create_task(server.http.post(f"{thread}/attachments", files=many)) for _ in range(6)]
        async with asyncio.timeout(10):
            while len(blobs(tmp_path)) < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        await server.stop()
        await asyncio.gather(*uploading, return_exceptions=True)
        with closing(sqlite3.connect(tmp_path / "chat.db")) as db:
            recorded = {row[0] for row in db.execute("SELECT id FROM attachments")}
        assert set(blobs(tmp_path)) >= recorded
        await server.start()
        async with asyncio.timeout(10):
            while set(blobs(tmp_path)) != recorded:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
