"""Import and export of whole threads on SQLite."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

import msgspec

from agent_chat.stores.models import Message, Principal, Thread
from agent_chat.stores.sqlite.database import SQLiteBase, runs_in_reader, runs_in_writer
from agent_chat.stores.sqlite.rows import build_thread
from agent_chat.stores.sqlite.storage import add_bytes, thread_bytes
from agent_chat.stores.sqlite.threads import insert_thread

_INSERT = "INSERT INTO messages (id, thread_id, created_at, message) VALUES (?, ?, ?, CAST(? AS TEXT))"


class SQLiteTransfer(SQLiteBase):
    """Whole threads in SQLite."""

    @runs_in_writer
    def import_thread(
        self, db: sqlite3.Connection, principal: Principal, thread: Thread, messages: Iterable[Message]
    ) -> bool:
        if _is_being_deleted(db, thread.id):
            return False
        rows = ((each.id, each.thread_id, each.created_at, msgspec.json.encode(each)) for each in messages)
        db.execute("SAVEPOINT import")
        try:
            insert_thread(db, principal, thread, None, self.clock().timestamp())
            db.executemany(
                "INSERT INTO messages (id, thread_id, created_at, message) VALUES (?, ?, ?, CAST(? AS TEXT))", rows
            )
            db.execute(
                "UPDATE threads SET last_activity_at = COALESCE((SELECT created_at FROM messages"
                " WHERE thread_id = ?1 ORDER BY seq DESC LIMIT 1), created_at) WHERE id = ?1",
                (thread.id,),
            )
            add_bytes(db, principal.organization_id, thread_bytes(db, thread.id))
        except sqlite3.IntegrityError:
            db.execute("ROLLBACK TO import")
            return False
        finally:
            db.execute("RELEASE import")
        return True

    @runs_in_reader
    def scan_threads(
        self,
        db: sqlite3.Connection,
        principal: Principal,
        *,
        user_id: str | None,
        agent_id: str | None,
        after: str | None,
        limit: int,
    ) -> list[Thread]:
        rows = db.execute(
            "SELECT * FROM threads WHERE organization_id = ?1 AND id > ?2"
            " AND (?3 IS NULL OR user_id = ?3) AND (?4 IS NULL OR agent_id = ?4) ORDER BY id LIMIT ?5",
            (principal.organization_id, after or "", user_id, agent_id, limit),
        )
        return [build_thread(row) for row in rows]


def _is_being_deleted(db: sqlite3.Connection, thread_id: str) -> bool:
    """Whether a thread of this id was deleted, and its deletion is not published or its blobs are not deleted yet."""
    query = "SELECT 1 FROM outbox WHERE thread_id = ?1 UNION ALL SELECT 1 FROM removals WHERE id = ?1"
    return db.execute(query, (thread_id,)).fetchone() is not None
