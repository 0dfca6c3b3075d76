"""The schema of the embedded database, and the ordered migrations that bring data of earlier versions to it.

`PRAGMA user_version` is the version of the data: how many migrations they have had. Databases written before versions
existed have 0, as a new file has. Each migration runs in one transaction together with the change of the version, so a
process that is killed during one leaves the database as it was before, and the next start runs it again.

A new database runs the same migrations. A second description of the newest schema, for new databases only, was refused:
the two would come to differ.

Messages, agents, attachments, metadata and the records of runs are JSON text, for people and SQLite's JSON functions:

    SELECT json_extract(message, '$.role'), json_extract(message, '$.content') FROM messages WHERE thread_id = …;
    SELECT json_extract(agent, '$.name') FROM agents;
    SELECT json_extract(file, '$.attachment.filename') FROM attachments;

It is written as `CAST(? AS TEXT)` of bytes and read as `CAST(… AS BLOB)`: Python's str between SQLite and msgspec would
double the time of text that is not ASCII. The sizes are columns because `length()` of a text reads all of it.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path

from agent_chat.stores.errors import SchemaTooNew

logger = logging.getLogger(__name__)

_TABLES = """
CREATE TABLE organizations (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, default_agent_id TEXT, created_at TEXT NOT NULL);
CREATE TABLE users (
    id TEXT PRIMARY KEY, organization_id TEXT NOT NULL, name TEXT NOT NULL, created_at TEXT NOT NULL);
CREATE TABLE keys (
    id TEXT PRIMARY KEY, organization_id TEXT NOT NULL, user_id TEXT NOT NULL, hash TEXT NOT NULL,
    hint TEXT NOT NULL, created_at TEXT NOT NULL, revoked_at TEXT, source TEXT, held_at REAL);
CREATE TABLE sessions (
    hash TEXT PRIMARY KEY, key_id TEXT NOT NULL, organization_id TEXT NOT NULL, user_id TEXT NOT NULL,
    created_at TEXT NOT NULL, expires_at TEXT NOT NULL);
CREATE TABLE agents (
    seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, organization_id TEXT NOT NULL,
    deleted INTEGER NOT NULL DEFAULT 0,
    size INTEGER GENERATED ALWAYS AS (length(CAST(agent AS BLOB))) STORED, agent TEXT NOT NULL);
CREATE TABLE threads (
    id TEXT PRIMARY KEY, organization_id TEXT NOT NULL, agent_id TEXT NOT NULL, user_id TEXT NOT NULL,
    title TEXT NOT NULL, created_at TEXT NOT NULL, updated_at TEXT NOT NULL, archived INTEGER NOT NULL, running TEXT,
    key TEXT, fingerprint TEXT, key_at REAL, external_id TEXT, last_activity_at TEXT NOT NULL,
    size INTEGER GENERATED ALWAYS AS (length(CAST(title AS BLOB)) + length(CAST(metadata AS BLOB))) STORED,
    metadata TEXT NOT NULL);
CREATE TABLE messages (
    seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, created_at TEXT NOT NULL,
    thread_id TEXT NOT NULL REFERENCES threads (id) ON DELETE CASCADE,
    size INTEGER GENERATED ALWAYS AS (length(CAST(message AS BLOB))) STORED, message TEXT NOT NULL);
CREATE TABLE runs (
    id TEXT PRIMARY KEY, organization_id TEXT NOT NULL, user_id TEXT NOT NULL,
    thread_id TEXT NOT NULL REFERENCES threads (id) ON DELETE CASCADE, worker TEXT NOT NULL, lease REAL NOT NULL,
    cancelled INTEGER NOT NULL DEFAULT 0,
    size INTEGER GENERATED ALWAYS AS (length(CAST(partial AS BLOB))) STORED, partial TEXT NOT NULL);
CREATE TABLE attachments (
    id TEXT PRIMARY KEY, organization_id TEXT NOT NULL,
    thread_id TEXT NOT NULL REFERENCES threads (id) ON DELETE CASCADE, size INTEGER NOT NULL,
    record_size INTEGER GENERATED ALWAYS AS (length(CAST(file AS BLOB))) STORED, file TEXT NOT NULL);
CREATE TABLE idempotency (
    thread_id TEXT NOT NULL REFERENCES threads (id) ON DELETE CASCADE, user_id TEXT NOT NULL, key TEXT NOT NULL,
    fingerprint TEXT NOT NULL, message_id TEXT NOT NULL, run_id TEXT, at REAL NOT NULL,
    free INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (thread_id, user_id, key));
CREATE TABLE outbox (
    seq INTEGER PRIMARY KEY, thread_id TEXT NOT NULL, organization_id TEXT NOT NULL, id TEXT NOT NULL,
    type TEXT NOT NULL, due REAL NOT NULL, cut INTEGER NOT NULL DEFAULT 0);
CREATE TABLE storage (
    organization_id TEXT PRIMARY KEY, stored INTEGER NOT NULL DEFAULT 0, measure_at REAL NOT NULL DEFAULT 0);
