"""Two organizations on one server: one that overloads the event loop waits itself, and the other does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from agent_chat.server.limits import Limits
from agent_chat.server.organizations import member
from agent_chat.server.timing import Timing
from agent_chat.stores.contracts import EventLog, Store
from agent_chat.stores.open import Where, open_backends
from tests.support.client import Client
from tests.support.servers import Live, live_server
from tests.support.shapes import is_problem

OTHERS_KEY = "key-of-the-other-organization-here"
METRICS = {"Authorization": "Bearer a-token-of-the-operator-s-own"}
LIMITS = Limits(loop_share=0.001, loop_target=0.0, loop_burst=0.05, waiting=2)
"""So little that a debt is not paid within a test."""


@asynccontextmanager
async def two_organizations(data_dir: Path) -> AsyncIterator[tuple[Live, Client]]:
    @asynccontextmanager
    async def backends(where: Where) -> AsyncIterator[tuple[Store, EventLog]]:
        async with open_backends(where) as (store, log):
            _, user = await member(store, "Other", "u", kind="scripted", model=None, servers={})
            await store.create_key(user, OTHERS_KEY)
            yield store, log

    token = METRICS["Authorization"].removeprefix("Bearer ")
    async with live_server(data_dir, backends, LIMITS, timing=Timing(others=0.5), metrics_token=token) as live:
        other = Client(live.url, OTHERS_KEY)
        try:
            yield live, other
        finally:
            await other.http.aclose()


async def delayed(live: Live) -> float:
    text = (await live.http.get("/metrics", headers=METRICS)).text
    return float(text.partition("\nchat_requests_delayed_total ")[2].partition("\n")[0])


async def large_thread(live: Live) -> str:
    thread = await live.scripted_thread()
    for _ in range(4):
        body = {"content": "x" * 1_000_000, "content_html": "", "role": "system"}
        assert (await live.http.post(f"{thread}/messages", json=body)).status_code == 201
    return thread


async def test_large_pages_wait_or_are_refused_while_small_requests_of_another_organization_pass(
    tmp_path: Path,
) -> None:
    async with two_organizations(tmp_path) as (live, other):
        thread = await large_thread(live)
        for _ in range(5):
            assert (await live.http.get(f"{thread}/messages")).status_code == 200
        assert await delayed(live) == 0, "alone, an organization may take all of the loop"
        small = "/api/v1/agents/default"
        assert (await other.http.get(small)).status_code == 200
        pages: list[asyncio.Task[httpx.Response]] = []
        async with asyncio.timeout(20):
            while not any(page.done() and page.result().status_code == 429 for page in pages):
                pages.append(asyncio.create_task(live.http.get(f"{thread}/messages")))
                assert (await other.http.get(small)).status_code == 200
                await asyncio.sleep(0.01)
        refused = next(page.result() for page in pages if page.done() and page.result().status_code == 429)
        is_problem(refused, 429, "rate_limited")
        assert int(refused.headers["Retry-After"]) >= 1
        assert 2 <= await delayed(live) < 30
        for page in pages:
            page.cancel()
        await asyncio.wait(pages)


async def test_waiting_work_continues_once_the_other_organization_is_idle(tmp_path: Path) -> None:
    async with two_organizations(tmp_path) as (live, other):
        thread = await large_thread(live)
        assert (await other.http.get("/api/v1/agents/default")).status_code == 200
        pages = [asyncio.create_task(live.http.get(f"{thread}/messages")) for _ in range(2)]
        async with asyncio.timeout(20):
            assert [(await page).status_code for page in pages] == [200, 200]
        assert await delayed(live) > 0
