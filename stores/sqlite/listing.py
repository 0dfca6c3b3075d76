"""Pages of lists of threads, at any offset in a bounded number of steps.

SQLite skips to an offset row by row: 15 ms for 100,000 rows, in whatever index. So `thread_ranges` divides the list of
an agent's threads, which is ordered by their last activity, into ranges of up to RANGE threads, and counts the active
and the archived threads of each. A range begins at `since` and ends where the next begins; the first has `since` "".
Triggers count in the transaction that writes the thread, whatever code writes it, split ranges that have grown, and
delete empty ones (`migrations.py`). A page needs the ranges' counts and skips less than one range.

Refused: offsets by a cursor (the API has offsets), and ranks or counts in memory, which a reader's snapshot and the
command line beside a server would not agree with.
"""

from __future__ import annotations

import sqlite3

RANGE = 1000
"""A range of so many threads is split, unless their last activities are equal; the triggers have the number too."""

_LAST = "~"
"""After all times."""

_PART = """
SELECT rowid, last_activity_at, id FROM threads
WHERE organization_id = ?1 AND agent_id = ?2 AND last_activity_at < ?3 AND archived = """
_PAGE = " ORDER BY last_activity_at DESC, id DESC LIMIT ?4 OFFSET ?5"
_QUERIES: dict[bool | None, str] = {
    True: f"{_PART} 1 {_PAGE}",
    False: f"{_PART} 0 {_PAGE}",
    None: f"{_PART} 0 UNION ALL {_PART} 1 {_PAGE}",  # SQLite merges the two while it reads them
}
_COUNTS: dict[bool | None, str] = {True: "archived", False: "active", None: "active + archived"}


def read_page(
    db: sqlite3.Connection, organization_id: str, agent_id: str, archived: bool | None, limit: int, offset: int
) -> list[sqlite3.Row]:
    """The threads of the page, latest activity first; `archived` None: all."""
    before, skip = _LAST, offset
    if offset >= RANGE:
        found = _find_range(db, organization_id, agent_id, archived, offset)
        if found is None:
            return []
        before, skip = found
    keys = db.execute(_QUERIES[archived], (organization_id, agent_id, before, limit, skip)).fetchall()
    return [db.execute("SELECT * FROM threads WHERE rowid = ?", (key["rowid"],)).fetchone() for key in keys]


def read_page_of_external_id(
    db: sqlite3.Connection,
    organization_id: str,
    agent_id: str,
    external_id: str,
    archived: bool | None,
    limit: int,
    offset: int,
) -> list[sqlite3.Row]:
    """As `read_page`, of the threads that have this external id: at most one per user."""
    return db.execute(
        "SELECT * FROM threads WHERE organization_id = ?1 AND agent_id = ?2 AND external_id = ?3"
        " AND (?4 IS NULL OR archived = ?4) ORDER BY last_activity_at DESC, id DESC LIMIT ?5 OFFSET ?6",
        (organization_id, agent_id, external_id, archived, limit, offset),
    ).fetchall()


def _find_range(
    db: sqlite3.Connection, organization_id: str, agent_id: str, archived: bool | None, offset: int
) -> tuple[str, int] | None:
    """The end of the range that has the thread at the offset, and how many of its threads are before that thread."""
    before, skip = _LAST, offset
    ranges = db.execute(
        f"SELECT since, {_COUNTS[archived]} AS count FROM thread_ranges WHERE organization_id = ? AND agent_id = ?"
        " ORDER BY since DESC",
        (organization_id, agent_id),
    )
    for since, count in ranges:
        if skip < count:
            return before, skip
        before, skip = since, skip - count
    return None
