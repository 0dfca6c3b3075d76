"""The base of the embedded store: its tables, its lock, and the decorators that run an operation in the right thread.

An operation is a function that gets the connection. `sqlite/worker.py` runs it as a whole in one thread and returns its
result after the commit, so an acknowledged write is on the disk. aiosqlite was refused: it takes four times the CPU,
and its coroutines interleave inside a transaction.

`threads`, `messages`, `files`, `runs`, `outbox`, `directory` and `storage` beside this module contain the operations,
one contract or a part of one each; `store` puts them together.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import logging
import sqlite3
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import IO, Any, Concatenate, ParamSpec, TypeVar

from agent_chat.stores.errors import DataFolderInUse, DataFolderUnusable, StoreDamaged, StoreUnavailable
from agent_chat.stores.folder import make_private_file
from agent_chat.stores.models import Clock
from agent_chat.stores.sqlite.worker import Worker, unavailable

R = TypeVar("R")
S = TypeVar("S", bound="SQLiteBase")
P = ParamSpec("P")

NOW = "((julianday('now') - 2440587.5) * 86400.0)"
"""The database's clock, as an SQL expression: seconds since 1970."""

READERS = 3
_CHECK_STEPS = 1000
CHECK_SECONDS = 10.0
"""How long the check at start may take; a larger database is served unchecked, with a warning in the log."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS organizations (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, default_agent_id TEXT, created_at TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS users (
    id TEXT PRIMARY KEY, organization_id TEXT NOT NULL, name TEXT NOT NULL, created_at TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS users_of ON users (organization_id);
CREATE TABLE IF NOT EXISTS keys (
    id TEXT PRIMARY KEY, organization_id TEXT NOT NULL, user_id TEXT NOT NULL, hash TEXT NOT NULL,
    hint TEXT NOT NULL, created_at TEXT NOT NULL, revoked_at TEXT, source TEXT, held_at REAL);
CREATE UNIQUE INDEX IF NOT EXISTS valid_keys ON keys (hash) WHERE revoked_at IS NULL;
CREATE TABLE IF NOT EXISTS sessions (
    hash TEXT PRIMARY KEY, key_id TEXT NOT NULL, organization_id TEXT NOT NULL, user_id TEXT NOT NULL,
    created_at TEXT NOT NULL, expires_at TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS expired_sessions ON sessions (expires_at);
CREATE INDEX IF NOT EXISTS sessions_of ON sessions (key_id, created_at);
CREATE TABLE IF NOT EXISTS agents (
    seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, organization_id TEXT NOT NULL, body BLOB NOT NULL,
    deleted INTEGER NOT NULL DEFAULT 0);
CREATE INDEX IF NOT EXISTS agents_of ON agents (organization_id);
CREATE TABLE IF NOT EXISTS threads (
    id TEXT PRIMARY KEY, organization_id TEXT NOT NULL, agent_id TEXT NOT NULL, user_id TEXT NOT NULL,
    title TEXT NOT NULL, metadata BLOB NOT NULL, created_at TEXT NOT NULL, updated_at TEXT NOT NULL,
    archived INTEGER NOT NULL, running TEXT, key TEXT, fingerprint TEXT, key_at REAL);
CREATE INDEX IF NOT EXISTS threads_of ON threads (organization_id, agent_id, updated_at DESC, id DESC);
CREATE UNIQUE INDEX IF NOT EXISTS thread_keys ON threads (organization_id, user_id, agent_id, key)
    WHERE key IS NOT NULL;
CREATE TABLE IF NOT EXISTS messages (
    seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, created_at TEXT NOT NULL, body BLOB NOT NULL,
    thread_id TEXT NOT NULL REFERENCES threads (id) ON DELETE CASCADE);
CREATE INDEX IF NOT EXISTS messages_of ON messages (thread_id, seq);
CREATE TABLE IF NOT EXISTS runs (
    id TEXT PRIMARY KEY, organization_id TEXT NOT NULL, user_id TEXT NOT NULL, worker TEXT NOT NULL,
    lease REAL NOT NULL, cancelled INTEGER NOT NULL DEFAULT 0, partial BLOB NOT NULL,
    thread_id TEXT NOT NULL REFERENCES threads (id) ON DELETE CASCADE);
CREATE TABLE IF NOT EXISTS attachments (
    id TEXT PRIMARY KEY, organization_id TEXT NOT NULL, size INTEGER NOT NULL, body BLOB NOT NULL,
    thread_id TEXT NOT NULL REFERENCES threads (id) ON DELETE CASCADE);
CREATE INDEX IF NOT EXISTS attachments_of ON attachments (organization_id, size);
CREATE INDEX IF NOT EXISTS attachments_in ON attachments (thread_id);
CREATE TABLE IF NOT EXISTS idempotency (
    thread_id TEXT NOT NULL REFERENCES threads (id) ON DELETE CASCADE, user_id TEXT NOT NULL, key TEXT NOT NULL,
    fingerprint TEXT NOT NULL, message_id TEXT NOT NULL, run_id TEXT, at REAL NOT NULL,
    free INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (thread_id, user_id, key));
CREATE TABLE IF NOT EXISTS outbox (
    seq INTEGER PRIMARY KEY, thread_id TEXT NOT NULL, organization_id TEXT NOT NULL, id TEXT NOT NULL,
    type TEXT NOT NULL, due REAL NOT NULL, cut INTEGER NOT NULL DEFAULT 0);
CREATE INDEX IF NOT EXISTS outbox_of ON outbox (thread_id, seq);
CREATE INDEX IF NOT EXISTS outbox_due ON outbox (due);
CREATE TABLE IF NOT EXISTS storage (
    organization_id TEXT PRIMARY KEY, stored INTEGER NOT NULL DEFAULT 0, measure_at REAL NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS removals (
    id TEXT PRIMARY KEY, organization_id TEXT NOT NULL, thread_id TEXT NOT NULL, attachment_id TEXT,
    size INTEGER NOT NULL, due REAL NOT NULL, taken INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS removals_due ON removals (due);
CREATE INDEX IF NOT EXISTS removals_of ON removals (organization_id, size);
CREATE TABLE IF NOT EXISTS probe (id INTEGER PRIMARY KEY, data BLOB NOT NULL);
"""
_ADDED_COLUMNS = {"keys": {"source": "TEXT", "held_at": "REAL"}}
"""Columns that databases of earlier versions lack."""

