"""The machinery of the embedded store: the standard sqlite3, WAL, one writer thread and one reader thread.

A verb is one function that is given the connection; it runs whole in its thread, so that nothing interleaves inside
a transaction. The writer commits what has queued up together, each verb in a savepoint of its own, and answers after
the commit: an acknowledged write is on the disk. aiosqlite was refused: four times the CPU, and its coroutines
interleave inside a transaction.

`sqlite_threads` and `sqlite_directory` hold the verbs; `sqlite` puts them together.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any, Concatenate, ParamSpec, TypeVar

from stores.errors import DataFolderInUse, DataFolderUnusable, StoreUnavailable
from stores.models import Clock

R = TypeVar("R")
S = TypeVar("S", bound="Database")
P = ParamSpec("P")

NOW = "((julianday('now') - 2440587.5) * 86400.0)"
"""The database's clock, as an SQL expression: seconds since 1970."""

_BATCH = 64
_LONGEST_WAIT_SECONDS = 1.0
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
"""
_ADDED_COLUMNS = {"keys": {"source": "TEXT", "held_at": "REAL"}}
"""What databases of earlier versions lack."""

Verb = Callable[[sqlite3.Connection], object]
Item = tuple[Verb, Future[object]]

logger = logging.getLogger(__name__)


class _Worker:
    """A thread with a connection that runs verbs in the order they come, writing ones in shared transactions."""

    def __init__(self, path: Path, *, writes: bool) -> None:
        self._path = path
        self._writes = writes
        self._queue: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._ended = False
        self.failures = 0
        self._thread = threading.Thread(target=self._work, name=f"sqlite-{'write' if writes else 'read'}", daemon=True)
        self._thread.start()

    async def run(self, verb: Callable[[sqlite3.Connection], R]) -> R:
        """Raises: StoreUnavailable, and whatever the verb does."""
        future: Future[R] = Future()
        self._queue.put((verb, future))  # type: ignore[arg-type]
        if self._ended:
            self._refuse()
        return await asyncio.wrap_future(future)

    def stop(self) -> None:
        """End the thread once it has done what is queued; whoever comes later is refused."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        wait = 0.0
        try:
            while True:
                try:
                    return self._serve()
                except BaseException:
                    logger.exception("the thread %s failed; it opens the database again", self._thread.name)
                self.failures += 1
                if self._refuse():
                    return
                time.sleep(wait)
                wait = min(wait + 0.1, _LONGEST_WAIT_SECONDS)
        finally:
            self._ended = True  # first: who queues something behind the refusal refuses it
            self._refuse()

    def _serve(self) -> None:
        """Run verbs until the thread is to end."""
        with contextlib.closing(sqlite3.connect(self._path, isolation_level=None, timeout=10)) as db:
            db.row_factory = sqlite3.Row
            db.execute("PRAGMA foreign_keys = ON")
            db.execute("PRAGMA synchronous = FULL")
            while batch := self._next_batch():
                self._run_batch(db, batch)

    def _next_batch(self) -> list[Item]:
        """What has queued up, at least one; nothing once the thread is to end."""
        while (first := self._queue.get()) is not None:
            batch = [first]
            while self._writes and len(batch) < _BATCH and not self._queue.empty():
                if (item := self._queue.get()) is None:
                    self._queue.put(None)
                    break
                batch.append(item)
            if wanted := [item for item in batch if item[1].set_running_or_notify_cancel()]:
                return wanted
        return []

    def _refuse(self) -> bool:
        """Fail what is queued: it is not run. True if the thread is to end."""
        stopped = False
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._queue.get_nowait()
                stopped = stopped or item is None
                if item and item[1].set_running_or_notify_cancel():
                    item[1].set_exception(StoreUnavailable("its thread has ended or failed"))
        return stopped

    def _run_batch(self, db: sqlite3.Connection, batch: list[Item]) -> None:
        outcomes: list[object] = [StoreUnavailable("its thread has died")] * len(batch)
        try:
            db.execute("BEGIN IMMEDIATE" if self._writes else "BEGIN")
            done = [_outcome(db, verb) for verb, _ in batch]
            db.execute("COMMIT")
            outcomes = done
        except sqlite3.Error as error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            outcomes = [StoreUnavailable(str(error))] * len(batch)
        finally:
            _settle(batch, outcomes)


def _settle(batch: list[Item], outcomes: list[object]) -> None:
    for (_, future), outcome in zip(batch, outcomes, strict=True):
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


def _outcome(db: sqlite3.Connection, verb: Verb) -> object:
    """What the verb returned or raised; a verb that raised has changed nothing."""
    db.execute("SAVEPOINT verb")
    try:
        result = verb(db)
    except Exception as error:
        db.execute("ROLLBACK TO verb")
        result = StoreUnavailable(str(error)) if isinstance(error, sqlite3.Error) else error
    db.execute("RELEASE verb")
    return result


def _locked(folder: Path) -> IO[str]:
    """The folder's lock, held until it is closed. Raises: DataFolderInUse, DataFolderUnusable."""
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
    """Make the file and its tables if need be; a server makes every run found an orphan."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=10)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(_SCHEMA)
        _add_columns(db)
        if serving:
            db.execute("UPDATE runs SET lease = 0")
            db.execute("UPDATE outbox SET due = 0")


def _add_columns(db: sqlite3.Connection) -> None:
    db.execute("BEGIN IMMEDIATE")  # another process may be adding them too
    for table, columns in _ADDED_COLUMNS.items():
        present = {row[1] for row in db.execute(f"PRAGMA table_info({table})")}
        for name in columns.keys() - present:
            db.execute(f"ALTER TABLE {table} ADD COLUMN {name} {columns[name]}")
    db.execute("COMMIT")


class Database:
    """The connection threads and the folder's lock; verbs are methods decorated with `reading` or `writing`.

    Args:
        path: the database file; its folder exists.
        lease: seconds that a run's lease lasts.
        serving: take the folder's lock and make every run found an orphan; false for the CLI beside a server.

    Raises:
        DataFolderInUse: another server serves from this folder.
        StoreUnavailable: the file can't be opened, or is no database.
    """

    def __init__(self, path: Path, *, lease: float, clock: Clock, serving: bool) -> None:
        self.lease = lease
        self.clock = clock
        self._lock = _locked(path.parent) if serving else None
        try:
            _prepare(path, serving=serving)
        except sqlite3.Error as error:
            if self._lock:
                self._lock.close()
            raise StoreUnavailable(f"{path}: {error}") from error
        self.writer = _Worker(path, writes=True)
        self.reader = _Worker(path, writes=False)

    async def ready(self) -> bool:
        try:
            for worker in (self.reader, self.writer):
                await worker.run(lambda db: db.execute("SELECT 1").fetchone())
        except StoreUnavailable:
            return False
        return True

    async def close(self) -> None:
        await asyncio.to_thread(self._stop)

    def _stop(self) -> None:
        self.reader.stop()
        self.writer.stop()
        if self._lock:
            self._lock.close()


def reading(
    verb: Callable[Concatenate[S, sqlite3.Connection, P], R],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """A verb that only reads, run in the reader thread."""

    async def method(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await self.reader.run(lambda db: verb(self, db, *args, **kwargs))

    functools.update_wrapper(method, verb)
    return method


def writing(
    verb: Callable[Concatenate[S, sqlite3.Connection, P], R],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """A verb that writes, run in the writer thread and answered after the commit."""

    async def method(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await self.writer.run(lambda db: verb(self, db, *args, **kwargs))

    functools.update_wrapper(method, verb)
    return method
