"""The attachments' records of the ThreadStore contract on SQLite."""

from __future__ import annotations

import sqlite3

import msgspec

from agent_chat.stores.errors import AttachmentNotFound, StoreUnavailable
from agent_chat.stores.models import Principal, StoredFile
from agent_chat.stores.rules import removal_of_attachment
from agent_chat.stores.sqlite.database import SQLiteBase, runs_in_reader, runs_in_writer
from agent_chat.stores.sqlite.rows import thread_row
from agent_chat.stores.sqlite.storage import add_removal, cancel_removal


class SQLiteFiles(SQLiteBase):
    """Attachments in SQLite."""

    @runs_in_writer
    def add_file(self, db: sqlite3.Connection, principal: Principal, file: StoredFile) -> None:
        thread_row(db, principal, file.thread_id)
        if not cancel_removal(db, file.attachment.id):  # I10
            raise StoreUnavailable(f"storing attachment {file.attachment.id} took too long")
        db.execute(
            "INSERT INTO attachments (id, organization_id, size, file, thread_id) VALUES (?, ?, ?, CAST(? AS TEXT), ?)",
            (
                file.attachment.id,
                principal.organization_id,
                file.attachment.size,
                msgspec.json.encode(file),
                file.thread_id,
            ),
        )

    @runs_in_reader
    def get_file(self, db: sqlite3.Connection, principal: Principal, thread_id: str, attachment_id: str) -> StoredFile:
        thread_row(db, principal, thread_id)
        row = db.execute(
            "SELECT CAST(file AS BLOB) AS file FROM attachments WHERE id = ? AND thread_id = ?",
            (attachment_id, thread_id),
        ).fetchone()
        if row is None:
            raise AttachmentNotFound(attachment_id)
        return msgspec.json.decode(row["file"], type=StoredFile)

    @runs_in_writer
    def remove_file(self, db: sqlite3.Connection, principal: Principal, thread_id: str, attachment_id: str) -> None:
        thread_row(db, principal, thread_id)
        row = db.execute(
            "DELETE FROM attachments WHERE id = ? AND thread_id = ? RETURNING size", (attachment_id, thread_id)
        ).fetchone()
        if row:
            add_removal(db, removal_of_attachment(principal, thread_id, attachment_id, row["size"]))
