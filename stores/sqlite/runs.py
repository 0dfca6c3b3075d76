"""The runs in progress of the ThreadStore contract on SQLite: claims, checkpoints, ends, and taking over."""

from __future__ import annotations

import logging
import sqlite3

import msgspec
from msgspec.structs import replace

from agent_chat.stores import rules
from agent_chat.stores.contracts import Finished, Lease, Posted, UsageRow
from agent_chat.stores.models import Idempotency, Message, Principal, RunRecord, timestamp
from agent_chat.stores.sqlite.database import NOW, runs_in_reader, runs_in_writer
from agent_chat.stores.sqlite.messages import SQLiteMessages, replayed
from agent_chat.stores.sqlite.rows import build_record, insert_message, read_message, thread_row, touch
from agent_chat.stores.sqlite.usage import insert_usage

logger = logging.getLogger(__name__)


class SQLiteRuns(SQLiteMessages):
    """Claims, records and ends of runs in SQLite."""

    @runs_in_writer
    def claim(
        self,
        db: sqlite3.Connection,
        principal: Principal,
        question: Message,
        answer: Message,
        *,
        worker: str,
        idempotency: Idempotency | None = None,
    ) -> Posted:
        thread_id = question.thread_id
        row = thread_row(db, principal, thread_id)
        key = self._used_key(db, principal, thread_id, idempotency)
        decision = rules.decide_post(
            thread_id, key, archived=bool(row["archived"]), running=row["running"], starts_run=True
        )
        if key is not None and decision == "replay":
            return replayed(db, thread_id, key)
        if key is not None:
            question = read_message(db, thread_id, key.message_id)
            answer = answer.with_run(in_reply_to=question.id)
        else:
            question = insert_message(db, question)
        answer = insert_message(db, answer)
        db.execute("UPDATE threads SET running = ? WHERE id = ?", (answer.id, thread_id))
        touch(db, row, self.clock(), answer.created_at)
        self._insert_record(db, principal, answer, worker)
        posted = Posted(question, answer, replayed=False, again=key is not None)
        self._store_key(db, principal, posted, idempotency)
        return posted

    def _insert_record(self, db: sqlite3.Connection, principal: Principal, answer: Message, worker: str) -> None:
        db.execute(
            "INSERT INTO runs (id, thread_id, organization_id, user_id, worker, lease, partial)"
            f" VALUES (?, ?, ?, ?, ?, {NOW} + ?, CAST(? AS TEXT))",
            (
                answer.id,
                answer.thread_id,
                principal.organization_id,
                principal.user_id,
                worker,
                self.lease,
                msgspec.json.encode(answer),
            ),
        )

    @runs_in_writer
    def checkpoint(
        self, db: sqlite3.Connection, principal: Principal, run_id: str, *, worker: str, partial: Message | None
    ) -> Lease:
        if partial is not None:
            stored = db.execute("SELECT created_at FROM messages WHERE id = ?", (run_id,)).fetchone()
            partial = replace(partial, created_at=stored[0]) if stored else partial
        row = db.execute(
            f"UPDATE runs SET lease = {NOW} + ?, partial = COALESCE(CAST(? AS TEXT), partial)"
            " WHERE id = ? AND organization_id = ? AND worker = ? RETURNING cancelled",
            (self.lease, msgspec.json.encode(partial) if partial else None, run_id, principal.organization_id, worker),
        ).fetchone()
        if row is None:
            return "lost"
        return "cancelled" if row["cancelled"] else "held"

    @runs_in_writer
    def cancel(self, db: sqlite3.Connection, principal: Principal, thread_id: str, run_id: str) -> None:
        db.execute(
            "UPDATE runs SET cancelled = 1 WHERE id = ?1 AND thread_id = ?2 AND organization_id = ?3"
            " AND EXISTS (SELECT 1 FROM threads WHERE id = ?2 AND running = ?1)",
            (run_id, thread_id, principal.organization_id),
        )

    @runs_in_writer
    def finish(self, db: sqlite3.Connection, principal: Principal, message: Message) -> Finished:
        row = thread_row(db, principal, message.thread_id)
        stored = read_message(db, message.thread_id, message.id)
        if row["running"] != message.id:  # I4
            return Finished(stored, won=False)
        message = replace(message, created_at=stored.created_at)
        db.execute(
            "UPDATE messages SET message = CAST(? AS TEXT) WHERE id = ?", (msgspec.json.encode(message), message.id)
        )
        db.execute("UPDATE threads SET running = NULL WHERE id = ?", (message.thread_id,))
        now = self.clock()
        touch(db, row, now, timestamp(now))
        if rules.frees_key(message):
            db.execute(
                "UPDATE idempotency SET free = 1 WHERE thread_id = ? AND run_id = ?", (message.thread_id, message.id)
            )
        return Finished(message, won=True)

    @runs_in_writer
    def take_orphans(self, db: sqlite3.Connection, worker: str) -> list[RunRecord]:
        rows = db.execute(  # I5
            f"UPDATE runs SET worker = ?, lease = {NOW} + ? WHERE lease <= {NOW} RETURNING *", (worker, self.lease)
        ).fetchall()
        return [record for row in rows if (record := _build_record_or_log(row))]

    @runs_in_writer
    def take_orphan(self, db: sqlite3.Connection, principal: Principal, run_id: str, worker: str) -> RunRecord | None:
        row = db.execute(
            f"UPDATE runs SET worker = ?, lease = {NOW} + ?"
            f" WHERE id = ? AND organization_id = ? AND lease <= {NOW} RETURNING *",
            (worker, self.lease, run_id, principal.organization_id),
        ).fetchone()
        return build_record(row) if row else None

    @runs_in_reader
    def find_record(self, db: sqlite3.Connection, principal: Principal, run_id: str) -> RunRecord | None:
        row = db.execute(
            "SELECT * FROM runs WHERE id = ? AND organization_id = ?", (run_id, principal.organization_id)
        ).fetchone()
        return build_record(row) if row else None

    @runs_in_writer
    def delete_record(
        self, db: sqlite3.Connection, principal: Principal, run_id: str, usage: UsageRow | None = None
    ) -> None:
        if usage is not None:
            insert_usage(db, usage)
        db.execute("DELETE FROM runs WHERE id = ? AND organization_id = ?", (run_id, principal.organization_id))


def _build_record_or_log(row: sqlite3.Row) -> RunRecord | None:
    try:
        return build_record(row)
    except Exception:
        logger.exception("The record of run %s cannot be read", row["id"])
        return None
