"""What only SQLite has: a file that may be damaged, threads that may fail, a data folder."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import stat
import sys
import threading
from pathlib import Path

import pytest

from agent_chat.stores.errors import DataFolderUnusable, StoreDamaged, StoreUnavailable
from agent_chat.stores.models import Principal, hash_of
from agent_chat.stores.open import Where, open_store
from agent_chat.stores.sqlite import database as sqlite_database
from agent_chat.stores.sqlite import storage as sqlite_storage
from agent_chat.stores.sqlite.database import READERS
from agent_chat.stores.sqlite.store import open_sqlite
from tests.support.samples import new_message, new_principal, started_thread


async def test_a_database_of_a_version_without_key_sources_opens(tmp_path: Path) -> None:
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
            assert await store.find_principal("secret") == Principal("2", "3")
            assert [key.source for key in await store.list_keys()] == [None]
        finally:
            await store.close()


async def test_opening_a_file_that_is_not_a_database_fails_and_releases_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "chat.db"
    path.write_bytes(b"not a database, but long enough to be taken for one" * 100)
    with pytest.raises(StoreDamaged, match=r"chat\.db: file is not a database") as error:
        await open_sqlite(path)
    assert "\n" not in str(error.value)
    path.unlink()
    await (await open_sqlite(path)).close()


@pytest.mark.parametrize("name", ["file", "file/folder", "/proc/no such folder"])
async def test_the_error_for_an_unusable_data_folder_names_the_setting(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataFolderUnusable, match=r"^CHAT_DATA_DIR: cannot store anything in .*: [A-Z].*[a-z]$"):
        await open_store(Where(tmp_path / name))


@pytest.mark.parametrize("writes", [True, False], ids=["writer", "reader"])
async def test_a_thread_that_fails_opens_the_database_again_and_every_call_returns(
    tmp_path: Path, writes: bool
) -> None:
    store = await open_sqlite(tmp_path / "chat.db")
    worker = store.writer if writes else store.reader
    async with asyncio.timeout(5):
        for reopened in (1, 2):
            calls = [worker.run(lambda db: sys.exit()), *[worker.run(lambda db: 1) for _ in range(3)]]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert isinstance(outcomes[0], StoreUnavailable)
            assert all(outcome == 1 or isinstance(outcome, StoreUnavailable) for outcome in outcomes[1:])
            while not await store.ready() or worker.reopened < reopened:
                pass
            assert worker.reopened == reopened
            await (store.create_organization(f"Acme {reopened}") if writes else store.list_keys())
        await store.close()
    with pytest.raises(StoreUnavailable):
        await worker.run(lambda db: 1)


async def damaged(path: Path) -> None:
    """Write a database with messages, then overwrite pages in its middle."""
    store = await open_sqlite(path)
    principal = new_principal()
    thread = await started_thread(store, principal)
    for n in range(50):
        await store.append_message(principal, new_message(thread.id, f"{n}" * 2000))
    await store.close()
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size // 2)
        file.write(b"\xff" * (size // 4))


async def test_a_damaged_database_is_found_at_start(tmp_path: Path) -> None:
    path = tmp_path / "chat.db"
    await damaged(path)
    with pytest.raises(StoreDamaged, match=r"damaged") as found:
        await open_sqlite(path)
    assert "\n" not in str(found.value)


async def test_a_database_too_large_for_the_check_at_start_is_served_unchecked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sqlite_database, "CHECK_SECONDS", -1.0)
    monkeypatch.setattr(sqlite_database, "_CHECK_STEPS", 1)
    await (await open_sqlite(tmp_path / "chat.db")).close()
    caplog.clear()
    await (await open_sqlite(tmp_path / "chat.db")).close()
    assert "unchecked" in caplog.text


async def test_a_store_that_finds_damage_while_serving_is_not_ready(tmp_path: Path) -> None:
    await damaged(tmp_path / "chat.db")
    store = await open_sqlite(tmp_path / "chat.db", serving=False)  # skips the check at start
    try:
        assert await store.ready() is True
        with pytest.raises(StoreDamaged):
            await store.reader.run(lambda db: db.execute("SELECT sum(length(hex(message))) FROM messages").fetchall())
        assert await store.ready() is False
        assert store.failures == 1
    finally:
        await store.close()


async def test_a_slow_read_does_not_delay_other_reads(tmp_path: Path) -> None:
    store = await open_sqlite(tmp_path / "chat.db")
    released = threading.Event()
    try:
        slow = [asyncio.create_task(store.reader.run(lambda db: released.wait(10))) for _ in range(READERS - 1)]
        async with asyncio.timeout(5):
            assert await store.list_keys() == []
        assert not any(task.done() for task in slow)
    finally:
        released.set()
        await store.close()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def test_an_existing_data_folder_is_made_private(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir(mode=0o755)
    for name in ("chat.db", "lock"):
        (folder / name).touch(mode=0o644)
    store = await open_store(Where(folder))
    await store.create_organization("Acme")
    assert mode(folder) == 0o700
    assert {path.name: mode(path) for path in folder.iterdir()} == dict.fromkeys(
        ("chat.db", "chat.db-wal", "chat.db-shm", "lock"), 0o600
    )
    await store.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a folder of another user")
async def test_a_data_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    os.chown(tmp_path, 65534, 65534)
    with pytest.raises(DataFolderUnusable, match="belongs to another user"):
        await open_store(Where(tmp_path))
    os.chown(tmp_path, 0, 0)
    os.chmod(tmp_path, 0o1777)
    with pytest.raises(DataFolderUnusable, match="all users share it"):
        await open_store(Where(tmp_path))


async def test_an_organizations_bytes_are_measured_without_reading_those_of_others(tmp_path: Path) -> None:
    store = await open_sqlite(tmp_path / "chat.db")
    plan = await store.reader.run(
        lambda db: db.execute(f"EXPLAIN QUERY PLAN {sqlite_storage._MEASURE}", ("organization",)).fetchall()
    )
    await store.close()
    steps = [str(row["detail"]) for row in plan]
    assert len([step for step in steps if step.startswith("SEARCH")]) == 6
    assert [step for step in steps if step.startswith("SCAN") and "CONSTANT" not in step] == []
