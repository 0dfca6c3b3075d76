"""The threads of the embedded store: one that writes, some that read, each with a connection of its own.

A verb runs whole in one thread, so that nothing interleaves inside a transaction. The writer commits what has queued
up together, each verb in a savepoint of its own, and answers after the commit. Readers share one queue: a read of
megabytes holds up nobody else's, and in WAL mode readers and the writer do not wait for each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from agent_chat.stores.errors import StoreDamaged, StoreFull, StoreUnavailable

R = TypeVar("R")

Verb = Callable[[sqlite3.Connection], object]
Item = tuple[Verb, Future[object]]

_BATCH = 64
_LONGEST_WAIT_SECONDS = 1.0
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

logger = logging.getLogger(__name__)


class Worker:
    """Threads that run verbs in the order they come, writing ones in shared transactions.

    Attributes:
        failing: the last transaction failed: the database is locked, its disk is full or broken. A verb that is
            refused for its own reasons (a busy thread) is no failure.
        failures: how often a thread had to open the database again.
        failed_verbs: how many verbs have failed with StoreUnavailable.
        damaged: SQLite has found the file damaged; stays true until a restart.
    """

    def __init__(self, path: Path, *, writes: bool, threads: int = 1) -> None:
        self.failing = False
        self.failures = 0
        self.failed_verbs = 0
        self.damaged = False
        self._path = path
        self._writes = writes
        self._queue: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._alive = threads
        self._lock = threading.Lock()
        kind = "write" if writes else "read"
        self._threads = [
            threading.Thread(target=self._work, name=f"sqlite-{kind}-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    async def run(self, verb: Callable[[sqlite3.Connection], R]) -> R:
        """Raises: StoreUnavailable, and whatever the verb does."""
        future: Future[R] = Future()
        self._queue.put((verb, future))  # type: ignore[arg-type]
        if not self._alive:
            self._refuse()
        return await asyncio.wrap_future(future)

    def stop(self) -> None:
        """End the threads once they have done what is queued; later verbs are refused."""
        for _ in self._threads:
            self._queue.put(None)
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
                    logger.exception("the thread %s failed; it opens the database again", name)
                self.failures += 1
                if self._refuse():
                    return
                time.sleep(wait)
                wait = min(wait + 0.1, _LONGEST_WAIT_SECONDS)
        finally:
            with self._lock:
                self._alive -= 1  # before `_refuse`: whoever queues a verb after that refuses it
            if not self._alive:
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
        """Fail what is queued: it is not run. True if this thread is to end."""
        stops = 0
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._queue.get_nowait()
                stops += item is None
                if item and item[1].set_running_or_notify_cancel():
                    item[1].set_exception(StoreUnavailable("its thread has ended or failed"))
        for _ in range(stops - 1):  # the other threads'
            self._queue.put(None)
        return stops > 0

    def _run_batch(self, db: sqlite3.Connection, batch: list[Item]) -> None:
        outcomes: list[object] = [StoreUnavailable("its thread has died")] * len(batch)
        try:
            db.execute("BEGIN IMMEDIATE" if self._writes else "BEGIN")
            done = [_outcome(db, verb) for verb, _ in batch]
            db.execute("COMMIT")
            outcomes = done
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):  # a full disk or an I/O error has rolled back by itself
                if db.in_transaction:
                    db.execute("ROLLBACK")
            outcomes = [unavailable(error)] * len(batch)
        finally:
            self._judge(outcomes)
            _settle(batch, outcomes)

    def _judge(self, outcomes: list[object]) -> None:
        failures = [outcome for outcome in outcomes if isinstance(outcome, StoreUnavailable)]
        self.failing = bool(failures)
        with self._lock:
            self.failed_verbs += len(failures)
        if not self.damaged and any(isinstance(failure, StoreDamaged) for failure in failures):
            self.damaged = True
            logger.error("The database %s is damaged: restore it from a backup and restart", self._path)


def unavailable(error: sqlite3.Error) -> StoreUnavailable:
    """Our error for SQLite's."""
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


def _outcome(db: sqlite3.Connection, verb: Verb) -> object:
    """What the verb returned or raised; a verb that raised has changed nothing."""
    db.execute("SAVEPOINT verb")
    try:
        result = verb(db)
    except Exception as error:
        if not db.in_transaction:  # a full disk has rolled back the whole transaction, all its verbs
            raise
        db.execute("ROLLBACK TO verb")
        result = unavailable(error) if isinstance(error, sqlite3.Error) else error
    db.execute("RELEASE verb")
    return result
