"""The Storage contract on SQLite."""

from __future__ import annotations

import sqlite3

from agent_chat.stores.contracts.storage import (
    MEASURE_SECONDS,
    MEASURED_AT_ONCE,
    RECORD_BYTES,
    REMOVAL_SECONDS,
    REMOVALS_TAKEN,
    UPLOAD_SECONDS,
    BlobRemoval,
)
from agent_chat.stores.models import Principal
from agent_chat.stores.rules import granted_bytes, removal_of_attachment
from agent_chat.stores.sqlite.database import NOW, SQLiteBase, runs_in_reader, runs_in_writer

_MEASURE = f"""
SELECT
    (SELECT COALESCE(SUM(m.size + {RECORD_BYTES}), 0)
        FROM threads t JOIN messages m ON m.thread_id = t.id WHERE t.organization_id = ?1)
    + (SELECT COALESCE(SUM(size + {RECORD_BYTES}), 0)
        FROM threads WHERE organization_id = ?1)
    + (SELECT COALESCE(SUM(size + record_size), 0) FROM attachments WHERE organization_id = ?1)
    + (SELECT COALESCE(SUM(size), 0) FROM agents WHERE organization_id = ?1)
    + (SELECT COALESCE(SUM(size), 0) FROM removals WHERE organization_id = ?1)
"""


def add_bytes(db: sqlite3.Connection, organization_id: str, count: int) -> None:
    """Add `count` bytes, which may be negative, to what the organization has stored."""
    db.execute("INSERT OR IGNORE INTO storage (organization_id) VALUES (?)", (organization_id,))
    db.execute("UPDATE storage SET stored = MAX(0, stored + ?) WHERE organization_id = ?", (count, organization_id))


def thread_bytes(db: sqlite3.Connection, thread_id: str) -> int:
    """How many bytes deleting the thread releases."""
    (messages,) = db.execute(
        f"SELECT COALESCE(SUM(size + {RECORD_BYTES}), 0) FROM messages WHERE thread_id = ?", (thread_id,)
    ).fetchone()
    (files,) = db.execute(
        "SELECT COALESCE(SUM(size + record_size), 0) FROM attachments WHERE thread_id = ?", (thread_id,)
    ).fetchone()
    return int(messages) + int(files) + RECORD_BYTES


def add_removal(db: sqlite3.Connection, removal: BlobRemoval, seconds: float | None = None) -> None:
    """Store the removal, due after `seconds`; None: REMOVAL_SECONDS."""
    seconds = REMOVAL_SECONDS if seconds is None else seconds
    db.execute(
        f"INSERT OR REPLACE INTO removals VALUES (?, ?, ?, ?, ?, {NOW} + ?, 0)",
        (removal.id, removal.organization_id, removal.thread_id, removal.attachment_id, removal.size, seconds),
    )


def cancel_removal(db: sqlite3.Connection, removal_id: str) -> bool:
    """Delete the removal unless a sweeper has taken it; True if it does not exist now."""
    db.execute("DELETE FROM removals WHERE id = ? AND NOT taken", (removal_id,))
    return db.execute("SELECT 1 FROM removals WHERE id = ?", (removal_id,)).fetchone() is None


class SQLiteStorage(SQLiteBase):
    """Counted bytes and blobs to remove, in SQLite."""

    @runs_in_writer
    def reserve_bytes(self, db: sqlite3.Connection, organization_id: str, need: int, want: int, limit: int) -> int:
        add_bytes(db, organization_id, 0)
        (stored,) = db.execute("SELECT stored FROM storage WHERE organization_id = ?", (organization_id,)).fetchone()
        granted = granted_bytes(int(stored), need, want, limit)
        add_bytes(db, organization_id, granted)
        return granted

    @runs_in_writer
    def release_bytes(self, db: sqlite3.Connection, organization_id: str, count: int) -> None:
        add_bytes(db, organization_id, -count)

    @runs_in_reader
    def stored_bytes(self, db: sqlite3.Connection, organization_id: str) -> int:
        row = db.execute("SELECT stored FROM storage WHERE organization_id = ?", (organization_id,)).fetchone()
        return int(row[0]) if row else 0

    async def correct_bytes(self) -> None:
        for organization_id in await self._take_unmeasured():
            stored, measured = await self._measure(organization_id)
            await self._correct(organization_id, measured - stored)

    @runs_in_writer
    def _take_unmeasured(self, db: sqlite3.Connection) -> list[str]:
        """The organizations that are due to be measured; each is due again after MEASURE_SECONDS."""
        db.execute("INSERT OR IGNORE INTO storage (organization_id) SELECT id FROM organizations")
        rows = db.execute(
            f"UPDATE storage SET measure_at = {NOW} + ? WHERE organization_id IN"
            f" (SELECT organization_id FROM storage WHERE measure_at <= {NOW} LIMIT ?) RETURNING organization_id",
            (MEASURE_SECONDS, MEASURED_AT_ONCE),
        ).fetchall()
        return [str(row[0]) for row in rows]

    @runs_in_reader
    def _measure(self, db: sqlite3.Connection, organization_id: str) -> tuple[int, int]:
        """The counted number and the measured one, both from one snapshot of the database."""
        row = db.execute("SELECT stored FROM storage WHERE organization_id = ?", (organization_id,)).fetchone()
        (measured,) = db.execute(_MEASURE, (organization_id,)).fetchone()
        return int(row[0]), int(measured)

    @runs_in_writer
    def _correct(self, db: sqlite3.Connection, organization_id: str, difference: int) -> None:
        add_bytes(db, organization_id, difference)

    @runs_in_writer
    def begin_upload(
        self, db: sqlite3.Connection, principal: Principal, thread_id: str, attachment_id: str, size: int
    ) -> None:
        add_removal(db, removal_of_attachment(principal, thread_id, attachment_id, size), 2 * UPLOAD_SECONDS)

    @runs_in_writer
    def take_removals(self, db: sqlite3.Connection) -> list[BlobRemoval]:
        db.execute(
            f"DELETE FROM removals WHERE due <= {NOW} AND"
            " (id IN (SELECT id FROM attachments) OR (attachment_id IS NULL AND id IN (SELECT id FROM threads)))"
        )
        rows = db.execute(
            f"UPDATE removals SET due = {NOW} + ?, taken = 1 WHERE id IN"
            f" (SELECT id FROM removals WHERE due <= {NOW} LIMIT ?)"
            " RETURNING id, organization_id, thread_id, attachment_id, size",
            (REMOVAL_SECONDS, REMOVALS_TAKEN),
        ).fetchall()
        return [BlobRemoval(*row) for row in rows]

    @runs_in_writer
    def finish_removal(self, db: sqlite3.Connection, removal_id: str) -> None:
        row = db.execute("DELETE FROM removals WHERE id = ? RETURNING organization_id, size", (removal_id,)).fetchone()
        if row:
            add_bytes(db, row[0], -row[1])
