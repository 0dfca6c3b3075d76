"""The usage contract on SQLite. A row of one run has its thread's id; a rolled-up one has None."""

from __future__ import annotations

import sqlite3

from agent_chat.stores.contracts.usage import COUNTS, UsageGroup, UsageRow, UsageTotal
from agent_chat.stores.models import Principal
from agent_chat.stores.sqlite.database import SQLiteBase, runs_in_reader, runs_in_writer

_COLUMNS: dict[UsageGroup, str] = {"day": "day", "agent": "agent_id", "model": "model", "user": "user_id"}
_SUMS = ", ".join(f"SUM({name}) AS {name}" for name in COUNTS)
_GROUP = "organization_id, user_id, agent_id, model, day, status"
_ROLLED_AT_ONCE = 2000
"""How many rows one transaction replaces."""


def insert_usage(db: sqlite3.Connection, row: UsageRow) -> None:
    """Store the row of a run, unless it is there (I25)."""
    values = {name: getattr(row, name) for name in row.__struct_fields__} | {"runs": 1}
    db.execute(
        f"INSERT OR IGNORE INTO usage ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})",
        tuple(values.values()),
    )


class SQLiteUsage(SQLiteBase):
    """Usage rows in SQLite."""

    @runs_in_reader
    def sum_usage(
        self,
        db: sqlite3.Connection,
        principal: Principal,
        *,
        first_day: str,
        last_day: str,
        group_by: UsageGroup,
        limit: int,
        offset: int,
    ) -> list[UsageTotal]:
        column = _COLUMNS[group_by]
        rows = db.execute(
            f"SELECT {column} AS key, {_SUMS} FROM usage WHERE organization_id = ? AND day BETWEEN ? AND ?"
            f" GROUP BY {column} ORDER BY {column} LIMIT ? OFFSET ?",
            (principal.organization_id, first_day, last_day, limit, offset),
        )
        return [UsageTotal(*row) for row in rows]

    @runs_in_writer
    def roll_up_usage(self, db: sqlite3.Connection, before: str) -> bool:
        """One transaction for each `_ROLLED_AT_ONCE` rows: rolled-up rows of one group may be several."""
        oldest = "SELECT id FROM usage WHERE thread_id IS NOT NULL AND day < ? ORDER BY day LIMIT ?"
        ids = [row[0] for row in db.execute(oldest, (before, _ROLLED_AT_ONCE))]
        marks = ", ".join("?" * len(ids))
        db.execute(
            f"INSERT INTO usage (id, {_GROUP}, {', '.join(COUNTS)})"
            f" SELECT 'rolled-up/' || hex(randomblob(16)), {_GROUP}, {_SUMS}"
            f" FROM usage WHERE id IN ({marks}) GROUP BY {_GROUP}",
            ids,
        )
        db.execute(f"DELETE FROM usage WHERE id IN ({marks})", ids)
        return bool(ids)
