"""A dies, is paused, or stops: B finishes what is left, and whoever looks on can tell only that it took a while.

Leases last two seconds here, not twenty.
"""

from __future__ import annotations

import asyncio
import signal
import time
from typing import Any

import httpx
import pytest

from tests.journeys.viewing import status
from tests.processes.site import Site
from tests.processes.viewers import DOORS, Viewer, viewing

TALKING = "count 100000 1"
WITHIN_SECONDS = 8.0
"""Two leases, as 40 seconds are of 20, and as much again for a machine with other things to do."""


def open_viewers(site: Site, thread: str) -> list[Viewer]:
    """Two on B, by each door, and two that were on A and come to B when it is gone."""
    a, b = site.servers
    return [Viewer(servers, thread, door) for servers in ([b], [a, b]) for door in DOORS]


@pytest.mark.parametrize("script", ["say half\nhold on", "say half\nopen oven\nhold on"], ids=["run", "tool"])
async def test_after_a_kill_the_other_keeps_the_partial_and_ends_every_viewer(hasty_site: Site, script: str) -> None:
    site = hasty_site
    a, _ = await site.pair()
    thread = await a.scripted_thread()
    viewers = open_viewers(site, thread)
    async with viewing(*viewers):
        run = await a.begin(thread, script)
        await site.reached("on")
        for viewer in viewers:
            await viewer.reads(run, "half")
        await a.kill()
        began = time.monotonic()
        for viewer in viewers:
            ending = await viewer.sees("run.failed")
            assert (ending.data["error"]["code"], ending.data["error"]["retryable"]) == ("interrupted", True)
        assert time.monotonic() - began < WITHIN_SECONDS
        messages = await site.over(thread, *viewers)
    kept = next(message for message in messages if message["id"] == run)
    assert (kept["content"], status(kept)) == ("half", "failed")
    for call in kept["tool_calls"]:
        assert call["error"]
        assert call["end_time"]


@pytest.mark.parametrize(
    ("dies", "ends", "text"),
    [
        ("after claim", "failed", ""),
        ("before finish", "failed", "whole"),
        ("after finish", "completed", "whole"),
        ("before forget", "completed", "whole"),
    ],
)
async def test_a_death_between_two_steps_of_the_store_leaves_one_end_that_is_told_once(
    hasty_site: Site, dies: str, ends: str, text: str
) -> None:
    site = hasty_site
    a, b = await site.pair(CHAT_TEST_DIES=dies)
    thread = await b.scripted_thread()
    viewers = open_viewers(site, thread)
    script, key = "say whole\nhold on", {"Idempotency-Key": "k"}
    async with viewing(*viewers):
        posting = asyncio.create_task(a.post(thread, script, **key))
        if text:
            for viewer in viewers:
                await viewer.sees("message.delta")
        site.release("on")
        with pytest.raises(httpx.TransportError):
            await posting
        await a.ended()
        for viewer in viewers:
            ending = await viewer.sees(f"run.{ends}")
            assert ending.data["message"]["content"] == text
        retried = await b.post(thread, script, **key)
        assert (retried.status_code, retried.json()["content"]) == (201, "whole")
        messages = await site.over(thread, *viewers)
    asked = [message for message in messages if message["role"] == "user"]
    assert len(asked) == 1, "the retry runs again on the same user message, or is answered"
    assert [status(message) for message in messages[1:]] == (["failed", "completed"] if ends == "failed" else [ends])


@pytest.mark.parametrize("script", ["say half\nhold on\nsay too late", TALKING], ids=["silent", "talking"])
async def test_a_process_that_was_paused_past_its_lease_says_and_changes_nothing(hasty_site: Site, script: str) -> None:
    site = hasty_site
    a, b = await site.pair()
    thread = await a.scripted_thread()
    viewers = [Viewer([b], thread, door) for door in DOORS]
    async with viewing(*viewers):
        run = await a.begin(thread, script)
        for viewer in viewers:
            await viewer.reads(run, "half" if "half" in script else "99 ")
        a.signal(signal.SIGSTOP)
        for viewer in viewers:
            await viewer.sees("run.failed")
        stored = await b.get(f"{thread}/messages/{run}")
        told = await site.log(thread)
        site.release("on")
        a.signal(signal.SIGCONT)
        await a.comes_to("chat_runs_in_progress", 0)
        said = [entry.event for entry in (await site.log(thread))[len(told) :]]
        if script == TALKING:  # but for the append that it was about to send when it was paused: viewers pass it over
            assert {event["type"] for event in said} <= {"message.delta"}
        else:
            assert said == []
        assert await a.get(f"{thread}/messages/{run}") == stored
        assert await a.number('chat_runs_ended_total{status="completed"}') == 0
        messages = await site.over(thread, *viewers)
    assert messages[-1] == stored


async def test_a_gentle_stop_under_fifty_runs_keeps_all_and_viewers_get_the_rest_elsewhere(site: Site) -> None:
    a, b = await site.pair(CHAT_DRAIN_SECONDS="2")
    agent = (await b.agent())["id"]
    threads = [await b.thread(agent) for _ in range(50)]
    ending, endless = threads[:25], threads[25:]
    viewers = [Viewer([a, b], thread, DOORS[n % 2]) for n, thread in enumerate(threads)]
    async with viewing(*viewers):
        scripts = dict.fromkeys(ending, "count 100 5\nopen oven\nsay done")
        scripts |= dict.fromkeys(endless, "say half\nopen oven\nhold for ever")
        runs = await asyncio.gather(*[a.begin(thread, scripts[thread]) for thread in threads])
        for viewer in viewers:
            await viewer.sees("message.delta")
        a.signal(signal.SIGTERM)
        for viewer in viewers[::2]:  # these leave in mid-run, and come to B
            viewer.cut()
        async with asyncio.timeout(15):
            await a.ended()
        for thread, run, viewer in zip(threads, runs, viewers, strict=True):
            messages = await site.over(thread, viewer)
            kept = next(message for message in messages if message["id"] == run)
            _is_kept(kept, completed=thread in ending)
            assert viewer.snapshots == 1, "all the rest was told by position"
    assert {viewer.connections > 1 for viewer in viewers} == {True}


def _is_kept(message: dict[str, Any], *, completed: bool) -> None:
    if completed:
        assert (status(message), message["content"][-4:]) == ("completed", "done")
    else:
        assert (status(message), message["content"]) == ("failed", "half")
        assert message["metadata"]["run"]["error"]["code"] == "interrupted"
    assert message["tool_calls"][0]["error"]
