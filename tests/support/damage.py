"""Faults of a real SQLite database, caused from outside."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def without(data_dir: Path, table: str) -> Iterator[None]:
    """Every statement that uses this table fails."""
    database = sqlite3.connect(data_dir / "chat.db", timeout=10, isolation_level=None)
    database.execute(f"ALTER TABLE {table} RENAME TO lost")
    try:
        yield
    finally:
        database.execute(f"ALTER TABLE lost RENAME TO {table}")
        database.close()
