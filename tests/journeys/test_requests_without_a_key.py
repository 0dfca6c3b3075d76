"""Clients without a valid key or under another name: what they get, and what every response carries."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from agent_chat.server.limits import Limits
from agent_chat.server.timing import Timing
from tests.support.client import KEY
from tests.support.servers import Live, live_server
from tests.support.shapes import is_problem
from tests.support.sockets import socket

TOKEN = "a-token-of-the-operator-s-own"
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


@pytest.fixture
async def live(tmp_path: Path) -> AsyncIterator[Live]:
    limits = Limits(auth_failures=5)
    async with live_server(tmp_path, limits=limits, hosts=LOOPBACK, metrics_token=TOKEN) as live:
        yield live


async def test_wrong_keys_are_limited_per_address_and_valid_ones_still_work(
    live: Live, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = {"Authorization": "Bearer wrong"}
    statuses = [(await live.http.get("/api/v1/agents", headers=wrong)).status_code for _ in range(9)]
    assert statuses == [401] * 5 + [429] * 4
    refused = await live.http.get("/api/v1/agents", headers=wrong)
    is_problem(refused, 429, "rate_limited")
    assert 0 < int(refused.headers["Retry-After"]) <= 60
    assert (await live.http.get("/?key=wrong", headers={**wrong, "Sec-Fetch-Site": "none"})).status_code == 429
    watching = await live.http.get("/api/v1/chat/default/threads/x/events", headers=wrong)
    assert watching.status_code == 429
    assert (await live.http.get("/api/v1/agents")).status_code == 200
    elsewhere = {**wrong, "X-Forwarded-For": "203.0.113.9"}
    assert (await live.http.get("/api/v1/agents", headers=elsewhere)).status_code == 401
    ended = {"Cookie": f"chat_session_{live.url.rpartition(':')[2]}=ended"}
    async with httpx.AsyncClient(base_url=live.url, verify=False) as http:
        assert (await http.get("/api/v1/agents", headers=ended)).status_code == 401
    logged = [record for record in caplog.records if record.name == "chat.security"]
    ours = [record for record in logged if record.__dict__["address"] == "127.0.0.1"]
    assert [record.getMessage() for record in ours] == ["authentication failed"] * 5 + [
        "authentication failed too often; further failures are not logged"
    ]
    assert "wrong" not in caplog.text
    metrics = await live.http.get("/metrics", headers={"Authorization": f"Bearer {TOKEN}"})
    assert "chat_auth_failures_total 14.0" in metrics.text


async def test_wrong_keys_of_an_address_that_sent_too_many_are_refused_late(tmp_path: Path) -> None:
    async with live_server(tmp_path, limits=Limits(auth_failures=3), timing=Timing(auth_delay=0.5)) as live:
        wrong = {"Authorization": "Bearer wrong"}

        async def guess(count: int) -> list[int]:
            return [(await live.http.get("/api/v1/agents", headers=wrong)).status_code for _ in range(count)]

        assert await guess(3) == [401] * 3
        late = asyncio.create_task(guess(1))
        began = time.monotonic()
        assert (await live.http.get("/api/v1/agents")).status_code == 200
        assert not late.done(), "a valid key from the same address is not held up"
        assert await late == [429]
        assert time.monotonic() - began > 0.4


async def test_requests_for_other_hosts_are_refused(live: Live) -> None:
    port = live.url.rpartition(":")[2]
    for host in ("localhost", f"localhost:{port}", "127.0.0.1", f"[::1]:{port}", "LOCALHOST"):
        assert (await live.http.get("/api/v1/agents", headers={"Host": host})).status_code == 200, host
    for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "", "127.0.0.1@evil.example"):
        for path in ("/api/v1/agents", "/", "/docs"):
            is_problem(await live.http.get(path, headers={"Host": host}), 400, "unknown_host")
        assert (await live.http.get("/healthz", headers={"Host": host})).status_code == 200
    thread = await live.scripted_thread()
    async with socket(live.url, thread) as connection:
        assert (await connection.receive())["type"] == "thread.snapshot"
    with pytest.raises(Exception, match="403"):
        async with socket(f"http://evil.example:{port}", thread, host="127.0.0.1", port=int(port)) as connection:
            await connection.receive()


async def test_metrics_need_the_operators_token(live: Live, tmp_path_factory: pytest.TempPathFactory) -> None:
    is_problem(await live.http.get("/metrics"), 401, "unauthenticated")
    async with httpx.AsyncClient(base_url=live.url, verify=False) as http:
        is_problem(await http.get("/metrics"), 401, "unauthenticated")
    answer = await live.http.get("/metrics", headers={"Authorization": f"Bearer {TOKEN}"})
    assert (answer.status_code, "chat_runs_in_progress" in answer.text) == (200, True)
    is_problem(
        await live.http.get("/api/v1/agents", headers={"Authorization": f"Bearer {TOKEN}"}), 401, "unauthenticated"
    )
    async with live_server(tmp_path_factory.mktemp("other")) as other:
        is_problem(await other.http.get("/metrics"), 404, "not_found")


async def test_every_response_has_the_safe_headers_and_no_banner(live: Live) -> None:
    thread = await live.scripted_thread()
    upload = await live.http.post(f"{thread}/attachments", files={"files": ("a.txt", b"text")})
    download = f"{thread}/attachments/{upload.json()[0]['id']}"
    typed = {"Sec-Fetch-Site": "none"}
    for path in ("/", "/client.js", "/docs", "/openapi.json", "/healthz", "/metrics", "/nothing", f"/?key={KEY}",
                 "/api/v1/agents", f"{thread}/messages", download, "/api/v1/chat/conversations"):  # fmt: skip
        response = await live.http.get(path, headers=typed)
        headers = response.headers
        assert headers["X-Content-Type-Options"] == "nosniff", path
        assert "Server" not in headers, path
        assert "Cache-Control" in headers, path
        policy = headers.get_list("Content-Security-Policy")
        assert len(policy) == 1, path
        assert "base-uri 'none'" in policy[0] or path == download, path
    for path in ("/api/v1/agents", f"{thread}/messages", "/nothing"):
        assert (await live.http.get(path)).headers.get_list("Cache-Control") == ["no-store"], path
    assert (await live.http.put("/api/v1/agents")).headers["Cache-Control"] == "no-store"
