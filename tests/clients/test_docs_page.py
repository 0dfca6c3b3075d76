"""The page /docs in a browser: Swagger UI shows every operation under the page's strict content security policy."""

from __future__ import annotations

import re

import pytest

from tests.support.browser import Visit, reads

pytestmark = pytest.mark.browser


async def test_the_docs_page_shows_every_operation_and_requests_no_other_host(visit: Visit) -> None:
    requested: list[str] = []
    visit.page.on("request", lambda request: requested.append(request.url))
    await visit.page.goto(f"{visit.server.url}/docs")
    await reads(visit.page.locator(".info .title"), re.compile("Agent chat server"))
    document = await visit.server.get("/openapi.json")
    operations = sum(len(methods) for methods in document["paths"].values())
    assert await visit.page.locator(".opblock").count() == operations
    await visit.page.locator("#operations-messages-post_message .opblock-summary-control").click()
    await reads(visit.page.locator(".opblock-body"), re.compile("thread_busy"))
    assert {url for url in requested if not url.startswith((visit.server.url, "data:"))} == set()
