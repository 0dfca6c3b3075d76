"""A watcher that cannot be served now gets a `retry:` hint, since an EventSource gives up on an error status."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from agent_chat.server.limits import Limits
from agent_chat.server.timing import Timing
from tests.support.damage import without
from tests.support.servers import Live, live_server
from tests.support.shapes import is_problem

NOBODY = "00000000-0000-4000-8000-000000000000"


def is_later(answer: httpx.Response) -> None:
    assert (answer.status_code, answer.content) == (200, b"retry: 10000\n\n")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "no-cache" in answer.headers["cache-control"]


@pytest.mark.parametrize("table", ["keys", "threads"])
async def test_a_watcher_gets_a_retry_hint_while_the_database_is_unreachable(tmp_path: Path, table: str) -> None:
    async with live_server(tmp_path, timing=Timing(key_lookup=0.0)) as live:
        thread = await live.scripted_thread()
        with without(live.data_dir, table):
            is_later(await live.http.get(f"{thread}/events", headers={"Last-Event-ID": "1-0"}))
            is_problem(await live.http.get(thread), 503, "store_unavailable")
        async with live.watching(thread) as events:
            assert (await anext(events)).event == "thread.snapshot"


async def test_a_watcher_with_too_many_requests_gets_a_retry_hint(tmp_path: Path) -> None:
    async with live_server(tmp_path, limits=Limits(requests=4)) as live:
        thread = await live.scripted_thread()
        others = [await live.http.get(thread) for _ in range(9)]
        assert {answer.status_code for answer in others} >= {429}
        is_later(await live.http.get(f"{thread}/events"))


async def test_a_missing_key_or_thread_is_an_error_and_not_a_retry_hint(live: Live) -> None:
    thread = await live.scripted_thread()
    no_key = {"Authorization": "Bearer nonsense"}
    is_problem(await live.http.get(f"{thread}/events", headers=no_key), 401, "unauthenticated")
    other = thread.rpartition("/")[0] + f"/{NOBODY}/events"
    is_problem(await live.http.get(other), 404, "thread_not_found")


@pytest.mark.parametrize("form", [False, True])
async def test_a_post_that_can_not_be_streamed_is_refused_before_it_is_stored(tmp_path: Path, form: bool) -> None:
    async with live_server(tmp_path, limits=Limits(streams=1)) as live:
        thread = await live.scripted_thread()
        async with live.watching(thread) as events:
            assert (await anext(events)).event == "thread.snapshot"
            files = {"files": ("a.txt", b"x")} if form else None
            body = {"data" if form else "json": {"content": "say hello"}}
            refused = await live.http.post(f"{thread}/messages?stream=true", files=files, **body)  # type: ignore[arg-type]
            assert "open streams" in is_problem(refused, 429, "rate_limited")["detail"]
            resumed = await live.http.post(f"{thread}/messages", headers={"Last-Event-ID": "1-0"})
            is_problem(resumed, 429, "rate_limited")
            assert (await live.get(thread))["messages"] == []
            assert (await live.post(thread, "say hello")).status_code == 201
