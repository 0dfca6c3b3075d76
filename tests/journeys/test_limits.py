"""The limits of one organization in one process."""

from __future__ import annotations

import asyncio
from pathlib import Path

from agent_chat.server.limits import Limits
from tests.support.servers import live_server
from tests.support.shapes import is_problem
from tests.support.sockets import socket


async def test_too_many_requests_a_minute_get_429_with_retry_after(tmp_path: Path) -> None:
    async with live_server(tmp_path, limits=Limits(requests=3)) as live:
        answers = [await live.http.get("/api/v1/agents") for _ in range(5)]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused  # one at least, should the minute turn in between
        assert refused[0].json()["code"] == "rate_limited"
        assert 1 <= int(refused[0].headers["Retry-After"]) <= 60
        assert (await live.http.get("/healthz")).status_code == 200


async def test_a_run_too_many_is_refused_and_a_replay_is_not(tmp_path: Path) -> None:
    async with live_server(tmp_path, limits=Limits(runs=1)) as live:
        agent = (await live.agent())["id"]
        first, second = await live.thread(agent), await live.thread(agent)
        asking = asyncio.create_task(live.post(first, "hold it", **{"Idempotency-Key": "k"}))
        await live.gates.reached("it")
        refused = await live.post(second, "say hi")
        assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
        assert refused.headers["Retry-After"]
        joining = asyncio.create_task(live.post(first, "hold it", **{"Idempotency-Key": "k"}))
        live.gates.release("it")
        assert (await joining).json()["id"] == (await asking).json()["id"]
        assert (await live.post(second, "say hi")).status_code == 201


async def test_concurrent_posts_start_no_more_runs_than_the_limit(tmp_path: Path) -> None:
    async with live_server(tmp_path, limits=Limits(runs=2)) as live:
        agent = (await live.agent())["id"]
        threads = [await live.thread(agent) for _ in range(12)]
        later = {"Prefer": "respond-async"}
        answers = await asyncio.gather(*[live.post(thread, "hold it", **later) for thread in threads])
        assert sorted(answer.status_code for answer in answers) == [202] * 2 + [429] * 10
        live.gates.release("it")


async def test_a_refused_claim_releases_its_slot(tmp_path: Path) -> None:
    async with live_server(tmp_path, limits=Limits(runs=2)) as live:
        thread = await live.scripted_thread()
        await live.post(thread, "hold it", Prefer="respond-async")
        for _ in range(3):
            assert (await live.post(thread, "say x")).json()["code"] == "thread_busy"
        other = await live.scripted_thread()
        assert (await live.post(other, "say x")).status_code == 201
        live.gates.release("it")


async def test_concurrent_streams_are_no_more_than_the_limit(tmp_path: Path) -> None:
    async with live_server(tmp_path, limits=Limits(streams=2)) as live:
        agent = (await live.agent())["id"]
        threads = [await live.thread(agent) for _ in range(12)]
        statuses: list[int] = []
        all_answered = asyncio.Event()

        async def opens(thread: str) -> None:
            async with live.posting(thread, "hold it") as response:
                statuses.append(response.status_code)
                if len(statuses) == len(threads):
                    all_answered.set()
                await all_answered.wait()

        async with asyncio.timeout(10):
            await asyncio.gather(*map(opens, threads))
        assert sorted(statuses) == [200] * 2 + [429] * 10
        live.gates.release("it")


async def test_streams_that_fail_to_open_release_their_slots(tmp_path: Path) -> None:
    async with live_server(tmp_path, limits=Limits(streams=1)) as live:
        thread = await live.scripted_thread()
        for _ in range(3):
            assert (await live.http.get(f"{thread[:-1]}x/events")).status_code == 404
            assert (await live.http.head(f"{thread}/events")).status_code == 200
        assert len(await live.streamed(thread, "say x")) == 4
        async with live.watching(thread) as events:
            assert (await anext(events)).event == "thread.snapshot"


async def test_a_stream_too_many_is_ended_politely(tmp_path: Path) -> None:
    async with live_server(tmp_path, limits=Limits(streams=1)) as live:
        thread = await live.scripted_thread()
        async with live.watching(thread) as events:
            assert (await anext(events)).event == "thread.snapshot"
            second = await live.http.get(f"{thread}/events")
            assert (second.status_code, second.content) == (200, b"retry: 10000\n\n")
            async with socket(live.url, thread) as connection, asyncio.timeout(10):
                await connection.connection.wait_closed()
            assert connection.connection.close_code == 1013


async def test_what_an_organization_stores_is_limited_until_it_makes_room(tmp_path: Path) -> None:
    async with live_server(tmp_path, limits=Limits(stored_bytes=100_000)) as live:
        agent = (await live.agent())["id"]
        first, second = await live.thread(agent), await live.thread(agent)
        large, small = [("files", ("large.bin", b"\0" * 60_000))], [("files", ("small.bin", b"\0" * 20_000))]
        assert (await live.http.post(f"{first}/attachments", files=large)).status_code == 201
        for path, data in (("attachments", None), ("messages", {"content": "say x"})):
            is_problem(await live.http.post(f"{second}/{path}", data=data, files=large), 507, "storage_full")
        assert (await live.get(second))["messages"] == []
        assert (await live.http.post(f"{second}/attachments", files=small)).status_code == 201
        assert (await live.http.delete(first)).status_code == 204
        assert (await live.http.post(f"{second}/attachments", files=large)).status_code == 201


async def test_messages_count_and_are_refused_beyond_the_limit(tmp_path: Path) -> None:
    async with live_server(tmp_path, limits=Limits(stored_bytes=100_000)) as live:
        thread = await live.scripted_thread()
        body = {"content": "x" * 9_000, "content_html": "", "role": "system"}
        statuses = [(await live.http.post(f"{thread}/messages", json=body)).status_code for _ in range(12)]
        assert statuses == sorted(statuses)
        assert 8 <= statuses.count(201) <= 10
        refused = await live.http.post("/api/v1/agents", json={"name": "x", "instructions": "x" * 20_000})
        is_problem(refused, 507, "storage_full")
        await live.http.delete(thread)
        assert (await live.http.post(f"{await live.thread()}/messages", json=body)).status_code == 201


async def test_concurrent_uploads_never_exceed_the_storage_limit_together(tmp_path: Path) -> None:
    async with live_server(tmp_path, limits=Limits(stored_bytes=100_000)) as live:
        thread = await live.scripted_thread()
        file = [("files", ("a.bin", b"\0" * 30_000))]
        answers = await asyncio.gather(*[live.http.post(f"{thread}/attachments", files=file) for _ in range(8)])
        assert sorted(answer.status_code for answer in answers) == [201] * 3 + [507] * 5
