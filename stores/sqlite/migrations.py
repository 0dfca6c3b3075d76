"""The schema of the embedded database, and the ordered migrations that bring data of earlier versions to it.

`PRAGMA user_version` is the version of the data: how many migrations they have had. Databases written before versions
existed have 0, as a new file has. Each migration runs in one transaction together with the change of the version, so a
process that is killed during one leaves the database as it was before, and the next start runs it again.

A new database runs the same migrations. A second description of the newest schema, for new databases only, was refused:
the two would come to differ.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path

from agent_chat.stores.errors import SchemaTooNew

logger = logging.getLogger(__name__)

_TABLES = """
CREATE TABLE IF NOT EXISTS organizations (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, default_agent_id TEXT, created_at TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS users (
    id TEXT PRIMARY KEY, organization_id TEXT NOT NULL, name TEXT NOT NULL, created_at TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS users_of ON users (organization_id);
CREATE TABLE IF NOT EXISTS keys (
    id TEXT PRIMARY KEY, organization_id TEXT NOT NULL, user_id TEXT NOT NULL, hash TEXT NOT NULL,
    hint TEXT NOT NULL, created_at TEXT NOT NULL, revoked_at TEXT, source TEXT, held_at REAL);
CREATE UNIQUE INDEX IF NOT EXISTS valid_keys ON keys (hash) WHERE revoked_at IS NULL;
CREATE TABLE IF NOT EXISTS sessions (
    hash TEXT PRIMARY KEY, key_id TEXT NOT NULL, organization_id TEXT NOT NULL, user_id TEXT NOT NULL,
    created_at TEXT NOT NULL, expires_at TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS expired_sessions ON sessions (expires_at);
CREATE INDEX IF NOT EXISTS sessions_of ON sessions (key_id, created_at);
CREATE TABLE IF NOT EXISTS agents (
    seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, organization_id TEXT NOT NULL, body BLOB NOT NULL,
    deleted INTEGER NOT NULL DEFAULT 0);
CREATE INDEX IF NOT EXISTS agents_of ON agents (organization_id);
CREATE TABLE IF NOT EXISTS threads (
    id TEXT PRIMARY KEY, organization_id TEXT NOT NULL, agent_id TEXT NOT NULL, user_id TEXT NOT NULL,
    title TEXT NOT NULL, metadata BLOB NOT NULL, created_at TEXT NOT NULL, updated_at TEXT NOT NULL,
    archived INTEGER NOT NULL, running TEXT, key TEXT, fingerprint TEXT, key_at REAL, external_id TEXT);
CREATE INDEX IF NOT EXISTS threads_of ON threads (organization_id, agent_id, updated_at DESC, id DESC);
CREATE UNIQUE INDEX IF NOT EXISTS thread_keys ON threads (organization_id, user_id, agent_id, key)
    WHERE key IS NOT NULL;
CREATE TABLE IF NOT EXISTS messages (
    seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, created_at TEXT NOT NULL, body BLOB NOT NULL,
    thread_id TEXT NOT NULL REFERENCES threads (id) ON DELETE CASCADE);
CREATE INDEX IF NOT EXISTS messages_of ON messages (thread_id, seq);
CREATE TABLE IF NOT EXISTS runs (
    id TEXT PRIMARY KEY, organization_id TEXT NOT NULL, user_id TEXT NOT NULL, worker TEXT NOT NULL,
    lease REAL NOT NULL, cancelled INTEGER NOT NULL DEFAULT 0, partial BLOB NOT NULL,
    thread_id TEXT NOT NULL REFERENCES threads (id) ON DELETE CASCADE);
CREATE TABLE IF NOT EXISTS attachments (
    id TEXT PRIMARY KEY, organization_id TEXT NOT NULL, size INTEGER NOT NULL, body BLOB NOT NULL,
    thread_id TEXT NOT NULL REFERENCES threads (id) ON DELETE CASCADE);
CREATE INDEX IF NOT EXISTS attachments_of ON attachments (organization_id, size);
CREATE INDEX IF NOT EXISTS attachments_in ON attachments (thread_id);
CREATE TABLE IF NOT EXISTS idempotency (
    thread_id TEXT NOT NULL REFERENCES threads (id) ON DELETE CASCADE, user_id TEXT NOT NULL, key TEXT NOT NULL,
    fingerprint TEXT NOT NULL, message_id TEXT NOT NULL, run_id TEXT, at REAL NOT NULL,
    free INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (thread_id, user_id, key));
CREATE TABLE IF NOT EXISTS outbox (
    seq INTEGER PRIMARY KEY, thread_id TEXT NOT NULL, organization_id TEXT NOT NULL, id TEXT NOT NULL,
    type TEXT NOT NULL, due REAL NOT NULL, cut INTEGER NOT NULL DEFAULT 0);
CREATE INDEX IF NOT EXISTS outbox_of ON outbox (thread_id, seq);
CREATE INDEX IF NOT EXISTS outbox_due ON outbox (due);
CREATE TABLE IF NOT EXISTS storage (
    organization_id TEXT PRIMARY KEY, stored INTEGER NOT NULL DEFAULT 0, measure_at REAL NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS removals (
    id TEXT PRIMARY KEY, organization_id TEXT NOT NULL, thread_id TEXT NOT NULL, attachment_id TEXT,
    size INTEGER NOT NULL, due REAL NOT NULL, taken INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS removals_due ON removals (due);
CREATE INDEX IF NOT EXISTS removals_of ON removals (organization_id, size);
CREATE TABLE IF NOT EXISTS probe (id INTEGER PRIMARY KEY, data BLOB NOT NULL);
"""
_ADDED_COLUMNS = {"keys": {"source": "TEXT", "held_at": "REAL"}, "threads": {"external_id": "TEXT"}}
"""Columns that databases without a version may lack."""
_ADDED_INDEXES = """
CREATE UNIQUE INDEX IF NOT EXISTS thread_external_ids ON threads (organization_id, agent_id, external_id, user_id)
    WHERE external_id IS NOT NULL;
"""
"""Indexes of those columns."""


def _create_tables(db: sqlite3.Connection) -> None:
    """1: create what is missing; databases without a version have some of the tables, perhaps with fewer columns."""
    for statement in _TABLES.split(";"):
        db.execute(statement)
    for table, columns in _ADDED_COLUMNS.items():
        present = {row[1] for row in db.execute(f"PRAGMA table_info({table})")}
        for name in columns.keys() - present:
            db.execute(f"ALTER TABLE {table} ADD COLUMN {name} {columns[name]}")
    for statement in _ADDED_INDEXES.split(";"):
        db.execute(statement)


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
