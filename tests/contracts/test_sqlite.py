"""SQLite alone: files that are no database, threads that die."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import sys
from pathlib import Path

import pytest

from stores.errors import DataFolderUnusable, StoreUnavailable
from stores.models import Principal, hash_of
from stores.open import Where, open_store
from stores.sqlite import open_sqlite


async def test_a_file_of_a_version_without_key_sources_opens(tmp_path: Path) -> None:
    path = tmp_path / "chat.db"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(
            "CREATE TABLE keys (id TEXT PRIMARY KEY, organization_id TEXT NOT NULL, user_id TEXT NOT NULL,"
            " hash TEXT NOT NULL, hint TEXT NOT NULL, created_at TEXT NOT NULL, revoked_at TEXT);"
            f"INSERT INTO keys VALUES ('1', '2', '3', '{hash_of('secret')}', '…cret', '2026', NULL);"
        )
    for _ in range(2):
        store = await open_sqlite(path)
        try:
            assert await store.principal("secret") == Principal("2", "3")
            assert [key.source for key in await store.keys()] == [None]
        finally:
            await store.close()


async def test_a_file_that_is_no_database_is_unavailable_and_the_folder_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "chat.db"
    path.write_bytes(b"not a database, but long enough to be taken for one" * 100)
    with pytest.raises(StoreUnavailable, match=r"chat\.db: file is not a database") as told:
        await open_sqlite(path)
    assert "\n" not in str(told.value)
    path.unlink()
    await (await open_sqlite(path)).close()


@pytest.mark.parametrize("name", ["file", "file/folder", "/proc/no such folder"])
async def test_a_data_folder_that_cannot_be_one_is_told_by_its_setting(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataFolderUnusable, match=r"^CHAT_DATA_DIR: can't keep anything in .*: [A-Z].*[a-z]$"):
        await open_store(Where(tmp_path / name))


@pytest.mark.parametrize("writes", [True, False], ids=["writer", "reader"])
async def test_a_thread_that_fails_serves_again_and_nobody_waits_for_ever(tmp_path: Path, writes: bool) -> None:
    store = await open_sqlite(tmp_path / "chat.db")
    worker = store.writer if writes else store.reader
    async with asyncio.timeout(5):
        for failures in (1, 2):
            calls = [worker.run(lambda db: sys.exit()), *[worker.run(lambda db: 1) for _ in range(3)]]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert isinstance(outcomes[0], StoreUnavailable)
            assert all(outcome == 1 or isinstance(outcome, StoreUnavailable) for outcome in outcomes[1:])
            while not await store.ready():
                pass
            assert worker.failures == failures
            await (store.create_organization(f"Acme {failures}") if writes else store.keys())
        await store.close()
    with pytest.raises(StoreUnavailable):
        await worker.run(lambda db: 1)
