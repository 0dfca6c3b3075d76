"""The threads of the embedded store: one that writes, some that read, each with its own connection.

An operation runs as a whole in one thread, so that nothing interleaves inside a transaction. The writer runs queued
operations in one transaction for up to 10 ms, each in its own savepoint, and reports their results after the commit.
Readers share one queue, so that a read of several megabytes does not delay the others; in WAL mode readers and the
writer do not wait for each other. Both queues are fair to organizations (`fair_queue.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from agent_chat.stores.charging import CHARGE, ORGANIZATION_ID
from agent_chat.stores.errors import StoreDamaged, StoreFull, StoreUnavailable
from agent_chat.stores.sqlite.fair_queue import FairQueue

R = TypeVar("R")

Operation = Callable[[sqlite3.Connection], object]
Item = tuple["_Timed", Future[object]]

_BATCH = 64
_BATCH_SECONDS = 0.01
_LONGEST_WAIT_SECONDS = 1.0
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

logger = logging.getLogger(__name__)


class Worker:
    """Threads that run operations in the order in which they are queued, those that write in shared transactions.

    Attributes:
        failing: the last transaction failed: the database is locked, or its disk is full or broken. An operation that
            raises for its own reasons (the chat thread is busy) does not count.
        reopened: how often a thread had to open the database again.
        failed_operations: how many operations have failed with StoreUnavailable.
        damaged: SQLite has found the file to be damaged; stays True until a restart.
    """

    def __init__(self, path: Path, *, writes: bool, threads: int = 1) -> None:
        self.failing = False
        self.reopened = 0
        self.failed_operations = 0
        self.damaged = False
        self._path = path
        self._writes = writes
        self._queue: FairQueue[Item] = FairQueue(threads)
        self._alive = threads
        self._lock = threading.Lock()
        kind = "write" if writes else "read"
        self._threads = [
            threading.Thread(target=self._work, name=f"sqlite-{kind}-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    async def run(self, operation: Callable[[sqlite3.Connection], R]) -> R:
        """Run the operation in one of the threads. Raises: StoreUnavailable, and what the operation raises."""
        future: Future[R] = Future()
        timed = _Timed(operation)
        self._queue.put(ORGANIZATION_ID.get(), (timed, future))  # type: ignore[arg-type]
        if not self._alive:
            self._refuse()
        try:
            return await asyncio.wrap_future(future)
        finally:
            if (charge := CHARGE.get()) is not None:
                charge(timed.seconds)

    def stop(self) -> None:
        """Run what is queued, then end the threads; later operations fail with StoreUnavailable."""
        for _ in self._threads:
            self._queue.end()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        wait = 0.0
        try:
            while True:
                try:
                    return self._serve()
                except BaseException:
                    name = threading.current_thread().name
                    logger.exception("Thread %s failed; it opens the database again", name)
                self.reopened += 1
                if self._refuse():
                    return
                time.sleep(wait)
                wait = min(wait + 0.1, _LONGEST_WAIT_SECONDS)
        finally:
            with self._lock:
                self._alive -= 1  # before `_refuse`: an operation that is queued later must fail by itself, in `run`
            if not self._alive:
                self._refuse()

    def _serve(self) -> None:
        """Run operations until the thread shall end."""
        with contextlib.closing(sqlite3.connect(self._path, isolation_level=None, timeout=10)) as db:
            db.row_factory = sqlite3.Row
            db.execute("PRAGMA foreign_keys = ON")
            db.execute("PRAGMA synchronous = FULL")
            while (first := self._queue.get()) is not None:
                taken = [first]
                try:
                    self._run_batch(db, taken)
                finally:
                    for key, _ in taken:
                        self._queue.done(key)

    def _refuse(self) -> bool:
        """Fail all queued operations without running them. True if this thread shall end."""
        items, ends = self._queue.drain()
        for _, future in items:
            if future.set_running_or_notify_cancel():
                future.set_exception(StoreUnavailable("the database's thread has ended or failed"))
        return ends

    def _run_batch(self, db: sqlite3.Connection, taken: list[tuple[str, Item]]) -> None:
        """Run the operation that was taken and, if this thread writes, others that are queued; skip cancelled ones."""
        batch = [item for _, item in taken if item[1].set_running_or_notify_cancel()]
        if not batch:
            return
        results: list[object] = []
        outcomes: list[object] | None = None
        began = time.monotonic()
        try:
            db.execute("BEGIN IMMEDIATE" if self._writes else "BEGIN")
            while len(results) < len(batch):
                results.append(_run_in_savepoint(db, batch[-1][0]))
                if item := self._next_of_batch(taken, began):
                    batch.append(item)
            ran = time.monotonic()
            db.execute("COMMIT")
            _share_commit(batch, time.monotonic() - ran)
            outcomes = results
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):  # SQLite itself rolls back when the disk is full
                if db.in_transaction:
                    db.execute("ROLLBACK")
            outcomes = [unavailable(error)] * len(batch)
        finally:
            outcomes = outcomes or [StoreUnavailable("the database's thread has died")] * len(batch)
            self._count_failures(outcomes)
            _settle(batch, outcomes)

    def _next_of_batch(self, taken: list[tuple[str, Item]], began: float) -> Item | None:
        """Take the next operation, unless the transaction is large or has taken long; its commit is waited for."""
        while self._writes and len(taken) < _BATCH and time.monotonic() - began < _BATCH_SECONDS:
            if (entry := self._queue.get_more()) is None:
                return None
            taken.append(entry)
            if entry[1][1].set_running_or_notify_cancel():
                return entry[1]
        return None

    def _count_failures(self, outcomes: list[object]) -> None:
        failures = [outcome for outcome in outcomes if isinstance(outcome, StoreUnavailable)]
        self.failing = bool(failures)
        with self._lock:
            self.failed_operations += len(failures)
        if not self.damaged and any(isinstance(failure, StoreDamaged) for failure in failures):
            self.damaged = True
            logger.error("The database %s is damaged: restore it from a backup and restart", self._path)


class _Timed:
    """An operation, and the seconds for which it occupied the thread, its part of the commit included."""

    def __init__(self, operation: Operation) -> None:
        self.seconds = 0.0
        self._operation = operation

    def __call__(self, db: sqlite3.Connection) -> object:
        began = time.monotonic()
        try:
            return self._operation(db)
        finally:
            self.seconds = time.monotonic() - began


def _share_commit(batch: list[Item], seconds: float) -> None:
    """Add the time of the commit to the operations, in proportion to the time that each took."""
    total = sum(operation.seconds for operation, _ in batch)
    for operation, _ in batch:
        operation.seconds += seconds * (operation.seconds / total if total else 1 / len(batch))


def unavailable(error: sqlite3.Error) -> StoreUnavailable:
    """Translate SQLite's error."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest is the extended code
    if code in _DAMAGED:
        return StoreDamaged(str(error))
    return StoreFull(str(error)) if code == sqlite3.SQLITE_FULL else StoreUnavailable(str(error))


def _settle(batch: list[Item], outcomes: list[object]) -> None:
    for (_, future), outcome in zip(batch, outcomes, strict=True):
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


def _run_in_savepoint(db: sqlite3.Connection, operation: Operation) -> object:
    """The operation's result or its exception; an operation that raised has changed nothing."""
    db.execute("SAVEPOINT operation")
    try:
        result = operation(db)
    except Exception as error:
        if not db.in_transaction:  # a full disk has rolled back the whole transaction with all its operations
            raise
        db.execute("ROLLBACK TO operation")
        result = unavailable(error) if isinstance(error, sqlite3.Error) else error
    db.execute("RELEASE operation")
    return result
