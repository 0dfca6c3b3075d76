"""The base of the embedded store: its file, its lock, and the decorators that run an operation in the right thread.

An operation is a function that gets the connection. `sqlite/worker.py` runs it as a whole in one thread and returns its
result after the commit, so an acknowledged write is on the disk. aiosqlite was refused: it takes four times the CPU,
and its coroutines interleave inside a transaction.

`migrations` beside this module has the tables. `threads`, `messages`, `files`, `runs`, `outbox`, `directory` and
`storage` contain the operations, one contract or a part of one each; `store` puts them together.
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

from agent_chat.stores.errors import DataFolderInUse, DataFolderUnusable, SchemaTooNew, StoreDamaged, StoreUnavailable
from agent_chat.stores.folder import make_private_file
from agent_chat.stores.models import Clock
from agent_chat.stores.sqlite.migrations import is_outdated, migrate
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
MIGRATION_SECONDS = 10.0
"""How long the command line waits for a server that is migrating the data."""

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
    """Check the file and migrate it to this code's schema; a server also ends all leases, whose holders are gone."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=10)) as db:
        outdated = is_outdated(db, path)  # before anything is written to a database of later code
        db.execute("PRAGMA journal_mode = WAL")
        if serving:
            _check(db, path)
        if outdated:
            with contextlib.nullcontext() if serving else _lock_to_migrate(db, path):
                migrate(db, path)
        if serving:
            db.execute("UPDATE runs SET lease = 0")
            db.execute("UPDATE outbox SET due = 0")
            db.execute("UPDATE removals SET due = 0")


def _lock_to_migrate(db: sqlite3.Connection, path: Path) -> contextlib.AbstractContextManager[object]:
    """Take the folder's lock, unless another process that has it migrates the data meanwhile.

    Raises: DataFolderInUse if a server of an earlier version is using the folder.
    """
    deadline = time.monotonic() + MIGRATION_SECONDS
    while is_outdated(db, path):
        try:
            return _lock_folder(path.parent)
        except DataFolderInUse:
            if time.monotonic() > deadline:
                raise DataFolderInUse(str(path.parent), "it is of an earlier version: restart it first") from None
            time.sleep(0.05)
    return contextlib.nullcontext()


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
        SchemaTooNew: a later version of the server wrote the data.
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
        except (sqlite3.Error, DataFolderInUse, DataFolderUnusable, SchemaTooNew, StoreDamaged) as error:
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
