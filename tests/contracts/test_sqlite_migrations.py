"""Migrations of the embedded database: their order, their lock, and what is left when one fails."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from datetime import datetime
from pathlib import Path

import pytest

from agent_chat.stores.errors import DataFolderInUse, StoreUnavailable
from agent_chat.stores.models import Idempotency, Principal
from agent_chat.stores.sqlite import database as sqlite_database
from agent_chat.stores.sqlite import migrations
from agent_chat.stores.sqlite.migrations import MIGRATIONS
from agent_chat.stores.sqlite.store import open_sqlite
from tests.support.earlier_data import recorded, unpack_folder
from tests.support.samples import new_agent, new_message, new_principal, new_thread, started_thread


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


async def test_idempotency_keys_of_version_0_1_0_still_count(tmp_path: Path) -> None:
    path = unpack_folder("0.1.0", tmp_path) / "chat.db"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.row_factory = sqlite3.Row
        of_messages = db.execute("SELECT i.*, organization_id FROM idempotency i JOIN threads t ON t.id = thread_id")
        messages = of_messages.fetchall()
        threads = db.execute("SELECT * FROM threads WHERE key IS NOT NULL").fetchall()
    assert (len(messages), len(threads)) == (4, 2)
    at = datetime.fromisoformat(recorded("0.1.0", "sqlite")["recorded_at"])
    store = await open_sqlite(path, clock=lambda: at)
    for row in messages:
        principal = Principal(row["organization_id"], row["user_id"])
        posted = await store.replay(principal, row["thread_id"], Idempotency(row["key"], row["fingerprint"]))
        assert posted is not None
        assert (posted.message.id, posted.run_id) == (row["message_id"], row["run_id"])
    for row in threads:
        principal = Principal(row["organization_id"], row["user_id"])
        created = await store.create(
            principal, new_thread(principal, row["agent_id"]), Idempotency(row["key"], row["fingerprint"])
        )
        assert (created.thread.id, created.replayed) == (row["id"], True)
    await store.close()


async def test_json_is_text_that_people_can_read_with_sqlite(tmp_path: Path) -> None:
    path = unpack_folder("0.1.0", tmp_path) / "chat.db"
    store = await open_sqlite(path)
    principal = new_principal()
    thread = await started_thread(store, principal)
    await store.append_message(principal, new_message(thread.id, "Grüße 🚢"))
    await store.create_agent(principal, new_agent(principal))
    await store.close()
    columns = {
        "agents": "agent",
        "threads": "metadata",
        "messages": "message",
        "runs": "partial",
        "attachments": "file",
    }
    with contextlib.closing(sqlite3.connect(path)) as db:
        for table, column in columns.items():
            size = "record_size" if table == "attachments" else "size - length(title)" if table == "threads" else "size"
            (count, right) = db.execute(
                f"SELECT count(*), sum(typeof({column}) = 'text' AND json_valid({column})"
                f" AND {size} >= length({column})) FROM {table}"
            ).fetchone()
            assert count == right > 0, table
        contents = db.execute("SELECT json_extract(message, '$.content') FROM messages ORDER BY seq DESC").fetchall()
        assert ("Grüße 🚢",) in contents
        assert ("Hello once",) in contents
        names = db.execute("SELECT json_extract(file, '$.attachment.filename') FROM attachments").fetchall()
        assert ("berths.csv",) in names


async def test_threads_of_version_0_1_0_are_ordered_by_their_latest_messages(tmp_path: Path) -> None:
    path = unpack_folder("0.1.0", tmp_path) / "chat.db"
    await (await open_sqlite(path)).close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        rows = db.execute(
            "SELECT t.created_at, t.updated_at, last_activity_at, MAX(m.created_at)"
            " FROM threads t LEFT JOIN messages m ON m.thread_id = t.id GROUP BY t.id"
        ).fetchall()
    assert all(active_at == (latest or created_at) for created_at, _, active_at, latest in rows)
    assert any(latest is None for *_, latest in rows)
    assert any(active_at != updated_at for _, updated_at, active_at, _ in rows)
