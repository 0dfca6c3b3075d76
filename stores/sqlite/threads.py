"""The threads of the ThreadStore contract on SQLite; messages, files, runs and the outbox have modules of their own."""

from __future__ import annotations

import sqlite3

import msgspec

from agent_chat.stores import rules
from agent_chat.stores.contracts import Created, ThreadPage, ThreadPart
from agent_chat.stores.events import ThreadDeleted, ThreadUpdated
from agent_chat.stores.fitting import READ_BYTES, count_fitting
from agent_chat.stores.models import Idempotency, Principal, Thread
from agent_chat.stores.sqlite.database import SQLiteBase, runs_in_reader, runs_in_writer
from agent_chat.stores.sqlite.listing import read_page, read_page_of_external_id
from agent_chat.stores.sqlite.outbox import add_fact
from agent_chat.stores.sqlite.rows import (
    build_thread,
    latest_messages,
    message_sizes,
    read_messages,
    thread_row,
    touch,
)
from agent_chat.stores.sqlite.storage import add_bytes, add_removal, thread_bytes


class SQLiteThreads(SQLiteBase):
    """Threads in SQLite."""

    @runs_in_writer
    def create(
        self, db: sqlite3.Connection, principal: Principal, thread: Thread, idempotency: Idempotency | None = None
    ) -> Created:
        now = self.clock().timestamp()
        outdated: sqlite3.Row | None = None
        if idempotency:
            earlier = db.execute(
                "SELECT * FROM threads WHERE organization_id = ? AND user_id = ? AND agent_id = ? AND key = ?",
                (principal.organization_id, principal.user_id, thread.agent_id, idempotency.key),
            ).fetchone()
            if earlier and rules.key_counts(idempotency, earlier["fingerprint"], earlier["key_at"], now):
                return Created(build_thread(earlier), replayed=True)
            outdated = earlier
        if thread.external_id is not None and (
            found := _row_with_external_id(db, principal, thread.agent_id, thread.external_id)
        ):
            return Created(build_thread(found), replayed=False, found=True)
        if outdated:
            db.execute("UPDATE threads SET key = NULL WHERE id = ?", (outdated["id"],))
        insert_thread(db, principal, thread, idempotency, now)
        return Created(build_thread(thread_row(db, principal, thread.id)), replayed=False)

    @runs_in_reader
    def find_thread(
        self, db: sqlite3.Connection, principal: Principal, agent_id: str, external_id: str
    ) -> Thread | None:
        row = _row_with_external_id(db, principal, agent_id, external_id)
        return build_thread(row) if row else None

    @runs_in_reader
    def get(self, db: sqlite3.Connection, principal: Principal, thread_id: str, *, message_limit: int = 50) -> Thread:
        row = thread_row(db, principal, thread_id)
        return build_thread(row, latest_messages(db, thread_id, message_limit, READ_BYTES)[0])

    @runs_in_reader
    def read(
        self,
        db: sqlite3.Connection,
        principal: Principal,
        thread_id: str,
        *,
        message_limit: int,
        max_bytes: int = READ_BYTES,
    ) -> ThreadPart:
        row = thread_row(db, principal, thread_id)
        messages, cut = latest_messages(db, thread_id, message_limit, max_bytes)
        return ThreadPart(build_thread(row, messages), cut)

    @runs_in_reader
    def list_threads(
        self,
        db: sqlite3.Connection,
        principal: Principal,
        agent_id: str,
        *,
        limit: int,
        offset: int,
        archived: bool | None,
        message_limit: int,
        max_bytes: int,
        external_id: str | None = None,
    ) -> ThreadPage:
        of = (principal.organization_id, agent_id)
        if external_id is None:
            rows = read_page(db, *of, archived, limit + 1, offset)
        else:
            rows = read_page_of_external_id(db, *of, external_id, archived, limit + 1, offset)
        shown = rows[:limit]
        sized = [message_sizes(db, row["id"], message_limit) for row in shown]
        counts = count_fitting([[each["size"] for each in of_thread] for of_thread in sized], max_bytes)
        chosen = [of_thread[:count] for of_thread, count in zip(sized, counts, strict=True)]
        return ThreadPage(
            threads=[
                build_thread(row, read_messages(db, of_thread)) for row, of_thread in zip(shown, chosen, strict=True)
            ],
            more=len(rows) > limit,
            cut=any(len(part) < len(whole) for part, whole in zip(chosen, sized, strict=True)),
        )

    @runs_in_writer
    def update(
        self,
        db: sqlite3.Connection,
        principal: Principal,
        thread_id: str,
        *,
        title: str | None = None,
        archived: bool | None = None,
    ) -> Thread:
        row = thread_row(db, principal, thread_id)
        db.execute(
            "UPDATE threads SET title = COALESCE(?, title), archived = COALESCE(?, archived) WHERE id = ?",
            (title, archived, thread_id),
        )
        touch(db, row, self.clock())
        thread = build_thread(thread_row(db, principal, thread_id))
        add_fact(db, principal, thread_id, ThreadUpdated(thread), self.lease)
        return thread

    @runs_in_writer
    def delete(self, db: sqlite3.Connection, principal: Principal, thread_id: str) -> str | None:
        row = thread_row(db, principal, thread_id)
        add_bytes(db, principal.organization_id, -thread_bytes(db, thread_id))
        if db.execute("SELECT 1 FROM attachments WHERE thread_id = ?", (thread_id,)).fetchone():
            add_removal(db, rules.removal_of_thread(principal, thread_id))
        db.execute("DELETE FROM threads WHERE id = ?", (thread_id,))
        add_fact(db, principal, thread_id, ThreadDeleted(thread_id), self.lease)
        running: str | None = row["running"]
        return running


def _row_with_external_id(
    db: sqlite3.Connection, principal: Principal, agent_id: str, external_id: str
) -> sqlite3.Row | None:
    """The thread that the external id names (I24)."""
    row: sqlite3.Row | None = db.execute(
        "SELECT * FROM threads WHERE organization_id = ? AND agent_id = ? AND external_id = ? AND user_id = ?",
        (principal.organization_id, agent_id, external_id, principal.user_id),
    ).fetchone()
    return row


def insert_thread(
    db: sqlite3.Connection, principal: Principal, thread: Thread, idempotency: Idempotency | None, now: float
) -> None:
    """Insert the row of a new thread. Raises: sqlite3.IntegrityError if its id or its external id is taken."""
    values = {
        "id": thread.id,
        "organization_id": principal.organization_id,
        "agent_id": thread.agent_id,
        "user_id": principal.user_id,
        "title": thread.title,
        "metadata": msgspec.json.encode(thread.client_metadata()).decode(),
        "created_at": thread.created_at,
        "updated_at": thread.updated_at,
        "archived": thread.archived,
        "key": idempotency.key if idempotency else None,
        "fingerprint": idempotency.fingerprint if idempotency else None,
        "key_at": now,
        "external_id": thread.external_id,
        "last_activity_at": thread.created_at,
    }
    db.execute(
        f"INSERT INTO threads ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})", tuple(values.values())
    )
