"""One browser and one live server for all tests of this folder; a test that kills its server brings its own."""

from collections.abc import AsyncIterator

import pytest

from tests.journeys.live import Live, live_server
from tests.web.browser import Desk, Visit, chromium


@pytest.fixture(scope="session")
async def desk() -> AsyncIterator[Desk]:
    async with chromium() as desk:
        yield desk


@pytest.fixture(scope="session")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Live]:
    async with live_server(tmp_path_factory.mktemp("data")) as server:
        yield server


@pytest.fixture
async def visit(desk: Desk, server: Live) -> AsyncIterator[Visit]:
    """Somebody who is signed in, at the page; whatever their console says against the page fails the test."""
    async with desk.visit(server) as visit:
        yield visit
