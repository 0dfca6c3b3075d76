"""Served under a prefix: every path, Location, Link, cookie, page and stream works there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from agent_chat.agents.registry import Kind
from agent_chat.server.app import create_app
from agent_chat.server.serving import Server, listening_socket
from agent_chat.server.settings import Settings
from tests.support.client import KEY, Client, frames
from tests.support.scripted import Scripted
from tests.support.servers import live_server
from tests.support.sockets import socket

PREFIX = "/chat"


class Prefixed(Client):
    """A client whose paths are behind the prefix."""

    def __init__(self, origin: str) -> None:
        super().__init__(f"{origin}{PREFIX}", KEY)
        self.origin = origin


@asynccontextmanager
async def mounted(data_dir: Path, *, lifespan: bool = True) -> AsyncIterator[Prefixed]:
    app = create_app(Settings(data_dir=data_dir, api_key=KEY, drain_seconds=0.0), kinds={"scripted": Kind(Scripted())})

    @asynccontextmanager
    async def entering(_: Starlette) -> AsyncIterator[None]:
        async with app.router.lifespan_context(app):
            yield

    outer = Starlette(routes=[Mount(PREFIX, app)], lifespan=entering if lifespan else None)
    sock = listening_socket("127.0.0.1", 0)
    server = Server(outer)
    serving = asyncio.create_task(server._serve([sock]))
    client = Prefixed(f"http://127.0.0.1:{sock.getsockname()[1]}")
    try:
        async with asyncio.timeout(10):
            await server.listening.wait()
        yield client
    finally:
        await client.http.aclose()
        server.should_exit = True  # no drain: the outer app has none
        async with asyncio.timeout(20):
            await serving


@asynccontextmanager
async def stripped(data_dir: Path) -> AsyncIterator[Prefixed]:
    """Behind a proxy: the server knows the prefix by its setting."""
    async with live_server(data_dir, root_path=PREFIX) as live:
        client = Prefixed(live.url)
        yield client
        await client.http.aclose()


@pytest.fixture(params=[mounted, stripped])
async def prefixed(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Prefixed]:
    async with request.param(tmp_path) as client:
        yield client


@pytest.mark.slow
async def test_the_api_and_its_links_are_behind_the_prefix(prefixed: Prefixed) -> None:
    http = prefixed.http
    made = await http.post("/api/v1/agents", json={"name": "Scripted", "kind": "scripted"})
    assert made.headers["Location"] == f"{PREFIX}/api/v1/agents/{made.json()['id']}"
    threads = f"/api/v1/chat/{made.json()['id']}/threads"
    for _ in range(2):
        created = await http.post(threads)
    assert created.headers["Location"] == f"{PREFIX}{threads}/{created.json()['id']}"
    listed = await http.get(threads, params={"limit": 1})
    assert listed.headers["Link"] == f'<{PREFIX}{threads}?limit=1&offset=1>; rel="next"'
    thread = f"{threads}/{created.json()['id']}"
    answer = await http.post(f"{thread}/messages", json={"content": "say hello"})
    assert answer.json()["content"] == "hello"
    assert answer.headers["Location"] == f"{PREFIX}{thread}/messages/{answer.json()['id']}"
    assert (await http.get(f"{prefixed.origin}{answer.headers['Location']}")).json() == answer.json()
    assert (await http.get(f"{prefixed.origin}{created.headers['Location']}")).status_code == 200
    wrong_method = await http.put(threads)
    assert (wrong_method.status_code, wrong_method.headers["Allow"]) == (405, "GET, HEAD, POST")


@pytest.mark.slow
async def test_streams_work_behind_the_prefix(prefixed: Prefixed) -> None:
    thread = await prefixed.scripted_thread()
    async with prefixed.posting(thread, "say hello") as response:
        assert [frame.event async for frame in frames(response)][-1] == "run.completed"
    async with socket(prefixed.origin, f"{PREFIX}{thread}") as connection:
        assert (await connection.receive())["type"] == "thread.snapshot"


@pytest.mark.slow
async def test_the_page_the_documents_and_the_probes_are_behind_the_prefix(prefixed: Prefixed) -> None:
    http = prefixed.http
    for path in ("/", "/client.js", "/docs", "/healthz", "/readyz"):
        assert (await http.get(path)).status_code == 200, path
    assert 'href="openapi.json"' in (await http.get("/docs")).text
    assert (await http.get("/openapi.json")).json()["servers"] == [{"url": PREFIX}]
    assert (await http.get("/api/v1/agents", headers={"Authorization": ""})).status_code == 401


async def test_a_proxy_may_leave_the_prefix_in_the_path(tmp_path: Path) -> None:
    async with live_server(tmp_path, root_path=PREFIX) as live:
        assert (await live.http.get(f"{PREFIX}/api/v1/agents")).status_code == 200
        assert (await live.http.get("/api/v1/agents")).status_code == 200
        to_slash = await live.http.get(f"{PREFIX}?key=a")
        assert (to_slash.status_code, to_slash.headers["Location"]) == (307, f"{PREFIX}/?key=a")
        assert (await live.http.get(f"{PREFIX}x/api/v1/agents")).status_code == 404


async def test_an_app_mounted_without_its_lifespan_reports_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with mounted(tmp_path, lifespan=False) as client:
        assert (await client.http.get("/api/v1/agents")).status_code == 500
    assert "mounted without its lifespan: enter `app.router.lifespan_context(app)`" in caplog.text


async def test_no_redirect_is_built_from_the_host_header(live_url: str) -> None:
    async with httpx.AsyncClient(base_url=live_url, headers={"Host": "evil.example"}, verify=False) as http:
        for path in ("/api/v1/agents/", "/docs/", "/x%0ay", "/%0a/", "//evil.example/%2e%2e"):
            response = await http.get(path)
            assert (response.status_code, response.headers.get("Location")) in ((401, None), (404, None)), path


@pytest.fixture
async def live_url(tmp_path: Path) -> AsyncIterator[str]:
    async with live_server(tmp_path) as live:
        yield live.url
