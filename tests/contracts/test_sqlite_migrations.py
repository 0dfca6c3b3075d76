"""Migrations of the embedded database: their order, their lock, and what is left when one fails."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from pathlib import Path

import pytest

from agent_chat.stores.errors import DataFolderInUse, StoreUnavailable
from agent_chat.stores.sqlite import database as sqlite_database
from agent_chat.stores.sqlite import migrations
from agent_chat.stores.sqlite.migrations import MIGRATIONS
from agent_chat.stores.sqlite.store import open_sqlite


def version(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return int(db.execute("PRAGMA user_version").fetchone()[0])


def add_migration(monkeypatch: pytest.MonkeyPatch, *statements: str) -> None:
    """Append a migration with these statements."""

    def migration(db: sqlite3.Connection) -> None:
        for statement in statements:
            db.execute(statement)

    monkeypatch.setattr(migrations, "MIGRATIONS", (*migrations.MIGRATIONS, migration))


async def test_a_new_database_has_the_newest_version(tmp_path: Path) -> None:
    await (await open_sqlite(tmp_path / "chat.db")).close()
    assert version(tmp_path / "chat.db") == len(MIGRATIONS)


async def test_a_migration_that_fails_changes_nothing_and_the_next_start_runs_it(tmp_path: Path) -> None:
    path = tmp_path / "chat.db"
    store = await open_sqlite(path)
    await store.create_organization("Acme")
    await store.close()
    with pytest.MonkeyPatch.context() as patch:
        add_migration(patch, "DELETE FROM organizations", "CREATE TABLE notes (text TEXT)", "nonsense")
        with pytest.raises(StoreUnavailable, match="nonsense"):
            await open_sqlite(path)
    assert version(path) == len(MIGRATIONS)
    with pytest.MonkeyPatch.context() as patch:
        add_migration(patch, "CREATE TABLE notes (text TEXT)")
        store = await open_sqlite(path)
    assert await store.find_organization("Acme")
    await store.close()
    assert version(path) == len(MIGRATIONS) + 1


async def test_the_command_line_migrates_only_while_no_server_uses_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "chat.db"
    server = await open_sqlite(path)
    add_migration(monkeypatch, "CREATE TABLE notes (text TEXT)")
    monkeypatch.setattr(sqlite_database, "MIGRATION_SECONDS", 0.1)
    with pytest.raises(DataFolderInUse, match="of an earlier version: restart it first"):
        await open_sqlite(path, serving=False)
    await server.close()
    await (await open_sqlite(path, serving=False)).close()
    assert version(path) == len(MIGRATIONS) + 1
    await (await open_sqlite(path)).close()


async def test_processes_of_the_command_line_that_open_a_new_folder_together_all_succeed(tmp_path: Path) -> None:
    stores = await asyncio.gather(*[open_sqlite(tmp_path / "chat.db", serving=False) for _ in range(8)])
    created = await asyncio.gather(*[store.create_organization("Acme") for store in stores])
    assert len({organization.id for organization in created}) == 1
    for store in stores:
        await store.close()
