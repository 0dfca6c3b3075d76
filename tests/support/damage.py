"""What happens to a database, done to the real one from outside."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def without(data_dir: Path, table: str) -> Iterator[None]:
    """The database fails whoever asks for this table."""
    database = sqlite3.connect(data_dir / "chat.db", timeout=10, isolation_level=None)
    database.execute(f"ALTER TABLE {table} RENAME TO lost")
    try:
        yield
    finally:
        database.execute(f"ALTER TABLE lost RENAME TO {table}")
        database.close()
