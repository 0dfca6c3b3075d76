"""The outbox on SQLite: rows that name facts, written in the transactions that store them.

The embedded log never loses an event while its process lives, and a restart ends every reader, so here the outbox only
serves consumers other than the log; the contract is the same for every store.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Sequence

import msgspec

from agent_chat.stores.contracts import OUTBOX_BYTES_READ, OUTBOX_FACTS, OUTBOX_FACTS_READ, Outbox
from agent_chat.stores.errors import NotFound
from agent_chat.stores.events import Fact, MessageCreated, ThreadDeleted, ThreadUpdated, encode, fact_id
from agent_chat.stores.models import Message, Thread
from agent_chat.stores.sqlite.database import NOW

logger = logging.getLogger(__name__)

_THREADS = 50

ThreadOf = Callable[[str, str], Thread]
"""Reads an organization's thread, without messages. Raises: ThreadNotFound."""

MessageOf = Callable[[str, str], Message]
"""Reads a thread's message. Raises: MessageNotFound."""


def add_fact(db: sqlite3.Connection, organization_id: str, thread_id: str, fact: Fact, seconds: float) -> None:
    """Put a fact into its thread's outbox; after `seconds` it is anybody's to publish."""
    if isinstance(fact, ThreadDeleted):
        db.execute("DELETE FROM outbox WHERE thread_id = ?", (thread_id,))
    elif isinstance(fact, ThreadUpdated):
        db.execute("DELETE FROM outbox WHERE thread_id = ? AND type = 'thread.updated' AND cut = 0", (thread_id,))
    db.execute(
        f"INSERT INTO outbox (thread_id, organization_id, id, type, due) VALUES (?, ?, ?, ?, {NOW} + ?)",
        (thread_id, organization_id, fact_id(fact), fact.__struct_config__.tag, seconds),
    )
    oldest = "SELECT seq FROM outbox WHERE thread_id = ?1 ORDER BY seq DESC LIMIT 1 OFFSET ?2"
    if db.execute(oldest, (thread_id, OUTBOX_FACTS)).fetchone():
        db.execute(f"UPDATE outbox SET cut = 1 WHERE seq = ({oldest})", (thread_id, OUTBOX_FACTS - 1))
        db.execute(f"DELETE FROM outbox WHERE thread_id = ?1 AND seq <= ({oldest})", (thread_id, OUTBOX_FACTS))


def has_fact(db: sqlite3.Connection, thread_id: str, id: str) -> bool:
    return db.execute("SELECT 1 FROM outbox WHERE thread_id = ? AND id = ?", (thread_id, id)).fetchone() is not None


def remove_facts(db: sqlite3.Connection, organization_id: str, thread_id: str, facts: Sequence[Fact]) -> None:
    """Remove these; a thread.updated with it the earlier ones, which it replaces."""
    db.executemany(
        "DELETE FROM outbox WHERE thread_id = ?1 AND organization_id = ?2 AND type = ?3"
        " AND (id = ?4 OR type = 'thread.updated' AND id < ?4)",
        [(thread_id, organization_id, fact.__struct_config__.tag, fact_id(fact)) for fact in facts],
    )


def take_outboxes(
    db: sqlite3.Connection,
    thread_id: str | None,
    seconds: float,
    thread_of: ThreadOf,
    message_of: MessageOf,
) -> list[Outbox]:
    """Take over what is due, or that thread's outbox, for so many seconds."""
    if thread_id is None:
        query = f"SELECT thread_id, organization_id FROM outbox WHERE due <= {NOW} GROUP BY thread_id LIMIT ?"
        due = db.execute(query, (_THREADS,)).fetchall()
    else:
        query = "SELECT thread_id, organization_id FROM outbox WHERE thread_id = ? LIMIT 1"
        due = db.execute(query, (thread_id,)).fetchall()
    outboxes = []
    for row in due:
        thread_id = row["thread_id"]
        db.execute(f"UPDATE outbox SET due = {NOW} + ? WHERE thread_id = ?", (seconds, thread_id))
        entries = db.execute(
            "SELECT * FROM outbox WHERE thread_id = ? ORDER BY seq LIMIT ?", (thread_id, OUTBOX_FACTS_READ)
        ).fetchall()
        facts = _facts(db, entries, thread_of, message_of)
        outboxes.append(Outbox(thread_id, row["organization_id"], facts, cut=bool(entries[0]["cut"])))
    return outboxes


def _facts(
    db: sqlite3.Connection,
    entries: Sequence[sqlite3.Row],
    thread_of: ThreadOf,
    message_of: MessageOf,
) -> list[Fact]:
    """What the entries name, as much as may be read at once; entries without a readable fact are removed."""
    facts: list[Fact] = []
    size = 0
    for entry in entries:
        try:
            fact = _fact(entry, thread_of, message_of)
        except (NotFound, msgspec.DecodeError) as error:
            if not isinstance(error, NotFound):
                logger.error("fact %s of thread %s is not published: %s", entry["id"], entry["thread_id"], error)
            db.execute("DELETE FROM outbox WHERE seq = ?", (entry["seq"],))
            continue
        size += len(encode(fact))
        if facts and size > OUTBOX_BYTES_READ:
            break
        facts.append(fact)
    return facts


def _fact(entry: sqlite3.Row, thread_of: ThreadOf, message_of: MessageOf) -> Fact:
    match entry["type"]:
        case "message.created":
            return MessageCreated(message_of(entry["thread_id"], entry["id"]))
        case "thread.updated":
            return ThreadUpdated(thread_of(entry["organization_id"], entry["thread_id"]))
        case _:
            return ThreadDeleted(entry["thread_id"])