CREATE TABLE removals (
    id TEXT PRIMARY KEY, organization_id TEXT NOT NULL, thread_id TEXT NOT NULL, attachment_id TEXT,
    size INTEGER NOT NULL, due REAL NOT NULL, taken INTEGER NOT NULL);
CREATE TABLE thread_ranges (
    organization_id TEXT NOT NULL, agent_id TEXT NOT NULL, since TEXT NOT NULL, active INTEGER NOT NULL DEFAULT 0,
    archived INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (organization_id, agent_id, since)) WITHOUT ROWID;
CREATE TABLE usage (
    id TEXT PRIMARY KEY, organization_id TEXT NOT NULL, user_id TEXT NOT NULL, agent_id TEXT NOT NULL, thread_id TEXT,
    model TEXT, day TEXT NOT NULL, status TEXT NOT NULL, runs INTEGER NOT NULL, input_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL, cache_creation_input_tokens INTEGER NOT NULL,
    cache_read_input_tokens INTEGER NOT NULL, tool_calls INTEGER NOT NULL);
CREATE TABLE probe (id INTEGER PRIMARY KEY, data BLOB NOT NULL)
"""
"""Tables whose rows have a JSON text in the last column; the generated size before it is read without the text."""
_INDEXES = """
CREATE INDEX users_of ON users (organization_id);
CREATE UNIQUE INDEX valid_keys ON keys (hash) WHERE revoked_at IS NULL;
CREATE INDEX expired_sessions ON sessions (expires_at);
CREATE INDEX sessions_of ON sessions (key_id, created_at);
CREATE INDEX agents_of ON agents (organization_id);
CREATE INDEX threads_of ON threads (organization_id, agent_id, archived, last_activity_at DESC, id DESC);
CREATE INDEX threads_by_id ON threads (organization_id, id);
CREATE UNIQUE INDEX thread_keys ON threads (organization_id, user_id, agent_id, key) WHERE key IS NOT NULL;
CREATE UNIQUE INDEX thread_external_ids ON threads (organization_id, agent_id, external_id, user_id)
    WHERE external_id IS NOT NULL;
CREATE INDEX messages_of ON messages (thread_id, seq);
CREATE INDEX attachments_of ON attachments (organization_id, size);
CREATE INDEX attachments_in ON attachments (thread_id);
CREATE INDEX outbox_of ON outbox (thread_id, seq);
CREATE INDEX outbox_due ON outbox (due);
CREATE INDEX usage_of ON usage (organization_id, day);
CREATE INDEX usage_to_roll_up ON usage (day) WHERE thread_id IS NOT NULL;
CREATE INDEX removals_due ON removals (due);
CREATE INDEX removals_of ON removals (organization_id, size)
"""
_RANGE_OF = """(SELECT MAX(since) FROM thread_ranges WHERE organization_id = {0}.organization_id
    AND agent_id = {0}.agent_id AND since <= {0}.last_activity_at)"""
_NEW_RANGE, _OLD_RANGE = _RANGE_OF.format("NEW"), _RANGE_OF.format("OLD")
_ADD = f"""
    INSERT OR IGNORE INTO thread_ranges (organization_id, agent_id, since)
        VALUES (NEW.organization_id, NEW.agent_id, '');
    UPDATE thread_ranges SET active = active + NOT NEW.archived, archived = archived + NEW.archived
        WHERE organization_id = NEW.organization_id AND agent_id = NEW.agent_id AND since = {_NEW_RANGE};
"""
_SUBTRACT = f"""
    UPDATE thread_ranges SET active = active - NOT OLD.archived, archived = archived - OLD.archived
        WHERE organization_id = OLD.organization_id AND agent_id = OLD.agent_id AND since = {_OLD_RANGE};
    DELETE FROM thread_ranges WHERE organization_id = OLD.organization_id AND agent_id = OLD.agent_id
        AND since = {_OLD_RANGE} AND active + archived = 0 AND since > '';
