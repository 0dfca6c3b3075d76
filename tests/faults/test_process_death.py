"""A dies, is paused, or stops: B ends its runs, and viewers notice nothing but a delay.

Leases last two seconds here, not twenty, and several runs share a death, to wait for them once.
"""

from __future__ import annotations

import asyncio
import signal
import time
from typing import Any, NamedTuple

import httpx
import pytest

from tests.support.servers import Process
from tests.support.site import Site
from tests.support.thread_view import status
from tests.support.viewers import DOORS, Viewer, viewing

LEASE_SECONDS = 2.0
ALLOWANCE_SECONDS = 3.0
"""For a busy machine, regardless of the lease."""


def open_viewers(first: Process, other: Process, thread: str) -> list[Viewer]:
    """Over each transport, one on the other server, and one on the first that reconnects to the other."""
    return [Viewer(servers, thread, door) for servers in ([other], [first, other]) for door in DOORS]


async def end(viewers: list[Viewer], how: str, since: float) -> list[dict[str, Any]]:
    """The terminal events that they see, at most two leases after the process has ended."""
    ends = [(await viewer.sees(how)).data for viewer in viewers]
    assert time.monotonic() - since < 2 * LEASE_SECONDS + ALLOWANCE_SECONDS
    return ends


async def test_after_a_kill_the_other_process_stores_the_partial_answers_and_ends_the_runs(
    hasty_site: Site,
) -> None:
    """Of a run that writes text, of one with an open call, and of one whose tool is working."""
    site = hasty_site
    a, b = await site.pair()
    agent = (await a.agent(mcp_servers=["demo"]))["id"]
    works = 'tool slow_task {"seconds": 60, "steps": 600}'
    scripts = {await a.thread(agent): f"say half\n{then}" for then in ("hold run", "open oven\nhold call", works)}
    _, opening, working = scripts
    viewers = {thread: open_viewers(a, b, thread) for thread in scripts}
    async with viewing(*[viewer for some in viewers.values() for viewer in some]):
        runs = {thread: await a.start_run(thread, script) for thread, script in scripts.items()}
        for thread, run in runs.items():
            for viewer in viewers[thread]:
                await viewer.reads(run, "half")
        await site.gates.reached("run")
        await site.gates.reached("call")
        for viewer in viewers[working]:
            await viewer.sees("tool_call.progress")
        await a.kill()
        gone = time.monotonic()
        for thread, some in viewers.items():
            for ending in await end(some, "run.failed", gone):
                assert (ending["error"]["code"], ending["error"]["retryable"]) == ("interrupted", thread != opening)
        called = [await _kept(site, thread, run, viewers[thread]) for thread, run in runs.items()]
    assert called == [[], ["oven"], ["slow_task"]]


async def _kept(site: Site, thread: str, run: str, viewers: list[Viewer]) -> list[str]:
    """The tools that were called in the half answer; each has an error and an end."""
    messages = await site.over(thread, *viewers)
    kept = next(message for message in messages if message["id"] == run)
    assert (kept["content"], status(kept)) == ("half", "failed")
    assert all(call["error"] and call["end_time"] for call in kept["tool_calls"])
    return [call["tool_name"] for call in kept["tool_calls"]]


class Death(NamedTuple):
    at: str
    ends: str
    text: str
    opens: str = ""


DEATHS = [
    Death("after claim", "failed", ""),
    Death("before finish", "failed", "whole"),
    Death("after finish", "completed", "whole"),
    Death("after finish", "completed", "whole", "\nopen oven"),
    Death("before delete_record", "completed", "whole"),
]


async def test_a_death_between_two_steps_of_the_store_leaves_one_terminal_event(hasty_site: Site) -> None:
    site = hasty_site
    dying = [await site.server(start=False, TEST_DIES=death.at) for death in DEATHS]
    b = await site.server(start=False)
    await asyncio.gather(*[server.start() for server in site.servers])
    agent = (await b.agent())["id"]
    threads = [await b.thread(agent) for _ in DEATHS]
    viewers = [open_viewers(a, b, thread) for a, thread in zip(dying, threads, strict=True)]
    async with viewing(*[viewer for some in viewers for viewer in some]):
        async with asyncio.TaskGroup() as group:
            for each in zip(DEATHS, dying, threads, viewers, strict=True):
                group.create_task(_die(site, *each))
        for death, thread, some in zip(DEATHS, threads, viewers, strict=True):
            messages = await site.over(thread, *some)
            asked = [message for message in messages if message["role"] == "user"]
            assert len(asked) == 1, "the retry runs again on the same user message, or is answered"
            ends = ["failed", "completed"] if death.ends == "failed" else [death.ends]
            assert [status(message) for message in messages[1:]] == ends


