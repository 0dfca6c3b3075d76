"""Two processes, one thread: what runs on A is watched, resumed, cancelled and deleted on B as if it ran there."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.client import frames
from tests.support.shapes import is_problem
from tests.support.site import Site
from tests.support.sockets import socket
from tests.support.thread_view import status
from tests.support.viewers import DOORS, Door, Viewer, viewing

COUNTED = "".join(f"{n} " for n in range(25))


@pytest.mark.parametrize("door", DOORS)
async def test_a_run_on_one_is_watched_on_the_other_from_before_the_middle_and_after(site: Site, door: Door) -> None:
    a, b = await site.pair()
    thread = await a.scripted_thread(mcp_servers=["demo"])
    before = Viewer([b], thread, door)
    async with viewing(before):
        script = 'think hm\ncount 25 2\nhold middle\ntool calculate {"expression": "6*7"}\nsay 🎈\ncount 25 2'
        run = await a.start_run(thread, script)
        await before.reads(run, "24 ")
        await site.gates.reached("middle")
        middle, resumed = Viewer([b], thread, door), before.branch([b], door)
        async with viewing(middle, resumed):
            assert middle.view.messages[run]["content"] == before.view.messages[run]["content"]
            site.gates.release("middle")
            await before.sees("run.completed")
            after, again = Viewer([b], thread, door), resumed.branch([b], door)
            async with viewing(after, again):
                _, answer = await site.over(thread, before, middle, resumed, after, again)
    assert answer["content"] == f"{COUNTED}\n\n🎈{COUNTED}"
    assert answer["tool_calls"][0]["result"]["value"] == 42
    assert [viewer.snapshots for viewer in (before, middle, resumed, after, again)] == [1, 1, 0, 1, 0]


async def test_the_stream_of_a_post_on_one_is_resumed_on_the_other_at_every_position(site: Site) -> None:
    a, b = await site.pair()
    thread = await a.scripted_thread()
    whole = await a.streamed(thread, "say one\nopen oven\ncount 8 5")
    assert [frame.event for frame in whole][-1] == "run.completed"
    for n, frame in enumerate(whole):
        position = {"Last-Event-ID": frame.id}
        async with b.http.stream("POST", f"{thread}/messages", headers=position) as rest:
            assert rest.status_code == 200
            assert [each.raw for each in [f async for f in frames(rest)]] == [each.raw for each in whole[n + 1 :]]
    await site.over(thread)


@pytest.mark.parametrize("door", DOORS)
async def test_a_run_on_one_is_cancelled_on_the_other_with_all_its_text(site: Site, door: Door) -> None:
    a, b = await site.pair(TEST_CHECKPOINT="60")
    thread = await a.scripted_thread()
    viewers = [Viewer([server], thread, door) for server in (a, b)]
    async with viewing(*viewers):
        run = await a.start_run(thread, "count 30 1\nopen oven\nhold for ever")
        await viewers[1].sees("tool_call.started")
        began = asyncio.get_running_loop().time()
        if door == "sse":
            answer = await b.cancel(thread, run)
            assert answer.status_code == 200
            kept = answer.json()
        else:
            async with socket(b.url, thread, after=viewers[1].position) as connection:
                await connection.send(type="run.cancel", request_id="c", message_id=run)
                told = await connection.until("ack", "run.cancelled")
                if {"ack", "run.cancelled"} - {frame["type"] for frame in told}:  # they come by different ways
                    told += await connection.until("ack", "run.cancelled")
                kept = next(frame["message"] for frame in told if frame["type"] == "run.cancelled")
        assert asyncio.get_running_loop().time() - began < 1.5, "told by signal, not found at the next checkpoint"
        assert (status(kept), kept["content"]) == ("cancelled", "".join(f"{n} " for n in range(30)))
        assert kept["tool_calls"][0]["error"]
        assert (await site.over(thread, *viewers))[-1] == kept


async def test_a_thread_that_is_busy_on_one_is_busy_on_the_other_unless_interrupted(site: Site) -> None:
    a, b = await site.pair()
    thread = await a.scripted_thread()
    viewers = [Viewer([server], thread, "sse") for server in (a, b)]
    async with viewing(*viewers):
        run = await a.start_run(thread, "say half\nhold for ever")
        await viewers[1].reads(run, "half")
        busy = is_problem(await b.post(thread, "say no"), 409, "thread_busy", "message_id")
        assert busy["message_id"] == run
        instead = await b.post(thread, "say instead", query="?if_busy=interrupt")
        assert (instead.status_code, instead.json()["content"]) == (201, "instead")
        messages = await site.over(thread, *viewers)
    assert [(message["content"], status(message)) for message in messages if status(message)] == [
        ("half", "cancelled"),
        ("instead", "completed"),
    ]


async def test_a_post_retried_on_the_other_joins_the_run_in_every_form(site: Site) -> None:
    a, b = await site.pair()
    thread = await a.scripted_thread()
    script, key = "say half\nhold on\nsay whole", {"Idempotency-Key": "k"}
    run = await a.start_run(thread, script, **key)
    await site.gates.reached("on")
    joined = await b.post(thread, script, Prefer="respond-async", **key)
    assert (joined.status_code, joined.json()["id"], joined.headers["idempotency-replayed"]) == (202, run, "true")
    is_problem(await b.post(thread, "say something else", **key), 422, "idempotency_mismatch")
    waiting = asyncio.create_task(b.post(thread, script, **key))
    async with b.posting(thread, script, **key) as posting:
        assert posting.headers["idempotency-replayed"] == "true"
        stream = frames(posting)
        seen = [await anext(stream)]
        site.gates.release("on")
        seen += [frame async for frame in stream]
    assert [frame.event for frame in seen[:2]] == ["message.created", "run.started"]
    assert seen[-1].event == "run.completed"
    assert (await waiting).json() == seen[-1].data["message"]
    assert (await b.post(thread, script, **key)).json() == seen[-1].data["message"]
    assert len(await site.over(thread)) == 2


@pytest.mark.parametrize("door", DOORS)
async def test_deleting_on_one_stops_the_run_of_the_other_and_ends_every_viewer(site: Site, door: Door) -> None:
    a, b = await site.pair()
    thread = await a.scripted_thread()
    viewers = [Viewer([server], thread, door) for server in (a, b)]
    async with viewing(*viewers):
        run = await a.start_run(thread, "say half\nhold here\nsay too late")
        await viewers[1].reads(run, "half")
        assert (await b.http.delete(thread)).status_code == 204
        for viewer in viewers:
            await viewer.sees("thread.deleted")
        await a.metric_becomes("chat_runs_in_progress", 0)
        site.gates.release("here")
    assert [frame.event for frame in viewers[0].frames][-1] == "thread.deleted"
    assert (await a.http.get(thread)).status_code == 404
    assert [entry.event["type"] for entry in await site.log(thread)][-1] == "thread.deleted"
    await site.quiet(thread)
