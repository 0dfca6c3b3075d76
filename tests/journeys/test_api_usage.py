"""Usage over HTTP."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest

from tests.support.servers import Live
from tests.support.shapes import is_invalid

USAGE = "/api/v1/usage"


async def test_each_run_counts_once_also_after_its_thread_is_deleted(live: Live) -> None:
    thread = await live.scripted_thread()
    agent_id = thread.split("/")[4]
    day = datetime.now(UTC).date().isoformat()
    for _ in range(2):
        assert (await live.post(thread, "say hello")).status_code == 201
    assert (await live.http.delete(thread)).status_code == 204
    query = f"{USAGE}?group_by=agent&from={day}"
    runs = 0
    async with asyncio.timeout(10):
        while runs < 2:  # the row of the last run is stored soon after its answer
            [total] = (await live.http.get(query)).json() or [{"key": agent_id, "runs": 0}]
            assert total["key"] == agent_id
            runs = total["runs"]
    assert runs == 2
    assert (await live.http.get(f"{USAGE}?to=2020-01-01")).json() == []


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("from=yesterday", "from"),
        ("to=2026-13-01", "to"),
        ("from=2026-02-01&to=2026-01-01", "from"),
        ("group_by=thread", "group_by"),
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
    ],
)
async def test_an_invalid_query_is_refused(live: Live, query: str, field: str) -> None:
    is_invalid(await live.http.get(f"{USAGE}?{query}"), field)
