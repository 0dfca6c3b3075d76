"""Signing in and out: what the cookie is, who may start or replace a session, and what ends it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from agent_chat.server.timing import Timing
from agent_chat.stores.contracts import EventLog, Store
from agent_chat.stores.open import Where, open_backends
from tests.support.client import KEY, frames
from tests.support.servers import Live, live_server
from tests.support.shapes import is_problem
from tests.support.sockets import socket

TYPED = {"Sec-Fetch-Site": "none", "Sec-Fetch-Dest": "document", "Sec-Fetch-Mode": "navigate"}
SOON = Timing(ping=0.05, key_lookup=0.0)


@pytest.fixture(scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Live, Store]]:
    """A server, and the store that it has open."""
    opened: list[Store] = []

    @asynccontextmanager
    async def backends(where: Where) -> AsyncIterator[tuple[Store, EventLog]]:
        async with open_backends(where) as (store, log):
            opened.append(store)
            yield store, log

    async with live_server(tmp_path_factory.mktemp("data"), backends, timing=SOON) as live:
        yield live, opened[0]


@pytest.fixture(scope="module")
def live(world: tuple[Live, Store]) -> Live:
    return world[0]


@pytest.fixture
async def browser(live: Live) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=live.url, timeout=20, verify=False) as http:
        yield http


async def sign_in(browser: httpx.AsyncClient, key: str = KEY) -> httpx.Response:
    response = await browser.get("/", params={"key": key}, headers=TYPED)
    assert response.status_code == 303
    return response


async def test_the_cookie_is_a_session_and_not_the_key(live: Live, browser: httpx.AsyncClient) -> None:
    response = await sign_in(browser)
    cookie = response.headers["Set-Cookie"]
    port = live.url.rpartition(":")[2]
    assert cookie.startswith(f"chat_session_{port}=")
    for attribute in ("HttpOnly", "SameSite=strict", "Path=/", "Max-Age=2592000"):
        assert attribute.lower() in cookie.lower()
    assert KEY not in cookie
    assert response.headers["Location"] == "/"
    assert (await browser.get("/api/v1/agents")).status_code == 200
    token = cookie.partition("=")[2].partition(";")[0]
    is_problem(
        await live.http.get("/api/v1/agents", headers={"Authorization": f"Bearer {token}"}), 401, "unauthenticated"
    )


@pytest.mark.parametrize(
    ("headers", "root", "name"),
    [
        ({"X-Forwarded-Proto": "https"}, "", "__Host-chat_session_443"),
        ({"X-Forwarded-Proto": "https"}, "/chat", "__Secure-chat_session_443"),
        ({}, "/chat", "chat_session_80"),
    ],
)
async def test_the_cookie_of_https_is_bound_to_the_host(
    tmp_path: Path, headers: dict[str, str], root: str, name: str
) -> None:
    async with live_server(tmp_path, root_path=root) as live:
        sent = {**TYPED, **headers, "Host": "chat.example"}
        cookie = (await live.http.get(f"/?key={KEY}", headers=sent)).headers["Set-Cookie"]
        assert cookie.startswith(f"{name}=")
        assert f"path={root}/;" in cookie.lower()
        assert ("secure" in cookie.lower().split("; ")) is bool(headers)
        sent = {"Cookie": cookie.partition(";")[0], "Authorization": "", "Host": "chat.example", **headers}
        del sent["Authorization"]
        async with httpx.AsyncClient(base_url=live.url, verify=False) as http:
            assert (await http.get("/api/v1/agents", headers=sent)).status_code == 200
            foreign = {**sent, "Origin": "http://chat.example" if headers else "https://chat.example"}
            assert (await http.get("/api/v1/agents", headers=foreign)).status_code == 401
            own = {**sent, "Origin": "https://chat.example" if headers else "http://chat.example"}
            assert (await http.get("/api/v1/agents", headers=own)).status_code == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site", None])
async def test_a_link_on_another_site_signs_in_only_after_confirmation(
    live: Live, browser: httpx.AsyncClient, site: str | None
) -> None:
    await sign_in(browser)
    before = dict(browser.cookies)
    headers = {**TYPED, "Sec-Fetch-Site": site} if site else {}
    asking = await browser.get("/", params={"key": f'"><b>{KEY}'}, headers=headers)
    assert (asking.status_code, "Set-Cookie" in asking.headers) == (200, False)
    assert f'value="&quot;&gt;&lt;b&gt;{KEY}"' in asking.text
    assert "form-action 'self'" in asking.headers["Content-Security-Policy"]
    for foreign in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        is_problem(await browser.post("/login", data={"key": KEY}, headers=foreign), 403, "forbidden")
    assert dict(browser.cookies) == before
    confirmed = await browser.post("/login", data={"key": KEY}, headers={"Origin": live.url})
    assert (confirmed.status_code, confirmed.headers["Location"]) == (303, "/")
    assert dict(browser.cookies) != before


async def test_an_image_request_does_not_sign_in(browser: httpx.AsyncClient) -> None:
    response = await browser.get("/", params={"key": KEY}, headers={**TYPED, "Sec-Fetch-Dest": "image"})
    assert (response.status_code, "Set-Cookie" in response.headers) == (401, False)


@pytest.mark.parametrize("body", [b"", b"key=", b"other=1", b"key=a&key=b", b"\xff", b"key=" + b"x" * 9000])
async def test_a_malformed_login_is_refused(live: Live, browser: httpx.AsyncClient, body: bytes) -> None:
    response = await browser.post("/login", content=body, headers={"Origin": live.url})
    assert response.status_code in (400, 401, 413)
    assert "Set-Cookie" not in response.headers


async def test_signing_out_ends_the_session_and_clears_the_cookie(live: Live, browser: httpx.AsyncClient) -> None:
    await sign_in(browser)
    cookies = dict(browser.cookies)
    is_problem(await browser.post("/logout", headers={"Origin": "https://evil.example"}), 403, "forbidden")
    assert (await browser.get("/api/v1/agents")).status_code == 200
    out = await browser.post("/logout", headers={"Origin": live.url})
    assert out.status_code == 204
    assert dict(browser.cookies) == {}
    browser.cookies.update(cookies)
    assert (await browser.get("/api/v1/agents")).status_code == 401
    assert (await browser.post("/logout", headers={"Origin": live.url})).status_code == 204


async def test_a_new_login_ends_the_browsers_earlier_session(browser: httpx.AsyncClient) -> None:
    await sign_in(browser)
    cookies = dict(browser.cookies)
    await sign_in(browser)
    assert dict(browser.cookies) != cookies
    browser.cookies.clear()
    browser.cookies.update(cookies)
    assert (await browser.get("/api/v1/agents")).status_code == 401


async def test_the_end_of_a_session_ends_its_streams_and_revoking_the_key_all_of_its_sessions(
    world: tuple[Live, Store], browser: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "chat.security")
    live, store = world
    organization = await store.find_organization("default")
    assert organization is not None
    secret = "a-key-whose-sessions-end-with-it"
    key = await store.create_key(await store.create_user(organization.id, "leaver"), secret)
    thread = await live.scripted_thread()
    for end in ("logout", "revoke"):
        await sign_in(browser, secret)
        cookie = "; ".join(f"{name}={value}" for name, value in browser.cookies.items())
        async with (
            browser.stream("GET", f"{thread}/events") as watching,
            socket(live.url, thread, key=None, headers={"Cookie": cookie, "Origin": live.url}) as connection,
        ):
            stream = frames(watching)
            assert (await anext(stream)).event == "thread.snapshot"
            await connection.until("thread.snapshot")
            if end == "logout":
                await browser.post("/logout", headers={"Origin": live.url})
            else:
                await store.revoke_key(key.id)
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
            async with asyncio.timeout(10):
                await connection.connection.wait_closed()
            assert connection.connection.close_code == 4401
    assert (await browser.get("/api/v1/agents")).status_code == 401
    assert {"signed in", "signed out"} <= {record.getMessage() for record in caplog.records}
    assert secret not in caplog.text
