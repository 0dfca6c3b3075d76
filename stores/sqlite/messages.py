"""The messages of the ThreadStore contract on SQLite, and what Idempotency-Keys have stored in a thread."""

from __future__ import annotations

import sqlite3

from agent_chat.stores import rules
from agent_chat.stores.contracts import MessagePage, Posted
from agent_chat.stores.events import MessageCreated
from agent_chat.stores.fitting import READ_BYTES, select_fitting
from agent_chat.stores.models import Idempotency, Message, Principal
from agent_chat.stores.rules import KEY_SECONDS, UsedKey
from agent_chat.stores.sqlite.database import SQLiteBase, runs_in_reader, runs_in_writer
from agent_chat.stores.sqlite.outbox import add_fact, has_fact
from agent_chat.stores.sqlite.rows import (
    NEWEST,
    insert_message,
    message_seq,
    message_sizes,
    read_message,
    read_messages,
    thread_row,
    touch,
)


class SQLiteMessages(SQLiteBase):
    """Messages and idempotency keys in SQLite."""

    @runs_in_reader
    def list_messages(
        self,
        db: sqlite3.Connection,
        principal: Principal,
        thread_id: str,
        *,
        before: str | None,
        limit: int,
        max_bytes: int = READ_BYTES,
    ) -> MessagePage:
        thread_row(db, principal, thread_id)
        rows = message_sizes(db, thread_id, limit, NEWEST if before is None else message_seq(db, thread_id, before))
        chosen = select_fitting([row["size"] for row in rows], max_bytes)
        return MessagePage(read_messages(db, rows[: len(chosen)]), cut=len(chosen) < len(rows))

    @runs_in_reader
    def get_message(self, db: sqlite3.Connection, principal: Principal, thread_id: str, message_id: str) -> Message:
        thread_row(db, principal, thread_id)
        return read_message(db, thread_id, message_id)

    @runs_in_writer
    def append_message(
        self, db: sqlite3.Connection, principal: Principal, message: Message, idempotency: Idempotency | None = None
    ) -> Posted:
        thread_id = message.thread_id
        row = thread_row(db, principal, thread_id)
        key = self._used_key(db, principal, thread_id, idempotency)
        decision = rules.decide_post(
            thread_id, key, archived=bool(row["archived"]), running=row["running"], starts_run=False
        )
        if key is not None and decision == "replay":
            return replayed(db, thread_id, key)
        stored = insert_message(db, message)
        touch(db, row, self.clock(), stored.created_at)
        add_fact(db, principal, thread_id, MessageCreated(stored), self.lease)
        posted = Posted(stored, None, replayed=False)
        self._store_key(db, principal, posted, idempotency)
        return posted

    @runs_in_reader
    def replay(
        self, db: sqlite3.Connection, principal: Principal, thread_id: str, idempotency: Idempotency
    ) -> Posted | None:
        thread_row(db, principal, thread_id)
        key = self._used_key(db, principal, thread_id, idempotency)
        return replayed(db, thread_id, key) if key is not None and not key.free else None

    def _used_key(
        self, db: sqlite3.Connection, principal: Principal, thread_id: str, idempotency: Idempotency | None
    ) -> UsedKey | None:
        """What the key stored in this thread before, if it still counts. Raises: IdempotencyMismatch."""
        if idempotency is None:
            return None
        row = db.execute(
            "SELECT * FROM idempotency WHERE thread_id = ? AND user_id = ? AND key = ?",
            (thread_id, principal.user_id, idempotency.key),
        ).fetchone()
        if row is None or not rules.key_counts(idempotency, row["fingerprint"], row["at"], self.clock().timestamp()):
            return None
        return UsedKey(row["fingerprint"], row["message_id"], row["run_id"], row["at"], free=bool(row["free"]))

    def _store_key(
        self, db: sqlite3.Connection, principal: Principal, posted: Posted, idempotency: Idempotency | None
    ) -> None:
        """Store what the key has stored, and delete the thread's keys that count no more."""
        if idempotency is None:
            return
        now = self.clock().timestamp()
        thread_id = posted.message.thread_id
        db.execute("DELETE FROM idempotency WHERE thread_id = ? AND at <= ?", (thread_id, now - KEY_SECONDS))
        db.execute(
            "INSERT OR REPLACE INTO idempotency VALUES (?, ?, ?, ?, ?, ?, ?, 0)",
            (
                thread_id,
                principal.user_id,
                idempotency.key,
                idempotency.fingerprint,
                posted.message.id,
                posted.run_id,
                now,
            ),
        )


def replayed(db: sqlite3.Connection, thread_id: str, key: UsedKey) -> Posted:
    """What the key stored before, as it is stored now."""
    answer = read_message(db, thread_id, key.run_id) if key.run_id else None
    unpublished = answer is None and has_fact(db, thread_id, key.message_id)
    return Posted(read_message(db, thread_id, key.message_id), answer, replayed=True, unpublished=unpublished)