logger = logging.getLogger(__name__)


def _lock_folder(folder: Path) -> IO[str]:
    """Take the folder's lock, which is held until the file is closed. Raises: DataFolderInUse, DataFolderUnusable."""
    make_private_file(folder / "lock")
    try:
        lock = (folder / "lock").open("a")
    except OSError as error:
        raise DataFolderUnusable(str(folder), str(error.strerror)) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise DataFolderInUse(str(folder)) from error
    return lock


def _prepare(path: Path, *, serving: bool) -> None:
    """Create the file and its tables where they are missing; a server also ends all leases, whose holders are gone."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=10)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        if serving:
            _check(db, path)
        db.executescript(_SCHEMA)
        _add_columns(db)
        if serving:
            db.execute("UPDATE runs SET lease = 0")
            db.execute("UPDATE outbox SET due = 0")
            db.execute("UPDATE removals SET due = 0")


def _add_columns(db: sqlite3.Connection) -> None:
    db.execute("BEGIN IMMEDIATE")  # another process may be adding them as well
    for table, columns in _ADDED_COLUMNS.items():
        present = {row[1] for row in db.execute(f"PRAGMA table_info({table})")}
        for name in columns.keys() - present:
            db.execute(f"ALTER TABLE {table} ADD COLUMN {name} {columns[name]}")
    db.execute("COMMIT")


def _check(db: sqlite3.Connection, path: Path) -> None:
    """Check the file for damage, for CHECK_SECONDS at most. Raises: StoreDamaged."""
    deadline = time.monotonic() + CHECK_SECONDS
    db.set_progress_handler(lambda: time.monotonic() > deadline, _CHECK_STEPS)
    try:
        (result,) = db.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_INTERRUPT:
            raise
        logger.warning("%s could not be checked for damage within %g s; it is served unchecked", path, CHECK_SECONDS)
        return
    finally:
        db.set_progress_handler(None, 0)
    if result != "ok":
        raise StoreDamaged(" ".join(str(result).split()))


def _probe(db: sqlite3.Connection) -> None:
    """Write as much as an ordinary message takes, to find out whether the disk has room again."""
    db.execute("INSERT OR REPLACE INTO probe VALUES (1, zeroblob(65536))")


class SQLiteBase:
    """The connection threads and the folder's lock. Operations are methods with `runs_in_reader` or `runs_in_writer`.

    Args:
        path: the database file; its folder exists.
        lease: how many seconds a run's lease lasts.
        clock: for times that clients see and for the age of idempotency keys; leases use the database's clock.
        serving: take the folder's lock and end all leases; False for the command line beside a server.

    Raises:
        DataFolderInUse: another server serves from this folder.
        DataFolderUnusable: the files cannot be made private.
        StoreDamaged: the file is damaged, or is not a database.
        StoreUnavailable: the file cannot be opened.
    """

    def __init__(self, path: Path, *, lease: float, clock: Clock, serving: bool) -> None:
        self.lease = lease
        self.clock = clock
        self._lock = _lock_folder(path.parent) if serving else None
        try:
            for suffix in ("", "-wal", "-shm"):
                make_private_file(path.with_name(path.name + suffix), create=not suffix)
            _prepare(path, serving=serving)
        except (sqlite3.Error, DataFolderUnusable, StoreDamaged) as error:
            if self._lock:
                self._lock.close()
            if not isinstance(error, sqlite3.Error):
                raise
            failure = unavailable(error)
            raise type(failure)(f"{path}: {error}") from error
        self.writer = Worker(path, writes=True)
        self.reader = Worker(path, writes=False, threads=READERS)

    @property
    def failures(self) -> int:
        return self.reader.failed_operations + self.writer.failed_operations

    async def ready(self) -> bool:
        """True if the last write succeeded, or one does now."""
        if self.reader.damaged or self.writer.damaged:
            return False
        try:
            await self.reader.run(lambda db: db.execute("SELECT 1").fetchone())
            if self.writer.failing:
                await self.writer.run(_probe)
        except StoreUnavailable:
            return False
        return True

    async def close(self) -> None:
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self.reader.stop()
        self.writer.stop()
        if self._lock:
            self._lock.close()


def runs_in_reader(
    operation: Callable[Concatenate[S, sqlite3.Connection, P], R],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """Make a method of an operation that only reads: it runs in a reader thread."""

    async def method(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await self.reader.run(lambda db: operation(self, db, *args, **kwargs))

    functools.update_wrapper(method, operation)
    return method


def runs_in_writer(
    operation: Callable[Concatenate[S, sqlite3.Connection, P], R],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """Make a method of an operation that writes: it runs in the writer thread and returns after the commit."""

    async def method(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await self.writer.run(lambda db: operation(self, db, *args, **kwargs))

    functools.update_wrapper(method, operation)
    return method
