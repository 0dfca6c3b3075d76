"""Lists of many threads on SQLite: pages at any offset, and the ranges that make them fast."""

from __future__ import annotations

import contextlib
import random
import sqlite3
from pathlib import Path

import pytest

from agent_chat.stores.models import new_id
from agent_chat.stores.sqlite.listing import RANGE, read_page
from agent_chat.stores.sqlite.store import SQLiteStore, open_sqlite
from tests.support.earlier_data import unpack_folder

ARCHIVED = (None, True, False)
COUNT = 10 * RANGE
STEPS = 25 * RANGE
"""Steps of SQLite's virtual machine that a page may take: it skips one range, at five to ten steps per thread."""


def insert(db: sqlite3.Connection, activities: list[int], archived: str = "abs(random()) % 10 = 0") -> None:
    """Insert a thread per activity."""
    db.executemany(
        "INSERT INTO threads (id, organization_id, agent_id, user_id, title, metadata, created_at, updated_at,"
        f" archived, last_activity_at) VALUES (?, 'organization', 'agent', 'user', '', '{{}}', '', '', {archived}, ?)",
        [(new_id(), f"{activity:06}") for activity in activities],
    )


def threads(db: sqlite3.Connection, archived: bool | None) -> list[str]:
    """The ids of the whole list, sorted here."""
    rows = db.execute("SELECT last_activity_at, id, archived FROM threads WHERE agent_id = 'agent'").fetchall()
    return [
        id for _, id, is_archived in sorted(map(tuple, rows), reverse=True) if archived in (None, bool(is_archived))
    ]


def page(db: sqlite3.Connection, archived: bool | None, limit: int, offset: int) -> list[str]:
    return [row["id"] for row in read_page(db, "organization", "agent", archived, limit, offset)]


def check_pages(db: sqlite3.Connection) -> None:
    """Compare pages over the whole list with the list."""
    for archived in ARCHIVED:
        expected = threads(db, archived)
        for offset in [*range(0, len(expected), 450), len(expected) - 1, len(expected), len(expected) + 5000]:
            assert page(db, archived, 7, offset) == expected[offset : offset + 7], (archived, offset)


def check_ranges(db: sqlite3.Connection) -> list[int]:
    """Compare the counts of the ranges with their threads; the sizes of the ranges, oldest first."""
    ranges = db.execute("SELECT * FROM thread_ranges WHERE agent_id = 'agent' ORDER BY since").fetchall()
    ends = [*(each["since"] for each in ranges[1:]), "~"]
    for each, end in zip(ranges, ends, strict=True):
        counted = db.execute(
            "SELECT count(*) - total(archived), total(archived) FROM threads"
            " WHERE agent_id = 'agent' AND last_activity_at >= ? AND last_activity_at < ?",
            (each["since"], end),
        ).fetchone()
        assert (each["active"], each["archived"]) == tuple(counted)
    assert ranges[0]["since"] == ""
    return [each["active"] + each["archived"] for each in ranges]


@pytest.fixture
async def lists(tmp_path: Path) -> SQLiteStore:
    return await open_sqlite(tmp_path / "chat.db")


@pytest.mark.parametrize("order", ["rising", "falling", "random", "equal"])
async def test_pages_at_any_offset_are_right_after_any_writes(lists: SQLiteStore, order: str) -> None:
    activities = {
        "rising": list(range(3 * RANGE)),
        "falling": list(range(3 * RANGE, 0, -1)),
        "random": random.Random(1).choices(range(2 * RANGE), k=3 * RANGE),
        "equal": [1] * 3 * RANGE,
    }[order]

    def write(db: sqlite3.Connection) -> None:
        insert(db, activities)
        sizes = check_ranges(db)
        assert max(sizes) <= RANGE or order == "equal"
        check_pages(db)
        db.execute("UPDATE threads SET archived = NOT archived WHERE rowid % 7 = 0")
        db.execute("UPDATE threads SET last_activity_at = printf('%06d', 5000 + rowid) WHERE rowid % 3 = 0")
        check_ranges(db)
        check_pages(db)
        db.execute("DELETE FROM threads WHERE rowid < 2500 AND rowid % 50 <> 0")
        assert 0 not in check_ranges(db)[1:]
        check_pages(db)
        db.execute("DELETE FROM threads")
        assert check_ranges(db) == [0]

    await lists.writer.run(write)
    await lists.close()


async def test_a_page_takes_as_many_steps_at_the_end_of_a_long_list_as_at_its_beginning(lists: SQLiteStore) -> None:
    def steps(db: sqlite3.Connection, archived: bool | None, offset: int) -> int:
        count = 0

        def step() -> int:
            nonlocal count
            count += 1
            return 0

        db.set_progress_handler(step, 1)
        read_page(db, "organization", "agent", archived, 11, offset)
        db.set_progress_handler(None, 0)
        return count

    def check(db: sqlite3.Connection) -> None:
        insert(db, list(range(COUNT)), "abs(random()) % 2")
        for archived in ARCHIVED:
            length = len(threads(db, archived))
            for offset in (0, RANGE - 1, RANGE, length // 2, length - 11, length):
                assert steps(db, archived, offset) < STEPS, (archived, offset)

    await lists.writer.run(check)
    await lists.close()


async def test_a_migration_creates_the_ranges_of_earlier_threads(tmp_path: Path) -> None:
    path = unpack_folder("0.1.0", tmp_path) / "chat.db"
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.executemany(
            "INSERT INTO threads (id, organization_id, agent_id, user_id, title, metadata, created_at, updated_at,"
            " archived) VALUES (?, 'organization', 'agent', 'user', '', '{}', ?, '', ?)",
            [(new_id(), f"{number // 3:06}", number % 4 == 0) for number in range(3 * RANGE)],
        )
    store = await open_sqlite(path)

    def check(db: sqlite3.Connection) -> None:
        assert max(check_ranges(db)) <= RANGE
        check_pages(db)
        insert(db, list(range(2000, 2000 + RANGE)))
        assert max(check_ranges(db)) <= RANGE
        check_pages(db)

    await store.writer.run(check)
    await store.close()
