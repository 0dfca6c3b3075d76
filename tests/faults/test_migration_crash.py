"""A server killed while it migrates data of version 0.1.0, and two servers that start on them together."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
from pathlib import Path

import pytest

from agent_chat.stores.sqlite.migrations import MIGRATIONS
from tests.support.client import KEY
from tests.support.earlier_data import unpack_folder
from tests.support.nursery import fork
from tests.support.services import free_port

ADDED = 4000
"""Messages of 4 KB that are added to the fixture, so that a migration can be caught in the middle."""
MOMENTS = (0, 2**12, 2**21, 2**22, 2**23, 2**24)
"""Sizes of the write-ahead log at which the server is killed: the migration writes 20 MB to it before it commits."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder of version 0.1.0 with ADDED more messages."""
    folder = unpack_folder("0.1.0", tmp_path)
    with contextlib.closing(sqlite3.connect(folder / "chat.db")) as db, db:
        db.execute(
            "INSERT INTO messages (id, created_at, body, thread_id)"
            " WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < ?)"
            " SELECT 'added-' || n, created_at, CAST(json_set(body, '$.content', hex(randomblob(2048))) AS BLOB),"
            " thread_id FROM numbers, (SELECT * FROM messages LIMIT 1)",
            (ADDED,),
        )
    return folder


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "CHAT_DATA_DIR": str(folder), "CHAT_API_KEY": KEY, "PORT": str(free_port())}


def read_messages(folder: Path, column: str) -> tuple[int, list[tuple[str, str]]]:
    """The schema version, and all messages."""
    with contextlib.closing(sqlite3.connect(folder / "chat.db")) as db:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        return version, db.execute(f"SELECT id, CAST({column} AS TEXT) FROM messages ORDER BY seq").fetchall()


async def kill_at(folder: Path, size: int) -> None:
    """Start a server and kill it when the write-ahead log has this size, or when it listens."""
    log = folder / "chat.db-wal"
    server = await fork(environment(folder))
    listening = asyncio.create_task(server.stdout.readline())
    async with asyncio.timeout(20):
        while not (log.exists() and log.stat().st_size >= size) and not listening.done():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        os.kill(server.pid, signal.SIGKILL)
        assert await server.wait() == -signal.SIGKILL
        await listening


async def start_and_stop(folder: Path) -> None:
    server = await fork(environment(folder))
    async with asyncio.timeout(20):
        assert b"Listening" in await server.stdout.readline()
        os.kill(server.pid, signal.SIGTERM)
        assert await server.wait() == 0


async def test_a_server_that_is_killed_while_it_migrates_changes_nothing_and_the_next_start_completes(
    folder: Path,
) -> None:
    _, messages = read_messages(folder, "body")
    for size in MOMENTS:
        await kill_at(folder, size)
        assert read_messages(folder, "body") == (0, messages), size
    await start_and_stop(folder)
    version, migrated = read_messages(folder, "message")
    assert version == len(MIGRATIONS)
    assert [row for row in migrated if row[0].startswith("added-")] == messages[-ADDED:]
    assert [id for id, _ in migrated] == [id for id, _ in messages]


async def test_of_two_servers_that_start_together_one_migrates_and_the_other_is_refused(folder: Path) -> None:
    _, messages = read_messages(folder, "body")
    servers = [await fork(environment(folder)) for _ in range(2)]
    async with asyncio.timeout(20):
        lines = await asyncio.gather(*[server.stdout.readline() for server in servers])
        loser, winner = sorted(servers, key=lambda server: lines[servers.index(server)])
        assert b"" in lines
        assert await loser.wait() == 2
        assert winner.returncode is None
    version, migrated = read_messages(folder, "message")
    assert version == len(MIGRATIONS)
    assert len(migrated) == len(messages)
    os.kill(winner.pid, signal.SIGKILL)
    await winner.wait()
