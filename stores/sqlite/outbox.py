"""The outbox of the ThreadStore contract on SQLite: rows that name facts, written in the transactions that store them.

The embedded log loses no event while its process lives, and a restart ends every reader. So here the outbox only serves
consumers other than the log; its contract is the same for every store.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Sequence

import msgspec

from agent_chat.stores.contracts import OUTBOX_BYTES_READ, OUTBOX_FACTS, OUTBOX_FACTS_READ, OUTBOX_LEASE, Outbox
from agent_chat.stores.errors import NotFound
from agent_chat.stores.events import Fact, MessageCreated, ThreadDeleted, ThreadUpdated, encode, fact_id
from agent_chat.stores.models import Principal
from agent_chat.stores.sqlite.database import NOW, SQLiteBase, runs_in_writer
from agent_chat.stores.sqlite.rows import build_thread, read_message, thread_row

logger = logging.getLogger(__name__)

_THREADS = 50
"""How many threads' outboxes are taken at once."""


def add_fact(db: sqlite3.Connection, principal: Principal, thread_id: str, fact: Fact, lease: float) -> None:
    """Put a fact into its thread's outbox. Other processes may publish it after a part of a `lease` of that length."""
    if isinstance(fact, ThreadDeleted):
        db.execute("DELETE FROM outbox WHERE thread_id = ?", (thread_id,))
    elif isinstance(fact, ThreadUpdated):
        db.execute("DELETE FROM outbox WHERE thread_id = ? AND type = 'thread.updated' AND cut = 0", (thread_id,))
    db.execute(
        f"INSERT INTO outbox (thread_id, organization_id, id, type, due) VALUES (?, ?, ?, ?, {NOW} + ?)",
        (thread_id, principal.organization_id, fact_id(fact), fact.__struct_config__.tag, lease * OUTBOX_LEASE),
    )
    oldest = "SELECT seq FROM outbox WHERE thread_id = ?1 ORDER BY seq DESC LIMIT 1 OFFSET ?2"
    if db.execute(oldest, (thread_id, OUTBOX_FACTS)).fetchone():
        db.execute(f"UPDATE outbox SET cut = 1 WHERE seq = ({oldest})", (thread_id, OUTBOX_FACTS - 1))
        db.execute(f"DELETE FROM outbox WHERE thread_id = ?1 AND seq <= ({oldest})", (thread_id, OUTBOX_FACTS))


def has_fact(db: sqlite3.Connection, thread_id: str, id: str) -> bool:
    """Whether the thread's outbox has this fact."""
    return db.execute("SELECT 1 FROM outbox WHERE thread_id = ? AND id = ?", (thread_id, id)).fetchone() is not None


class SQLiteOutbox(SQLiteBase):
    """The outboxes of threads in SQLite."""

    @runs_in_writer
    def take_outboxes(self, db: sqlite3.Connection, thread_id: str | None = None) -> list[Outbox]:
        if thread_id is None:
            query = f"SELECT thread_id, organization_id FROM outbox WHERE due <= {NOW} GROUP BY thread_id LIMIT ?"
            rows = db.execute(query, (_THREADS,)).fetchall()
        else:
            query = "SELECT thread_id, organization_id FROM outbox WHERE thread_id = ? LIMIT 1"
            rows = db.execute(query, (thread_id,)).fetchall()
        return [self._take(db, row["thread_id"], row["organization_id"]) for row in rows]

    @runs_in_writer
    def mark_published(
        self, db: sqlite3.Connection, principal: Principal, thread_id: str, facts: Sequence[Fact]
    ) -> None:
        db.executemany(
            "DELETE FROM outbox WHERE thread_id = ?1 AND organization_id = ?2 AND type = ?3"
            " AND (id = ?4 OR type = 'thread.updated' AND id < ?4)",  # an update replaces the earlier ones
            [(thread_id, principal.organization_id, fact.__struct_config__.tag, fact_id(fact)) for fact in facts],
        )

    def _take(self, db: sqlite3.Connection, thread_id: str, organization_id: str) -> Outbox:
        """Take over the thread's outbox until a part of a lease has passed."""
        until = self.lease * OUTBOX_LEASE
        db.execute(f"UPDATE outbox SET due = {NOW} + ? WHERE thread_id = ?", (until, thread_id))
        entries = db.execute(
            "SELECT * FROM outbox WHERE thread_id = ? ORDER BY seq LIMIT ?", (thread_id, OUTBOX_FACTS_READ)
        ).fetchall()
        return Outbox(thread_id, organization_id, _read_facts(db, entries), cut=bool(entries[0]["cut"]))


def _read_facts(db: sqlite3.Connection, entries: Sequence[sqlite3.Row]) -> list[Fact]:
    """The facts that the entries name, up to OUTBOX_BYTES_READ. Entries whose fact cannot be read are deleted."""
    facts: list[Fact] = []
    size = 0
    for entry in entries:
        try:
            fact = _read_fact(db, entry)
        except (NotFound, msgspec.DecodeError) as error:
            if not isinstance(error, NotFound):
                logger.error("Fact %s of thread %s is not published: %s", entry["id"], entry["thread_id"], error)
            db.execute("DELETE FROM outbox WHERE seq = ?", (entry["seq"],))
            continue
        size += len(encode(fact))
        if facts and size > OUTBOX_BYTES_READ:
            break
        facts.append(fact)
    return facts


def _read_fact(db: sqlite3.Connection, entry: sqlite3.Row) -> Fact:
    """Raises: NotFound, msgspec.DecodeError."""
    thread_id = entry["thread_id"]
    match entry["type"]:
        case "message.created":
            return MessageCreated(read_message(db, thread_id, entry["id"]))
        case "thread.updated":
            return ThreadUpdated(build_thread(thread_row(db, Principal(entry["organization_id"], ""), thread_id)))
        case _:
            return ThreadDeleted(thread_id)
