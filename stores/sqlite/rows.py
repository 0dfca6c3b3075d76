"""Rows of the embedded store as structs, and the reads that several contracts' operations share.

Messages are rows with the whole message as JSON, ordered by `seq`. The message of a run in progress is read from the
run's record, which checkpoints write.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from datetime import datetime

import msgspec
from msgspec.structs import replace

from agent_chat.stores.errors import MessageNotFound, ThreadNotFound
from agent_chat.stores.fitting import select_fitting
from agent_chat.stores.models import Message, Principal, RunRecord, Thread, timestamp
from agent_chat.stores.rules import next_timestamp

NEWEST = 2**62
"""A `seq` after all messages."""

_JOINED = """
FROM messages m JOIN threads t ON t.id = m.thread_id LEFT JOIN runs r ON r.id = m.id AND r.id = t.running
"""
_MESSAGES = f"SELECT m.seq, CAST(COALESCE(r.partial, m.message) AS BLOB) AS message {_JOINED}"
_SIZES = f"SELECT m.seq, COALESCE(r.size, m.size) AS size, r.id IS NOT NULL AS running {_JOINED}"


def decode_message(text: bytes | str) -> Message:
    """Decode a stored message."""
    return msgspec.json.decode(text, type=Message)


def build_thread(row: sqlite3.Row, messages: list[Message] | None = None) -> Thread:
    """Build a thread from its row."""
    thread = Thread(
        id=row["id"],
        agent_id=row["agent_id"],
        user_id=row["user_id"],
        organization_id=row["organization_id"],
        title=row["title"],
        metadata=msgspec.json.decode(row["metadata"]),
        created_at=row["created_at"],
        updated_at=row["updated_at"],
        archived=bool(row["archived"]),
        messages=messages or [],
    )
    return thread if row["external_id"] is None else thread.with_external_id(row["external_id"])


def build_record(row: sqlite3.Row) -> RunRecord:
    """Build a run's record from its row."""
    return RunRecord(
        id=row["id"],
        thread_id=row["thread_id"],
        organization_id=row["organization_id"],
        user_id=row["user_id"],
        worker=row["worker"],
        partial=decode_message(row["partial"]),
        cancelled=bool(row["cancelled"]),
    )


def thread_row(db: sqlite3.Connection, principal: Principal, thread_id: str) -> sqlite3.Row:
    """Raises: ThreadNotFound."""
    row: sqlite3.Row | None = db.execute(
        "SELECT * FROM threads WHERE id = ? AND organization_id = ?", (thread_id, principal.organization_id)
    ).fetchone()
    if row is None:
        raise ThreadNotFound(thread_id)
    return row


def touch(db: sqlite3.Connection, row: sqlite3.Row, now: datetime, active_at: str | None = None) -> None:
    """Move the thread's `updated_at` on, and `last_activity_at` if this write is an activity.

    Args:
        row: the thread before this write.
        active_at: the time of the message or of the answer that is written; None for any other write.
    """
    stamp = next_timestamp(timestamp(now), row["updated_at"])
    db.execute(
        "UPDATE threads SET updated_at = ?, last_activity_at = MAX(last_activity_at, ?) WHERE id = ?",
        (stamp, active_at or "", row["id"]),
    )


def message_sizes(db: sqlite3.Connection, thread_id: str, limit: int, before: int = NEWEST) -> list[sqlite3.Row]:
    """`seq`, `size` and `running` of the latest messages before the `seq` `before`, latest first."""
    query = f"{_SIZES} WHERE m.thread_id = ? AND m.seq < ? ORDER BY m.seq DESC LIMIT ?"
    return db.execute(query, (thread_id, before, limit)).fetchall()


def read_messages(db: sqlite3.Connection, rows: Iterable[sqlite3.Row]) -> list[Message]:
    """The messages whose `seq` is in `rows`, oldest first."""
    query = f"{_MESSAGES} WHERE m.seq = ?"
    return [
        decode_message(db.execute(query, (seq,)).fetchone()["message"]) for seq in sorted(row["seq"] for row in rows)
    ]


def latest_messages(db: sqlite3.Connection, thread_id: str, limit: int, max_bytes: int) -> tuple[list[Message], bool]:
    """The latest messages that fit and a running one, oldest first, and whether any was left out for its size."""
    rows = message_sizes(db, thread_id, limit)
    running = next((index for index, row in enumerate(rows) if row["running"]), None)
    chosen = select_fitting([row["size"] for row in rows], max_bytes, running)
    return read_messages(db, (rows[index] for index in chosen)), len(chosen) < len(rows)


def read_message(db: sqlite3.Connection, thread_id: str, message_id: str) -> Message:
    """Raises: MessageNotFound."""
    row = db.execute(f"{_MESSAGES} WHERE m.id = ? AND m.thread_id = ?", (message_id, thread_id)).fetchone()
    if row is None:
        raise MessageNotFound(message_id)
    return decode_message(row["message"])


def message_seq(db: sqlite3.Connection, thread_id: str, message_id: str) -> int:
    """Raises: MessageNotFound."""
    row = db.execute("SELECT seq FROM messages WHERE id = ? AND thread_id = ?", (message_id, thread_id)).fetchone()
    if row is None:
        raise MessageNotFound(message_id)
    return int(row[0])


def insert_message(db: sqlite3.Connection, message: Message) -> Message:
    """Append the message to its thread, its time moved past the last message's; the message as stored."""
    last = db.execute(
        "SELECT created_at FROM messages WHERE thread_id = ? ORDER BY seq DESC LIMIT 1", (message.thread_id,)
    ).fetchone()
    message = replace(message, created_at=next_timestamp(message.created_at, last[0] if last else None))
    db.execute(
        "INSERT INTO messages (id, thread_id, created_at, message) VALUES (?, ?, ?, CAST(? AS TEXT))",
        (message.id, message.thread_id, message.created_at, msgspec.json.encode(message)),
    )
    return message