"""
_NEXT = """COALESCE((SELECT MIN(n.since) FROM thread_ranges n WHERE n.organization_id = NEW.organization_id
    AND n.agent_id = NEW.agent_id AND n.since > {0}), '~')"""
_COUNT = f"""(SELECT count(*) FROM threads t WHERE t.organization_id = NEW.organization_id
    AND t.agent_id = NEW.agent_id AND t.archived = {{0}} AND t.last_activity_at >= thread_ranges.since
    AND t.last_activity_at < {_NEXT.format("thread_ranges.since")})"""
_TRIGGERS = (
    f"CREATE TRIGGER add_thread AFTER INSERT ON threads BEGIN {_ADD} END",
    f"CREATE TRIGGER remove_thread AFTER DELETE ON threads BEGIN {_SUBTRACT} END",
    f"""CREATE TRIGGER move_thread AFTER UPDATE OF last_activity_at, archived ON threads
    WHEN OLD.archived <> NEW.archived OR {_OLD_RANGE} <> {_NEW_RANGE} BEGIN {_SUBTRACT} {_ADD} END""",
    f"""CREATE TRIGGER split_range AFTER UPDATE ON thread_ranges
    WHEN NEW.active + NEW.archived > OLD.active + OLD.archived
        AND NEW.active + NEW.archived >= 1000 AND (NEW.active + NEW.archived) % 500 = 0
    BEGIN
        INSERT OR IGNORE INTO thread_ranges (organization_id, agent_id, since)
            SELECT organization_id, agent_id, last_activity_at FROM threads
            WHERE organization_id = NEW.organization_id AND agent_id = NEW.agent_id AND archived IN (0, 1)
                AND last_activity_at >= NEW.since AND last_activity_at < {_NEXT.format("NEW.since")}
            ORDER BY last_activity_at LIMIT 1 OFFSET 500;
        UPDATE thread_ranges SET active = {_COUNT.format(0)}, archived = {_COUNT.format(1)}
            WHERE organization_id = NEW.organization_id AND agent_id = NEW.agent_id
                AND since IN (NEW.since, {_NEXT.format("NEW.since")});
    END""",
)
"""They maintain the ranges that `listing.py` explains. A range of 1000 threads is split in the middle; one whose
threads have all the same last activity cannot be split, and the next attempt is made when it has grown by 500."""
_CREATE_RANGES = """
INSERT INTO thread_ranges (organization_id, agent_id, since, active, archived)
SELECT organization_id, agent_id, CASE part WHEN 0 THEN '' ELSE MIN(last_activity_at) END,
    SUM(NOT archived), SUM(archived)
FROM (SELECT organization_id, agent_id, archived, last_activity_at,
    (RANK() OVER (PARTITION BY organization_id, agent_id ORDER BY last_activity_at) - 1) / 500 AS part FROM threads)
GROUP BY organization_id, agent_id, part
"""
_CONVERSIONS = {
    ("agents", "agent"): "CAST(body AS TEXT)",
    ("threads", "metadata"): "CAST(metadata AS TEXT)",
    ("threads", "last_activity_at"): "COALESCE((SELECT m.created_at FROM earlier_messages m"
    " WHERE m.thread_id = earlier_threads.id ORDER BY seq DESC LIMIT 1), created_at)",
    ("messages", "message"): "CAST(body AS TEXT)",
    ("runs", "partial"): "CAST(partial AS TEXT)",
    ("attachments", "file"): "CAST(body AS TEXT)",
}
"""Columns of version 1 that are not copied as they are, as expressions of the columns without a version."""


def _create_tables(db: sqlite3.Connection) -> None:
    """1: create the tables, and move to them what databases without a version have.

    Those have some of the tables, perhaps with fewer columns, and JSON in BLOBs.
    """
    statements = _TABLES.split(";")
    names = [statement.split()[2] for statement in statements]
    earlier = [name for name in names if _columns(db, name)]
    for name in earlier:
        db.execute(f"ALTER TABLE {name} RENAME TO earlier_{name}")
    for statement in statements:
        db.execute(statement)
    for name in earlier:
        _move_rows(db, name)
    for name in reversed(earlier):
        db.execute(f"DROP TABLE earlier_{name}")
    for statement in (*_INDEXES.split(";"), _CREATE_RANGES, *_TRIGGERS):
        db.execute(statement)


def _move_rows(db: sqlite3.Connection, name: str) -> None:
    present = _columns(db, f"earlier_{name}")
    values = {
        column: _CONVERSIONS.get((name, column), column)
        for column in _columns(db, name)
        if column in present or (name, column) in _CONVERSIONS
    }
    db.execute(
        f"INSERT INTO {name} ({', '.join(values)}) SELECT {', '.join(values.values())} FROM earlier_{name}"
        " ORDER BY rowid"
    )


def _columns(db: sqlite3.Connection, table: str) -> list[str]:
    """The columns that can be written; none if there is no such table."""
    return [row[1] for row in db.execute(f"PRAGMA table_info({table})")]


MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (_create_tables,)
"""The migration at index n brings data of version n to version n + 1. Those that were released never change."""


def is_outdated(db: sqlite3.Connection, path: Path) -> bool:
    """Whether the data need migrations. Raises: SchemaTooNew."""
    version = _read_version(db)
    if version > len(MIGRATIONS):
        raise SchemaTooNew(str(path), version, len(MIGRATIONS))
    return version < len(MIGRATIONS)


def migrate(db: sqlite3.Connection, path: Path) -> None:
    """Bring the data to this code's version. The caller holds the lock of the data folder."""
    db.execute("PRAGMA foreign_keys = OFF")  # else dropping a table deletes the rows that refer to it
    while is_outdated(db, path):
        db.execute("BEGIN IMMEDIATE")
        version = _read_version(db)
        if db.execute("SELECT 1 FROM sqlite_schema").fetchone():
            logger.info("Migrating %s from schema version %d to %d", path, version, version + 1)
        MIGRATIONS[version](db)
        db.execute(f"PRAGMA user_version = {version + 1}")
        db.execute("COMMIT")


def _read_version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])
