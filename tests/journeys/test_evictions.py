"""Events that the log evicts or loses during a run: what each reader puts together is still the stored message."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest

from agent_chat.server.reading.queries import read_run_events
from agent_chat.stores.contracts import EventLog
from agent_chat.stores.embedded.log import EmbeddedLog
from agent_chat.stores.events import encode, type_of
from tests.support.chaos import Chaos
from tests.support.gates import Race, critical, id_of, no_runs
from tests.support.services import redis_url as redis_url
from tests.support.viewers import Watcher, watcher

SCRIPT = "say one\nlookup oven\nopen kettle\nhold end"


@pytest.fixture
async def race(tmp_path: Path) -> AsyncIterator[Race]:
    async with critical(tmp_path, in_memory=True) as race:
        yield race


async def lose_events(race: Race, thread: str, how: str) -> None:
    """Have the thread's log lose entries: the older half, all but the last, or all."""
    match how:
        case "half":
            race.buffer(thread).evict(keep_last=False)
        case "all but one":
            race.buffer(thread).evict(keep_last=False)
            race.buffer(thread).drop_all_but_last()
        case "all":
            await race.log.reset(id_of(thread))


async def agree(race: Race, thread: str, *watchers: Watcher) -> None:
    """Check that the watchers, which compare each terminal event with their deltas, have the stored thread."""
    await race.settled(thread, *watchers)
    stored = await race.live.get(thread)
    assert [call["error"] for call in stored["messages"][-1]["tool_calls"]] == [
        "The agent did not wait for this call."
    ] * 2
    for watching in watchers:
        assert watching.view.shows(stored)


async def published(race: Race, thread: str, run: str, event_type: str, count: int) -> None:
    """Wait until the log holds so many events of that type: in Redis they arrive a little later."""
    log = cast(EventLog, race.log)
    async with asyncio.timeout(10):
        while True:
            events = await read_run_events(log, id_of(thread), run, await log.tail(id_of(thread)))
            if sum(type_of(encode(event)) == event_type for event in events) == count:
                return
            await asyncio.sleep(0.01)


async def repair(race: Race, run: str) -> None:
    """End the run as another process would that holds its owner to be dead."""
    record = await race.record(run)
    assert record
    await race.other_process().repairer.repair(record)


async def watch(race: Race, thread: str, watching: Watcher) -> None:
    async with race.live.watching(thread) as stream:
        await watching.read(stream)


@pytest.mark.parametrize("how", ["half", "all but one", "all"])
async def test_readers_see_open_calls_closed_though_events_are_lost_between_the_last_one_and_the_end(
    race: Race, how: str
) -> None:
    thread = await race.live.scripted_thread()
    finished = race.store.hold("finish", "after")
    async with watcher(race.live, thread) as watching:
        await race.live.start_run(thread, SCRIPT)
        race.live.gates.release("end")
        await watching.sees("tool_call.started", lambda data: data["index"] == 1)
        await finished.reached()
        await lose_events(race, thread, how)
        finished.release()
        await agree(race, thread, watching)


@pytest.mark.parametrize("log", ["memory", "redis"])
async def test_readers_that_connect_after_the_log_was_lost_see_open_calls_closed(
    tmp_path: Path, log: str, request: pytest.FixtureRequest
) -> None:
    redis_url = request.getfixturevalue("redis_url") if log == "redis" else None
    async with critical(tmp_path, redis_url=redis_url, in_memory=True) as race:
        thread = await race.live.scripted_thread()
        run = await race.live.start_run(thread, SCRIPT)
        await race.live.gates.reached("end")
        finishing = race.store.hold("finish", "before")
        race.live.gates.release("end")
        await finishing.reached()
        await published(race, thread, run, "tool_call.started", 2)
        await lose_events(race, thread, "all")
        async with watcher(race.live, thread) as watching:
            finishing.release()
            await watching.sees("message.snapshot")
            await agree(race, thread, watching)


async def test_a_snapshot_that_is_read_while_events_are_evicted_has_no_gap(race: Race) -> None:
    """Entries behind its position were published before the eviction, so no `message.snapshot` precedes them."""
    thread = await race.live.scripted_thread()
    late = Watcher()
    async with asyncio.timeout(10), asyncio.TaskGroup() as group, watcher(race.live, thread) as early:
        await race.live.start_run(thread, f"count 20\nhold more\nsay more\n{SCRIPT}")
        await race.live.gates.reached("more")
        read = race.store.hold("read", "after", skip=1)
        watching = group.create_task(watch(race, thread, late))
        await read.reached()
        race.live.gates.release("more")
        await race.live.gates.reached("end")
        await lose_events(race, thread, "half")
        read.release()
        await late.sees("thread.snapshot")
        race.live.gates.release("end")
        await agree(race, thread, early, late)
        watching.cancel()


async def test_a_repair_shows_what_it_stores_though_readers_have_events_that_the_log_has_evicted(race: Race) -> None:
    thread = await race.live.scripted_thread()
    async with watcher(race.live, thread) as watching:
        run = await race.live.start_run(thread, "say one\nhold end")
        await race.live.gates.reached("end")
        await race.live.http.patch(thread, json={"title": "now the newest entry"})
        await watching.sees("thread.updated")
        await lose_events(race, thread, "all but one")
        await repair(race, run)
        assert (await watching.sees("run.failed")).data["message"]["content"] == ""
        await race.log.signal(run)
        await race.settled(thread, watching)
        assert watching.view.shows(await race.live.get(thread))


async def test_a_repair_shows_what_it_stores_though_the_owner_publishes_more_meanwhile(race: Race) -> None:
    thread = await race.live.scripted_thread()
    async with watcher(race.live, thread) as watching:
        run = await race.live.start_run(thread, "say one\nhold more\nsay two\nopen kettle\nhold end")
        await race.live.gates.reached("more")
        finishing = race.store.hold("finish", "before")
        repairing = asyncio.create_task(repair(race, run))
        await finishing.reached()
        race.live.gates.release("more")
        await watching.sees("tool_call.started")
        finishing.release()
        await repairing
        ended = (await watching.sees("run.failed")).data["message"]
        assert (ended["content"], ended["tool_calls"]) == ("one", [])
        await race.log.signal(run)
        await race.settled(thread, watching)
        assert watching.view.shows(await race.live.get(thread))


async def test_with_a_tiny_budget_every_viewer_of_random_traffic_ends_with_the_stored_thread(tmp_path: Path) -> None:
    rng = random.Random(1)
    async with critical(tmp_path, events_bytes=20_000, in_memory=True) as race, asyncio.timeout(15):
        until = asyncio.get_running_loop().time() + 0.8
        agent = (await race.live.agent())["id"]
        chaos = [Chaos(race, random.Random(rng.random()), await race.live.thread(agent), until) for _ in range(4)]
        async with asyncio.TaskGroup() as group:
            viewers = [[group.create_task(each.viewer()) for _ in range(3)] for each in chaos]
            async with asyncio.TaskGroup() as busy:
                for each in chaos:
                    busy.create_task(each.poster())
                    busy.create_task(each.canceller())
            await no_runs()
            for each in chaos:
                await race.live.http.patch(each.thread, json={"title": "over"})
        for each, views in zip(chaos, viewers, strict=True):
            stored = {message["id"]: message for message in await race.live.get(f"{each.thread}/messages", limit=100)}
            for view in (viewer.result() for viewer in views):
                assert view.messages == {message_id: stored[message_id] for message_id in view.messages}
        assert cast(EmbeddedLog, race.log.real).budget.evictions > 10
