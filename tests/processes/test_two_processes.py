"""Two processes, one thread: what runs on A is watched, resumed, cancelled and deleted on B as if it ran there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.journeys.shapes import is_problem
from tests.journeys.viewing import View, status
from tests.processes.site import Server, Site
from tests.processes.viewers import DOORS, Door, Viewer, viewing

COUNTED = "".join(f"{n} " for n in range(50))


@pytest.mark.parametrize("door", DOORS)
async def test_a_run_on_one_is_watched_on_the_other_from_before_the_middle_and_after(site: Site, door: Door) -> None:
    a, b = await site.pair()
    thread = await a.scripted_thread(mcp_servers=["demo"])
    before = Viewer([b], thread, door)
    async with viewing(before):
        script = 'think hm\ncount 25 2\nhold middle\ntool calculate {"expression": "6*7"}\nsay 🎈\ncount 25 2'
        run = await a.begin(thread, script)
        await before.reads(run, "24 ")
        await site.reached("middle")
        middle, resumed = Viewer([b], thread, door), before.branch([b], door)
        async with viewing(middle, resumed):
            assert middle.view.messages[run]["content"] == before.view.messages[run]["content"]
            site.release("middle")
            await before.sees("run.completed")
            after, again = Viewer([b], thread, door), resumed.branch([b], door)
            async with viewing(after, again):
                asked, answer = await site.over(thread, before, middle, resumed, after, again)
    assert answer["content"] == COUNTED[: COUNTED.index("25")] + "🎈" + COUNTED[: COUNTED.index("25")]
    assert answer["tool_calls"][0]["result"]["value"] == 42
    assert [viewer.snapshots for viewer in (before, middle, resumed, after, again)] == [1, 1, 0, 1, 0]
