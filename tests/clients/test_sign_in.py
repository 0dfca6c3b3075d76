"""Signing in and out in a real browser: what a link on another site may do, and what the cookie is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import Route

from agent_chat.server.serving import Server, listening_socket
from tests.support.browser import Desk, reads
from tests.support.client import KEY
from tests.support.servers import Live


async def test_a_cross_site_link_asks_before_it_signs_in_and_signing_out_ends_the_session(
    desk: Desk, server: Live
) -> None:
    """Another port of the same host is another origin, and the same site."""
    link = f"<a href='{server.url}/?key={KEY}'>a link</a>"

    async def page_of_another_site(request: Request) -> HTMLResponse:
        return HTMLResponse(link)

    async with desk.visit(server) as visit, other_site(page_of_another_site) as elsewhere:
        page = visit.page
        visit.expected.append("favicon.ico")
        await page.goto(elsewhere)
        await page.get_by_text("a link").click()
        await page.get_by_role("heading", name="Sign in?").wait_for()
        assert await visit.context.cookies() == []
        await page.get_by_role("button", name="Sign in").click()
        await page.locator("#attach:enabled").wait_for()
        [cookie] = await visit.context.cookies()
        assert cookie["name"] == f"chat_session_{server.url.rpartition(':')[2]}"
        assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
        assert KEY not in cookie["value"]
        assert "key=" not in page.url
        visit.expected.append("401")
        async with page.expect_response("**/logout"):  # its stream may end, and show the notice, before that
            await page.locator("#sign-out").click()
        await reads(page.locator("body"), "Not signed in")
        assert await visit.context.cookies() == []


@asynccontextmanager
async def other_site(page: Callable[[Request], Awaitable[HTMLResponse]]) -> AsyncIterator[str]:
    server = Server(Starlette(routes=[Route("/", page)]))
    sock = listening_socket("127.0.0.1", 0)
    serving = asyncio.create_task(server._serve([sock]))
    try:
        async with asyncio.timeout(10):
            await server.listening.wait()
        yield f"http://127.0.0.1:{sock.getsockname()[1]}/"
    finally:
        server.should_exit = True
        async with asyncio.timeout(20):
            await serving
