"""Chromium with the demo page, driven by playwright."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from tests.support.client import KEY, Client
from tests.support.services import missing

if TYPE_CHECKING:
    from playwright.async_api import Browser, BrowserContext, ConsoleMessage, Locator, Page

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

SAMPLES = """
window.samples = [];
new MutationObserver(() => {
  const answer = [...document.querySelectorAll("article.assistant[data-status=in_progress] .plain")].at(-1);
  if (answer) window.samples.push(answer.textContent);
}).observe(document, { subtree: true, childList: true, characterData: true });
"""
"""What the last answer showed while it was written, each time it changed."""

PATIENCE = 20.0
"""Seconds to wait for anything: generous, for a busy machine."""
CUT = re.compile(r"net::ERR_|Failed to fetch")


async def text_of(locator: Locator) -> str:
    return (await locator.locator(".body").inner_text()).strip()


async def reads(locator: Locator, text: str | re.Pattern[str]) -> None:
    """Wait until the element shows the text."""
    await locator.filter(has_text=text).first.wait_for()


async def comes_to(locator: Locator, true: str) -> None:
    """Wait until a JavaScript function of the element returns true; it is called before each repaint."""
    look = f"""each => new Promise(resolve => {{
      const look = () => (({true})(each) ? resolve() : requestAnimationFrame(look));
      look();
    }})"""
    async with asyncio.timeout(PATIENCE):
        await locator.evaluate(look)


class Visit:
    """A browser context with an empty page; `errors` are the errors of its console."""

    page: Page

    def __init__(self, context: BrowserContext, server: Client) -> None:
        self.context = context
        self.server = server
        self.errors: list[str] = []
        self.expected: list[str] = []

    async def tab(self) -> Page:
        """Open another tab."""
        page = await self.context.new_page()
        page.set_default_timeout(PATIENCE * 1000)
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        return page

    async def enter(self, place: str = "") -> Page:
        """Open the URL that the server prints, which signs in, and wait until the page accepts a message."""
        await self.page.goto(f"/?key={KEY}{place}")
        await self.page.locator("#attach:enabled").wait_for()
        return self.page

    def _said(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(f"{message.text} {message.location.get('url')}")

    def unexpected(self) -> list[str]:
        """The console's errors, without those that the test expects."""
        return [error for error in self.errors if not any(re.search(each, error) for each in self.expected)]

    async def choose(self, **fields: object) -> dict[str, Any]:
        """Create an agent of kind `scripted` and open the page with it."""
        agent = await self.server.agent(**fields)
        await self.enter(f"#/{agent['id']}")
        return agent

    async def say(self, text: str) -> None:
        await self.page.locator("#input").fill(text)
        await self.page.locator("#input").press("Enter")

    def answer(self, status: str, page: Page | None = None) -> Locator:
        """The last answer, once it has this status."""
        return (page or self.page).locator(f"article.assistant[data-status={status}]").last

    async def stored(self) -> dict[str, Any]:
        """The last message of the page's thread, as the server stores it."""
        agent_id, thread_id = self.page.url.partition("#/")[2].split("/")
        return dict((await self.server.get(f"/api/v1/chat/{agent_id}/threads/{thread_id}"))["messages"][-1])

    async def samples(self, page: Page | None = None) -> list[str]:
        samples: list[str] = await (page or self.page).evaluate("window.samples")
        return samples


class Desk:
    """A browser. `visit_as_new` is for one server only: the one of its first call."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self._reused: Page | None = None

    @asynccontextmanager
    async def visit(self, server: Client, **options: Any) -> AsyncIterator[Visit]:
        """Open a new browser context; fails at the end if its console has unexpected errors."""
        context = await self._new_context(**{"base_url": str(server.http.base_url), **options})
        try:
            visit = Visit(context, server)
            visit.page = await visit.tab()
            yield visit
            assert not visit.unexpected(), visit.unexpected()
        finally:
            await context.close()

    @asynccontextmanager
    async def visit_as_new(self, server: Client) -> AsyncIterator[Visit]:
        """Like `visit`, in a context that is used again, emptied before: half the CPU time of a new one."""
        if self._reused is None:
            context = await self._new_context(base_url=str(server.http.base_url))
            self._reused = await context.new_page()
            await self._reused.goto("/healthz")  # a page that stays open keeps the site's process alive
        context = self._reused.context
        visit = Visit(context, server)
        visit.page = await visit.tab()
        await context.clear_cookies()
        session = await context.new_cdp_session(visit.page)
        await session.send("Storage.clearDataForOrigin", {"origin": server.url, "storageTypes": "all"})
        await session.detach()
        try:
            yield visit
            assert not visit.unexpected(), visit.unexpected()
        finally:
            for page in context.pages:
                if page is not self._reused:
                    await page.close()
            await context.clear_permissions()
            await context.set_offline(False)

    async def _new_context(self, **options: Any) -> BrowserContext:
        context = await self._browser.new_context(**{"reduced_motion": "reduce", **options})
        await context.add_init_script(SAMPLES)
        return context


@asynccontextmanager
async def chromium() -> AsyncIterator[Desk]:
    path = shutil.which("chromium") or missing("chromium is not installed")
    if not find_spec("playwright"):
        missing("playwright is not installed")
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            yield Desk(browser)
        finally:
            await browser.close()