async def _die(site: Site, death: Death, a: Process, thread: str, viewers: list[Viewer]) -> None:
    """Post to the server that dies of it, see the terminal event on the other, and repeat the post there."""
    gate, key, b = death.at.replace(" ", "-"), {"Idempotency-Key": "k"}, site.servers[-1]
    script = f"say whole{death.opens}\nhold {gate}"
    posting = asyncio.create_task(a.post(thread, script, **key))
    if death.text:
        for viewer in viewers:
            await viewer.sees("message.delta")
    site.gates.release(gate)
    with pytest.raises(httpx.TransportError):
        await posting
    await a.ended()
    for ending in await end(viewers, f"run.{death.ends}", time.monotonic()):
        assert ending["message"]["content"] == death.text
    retried = await b.post(thread, script, **key)
    assert (retried.status_code, retried.json()["content"]) == (201, "whole")


async def test_a_process_that_was_paused_beyond_its_lease_publishes_and_changes_nothing(hasty_site: Site) -> None:
    """Of a run that was silent, nor of one that was talking."""
    site = hasty_site
    a, b = await site.pair()
    agent = (await a.agent())["id"]
    silent, talking = await a.thread(agent), await a.thread(agent)
    scripts = {silent: ("say half\nhold on\nsay too late", "half"), talking: ("count 100000 1", "99 ")}
    viewers = {thread: [Viewer([b], thread, door) for door in DOORS] for thread in scripts}
    async with viewing(*viewers[silent], *viewers[talking]):
        runs = {thread: await a.start_run(thread, script) for thread, (script, _) in scripts.items()}
        for thread, (_, text) in scripts.items():
            for viewer in viewers[thread]:
                await viewer.reads(runs[thread], text)
        a.signal(signal.SIGSTOP)
        paused = time.monotonic()
        for some in viewers.values():
            await end(some, "run.failed", paused)
        stored = {thread: await b.get(f"{thread}/messages/{run}") for thread, run in runs.items()}
        told = {thread: len(await site.log(thread)) for thread in runs}
        site.gates.release("on")
        a.signal(signal.SIGCONT)
        await a.metric_becomes("chat_runs_in_progress", 0)
        said = {thread: {entry.event["type"] for entry in (await site.log(thread))[told[thread] :]} for thread in runs}
        assert said == {silent: set(), talking: set()}
        assert {thread: await a.get(f"{thread}/messages/{run}") for thread, run in runs.items()} == stored
        assert await a.metric('chat_runs_ended_total{status="completed"}') == 0
        for thread, some in viewers.items():
            assert (await site.over(thread, *some))[-1] == stored[thread]


async def test_a_graceful_stop_of_fifty_runs_loses_nothing_and_viewers_continue_elsewhere(
    site: Site,
) -> None:
    a, b = await site.pair(CHAT_DRAIN_SECONDS="3")
    agent = (await b.agent())["id"]
    threads = await asyncio.gather(*[b.thread(agent) for _ in range(50)])
    scripts = ["say half\nopen oven\nhold drain\ncount 20 5\nsay done", "say half\nopen oven\nhold for ever"]
    viewers = [Viewer([a, b], thread, DOORS[n % 2]) for n, thread in enumerate(threads)]
    async with viewing(*viewers):
        runs = await asyncio.gather(*[a.start_run(thread, scripts[n // 25]) for n, thread in enumerate(threads)])
        for viewer in viewers:
            await viewer.sees("tool_call.started")
        a.signal(signal.SIGTERM)
        await a.draining()
        for n, viewer in enumerate(viewers):
            if n % 4 in (0, 1):  # these leave in mid-run, half of each door, and come to B
                viewer.cut()
        site.gates.release("drain")
        async with asyncio.timeout(15):
            await a.ended()
        checked = await asyncio.gather(
            *[site.over(thread, viewer) for thread, viewer in zip(threads, viewers, strict=True)]
        )
    for n, (run, viewer, messages) in enumerate(zip(runs, viewers, checked, strict=True)):
        kept = next(message for message in messages if message["id"] == run)
        _is_kept(kept, completed=n < 25)
        assert viewer.snapshots == 1, "all the rest was told by position"
        assert viewer.connections > 1


def _is_kept(message: dict[str, Any], *, completed: bool) -> None:
    if completed:
        assert (status(message), message["content"][-4:]) == ("completed", "done")
    else:
        assert (status(message), message["content"]) == ("failed", "half")
        assert message["metadata"]["run"]["error"]["code"] == "interrupted"
    assert message["tool_calls"][0]["error"]
