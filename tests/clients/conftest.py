"""One browser and one live server for all tests of this folder; a test that kills its server brings its own."""

from collections.abc import AsyncIterator

import pytest

from agent_chat.agents.mcp import toolbox as mcp_toolbox
from tests.support.browser import Desk, Visit, chromium
from tests.support.live import Live, live_server


@pytest.fixture(scope="session")
async def desk() -> AsyncIterator[Desk]:
    async with chromium() as desk:
        yield desk


@pytest.fixture(scope="session")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Live]:
    """Its default agent doesn't type as slowly as for people who watch it."""
    async with live_server(tmp_path_factory.mktemp("data")) as server:
        (demo,) = await server.get("/api/v1/agents")
        quick = {"metadata": {"demo": {"delay_ms": 0}}}
        (await server.http.patch(f"/api/v1/agents/{demo['id']}", json=quick)).raise_for_status()
        yield server


@pytest.fixture
async def visit(desk: Desk, server: Live) -> AsyncIterator[Visit]:
    """Somebody with an empty tab; whatever their console says against the page fails the test."""
    async with desk.visit(server) as visit:
        yield visit


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for slow servers on a slow machine; tests of the limit itself use a server that never responds."""
    monkeypatch.setattr(mcp_toolbox, "READY_SECONDS", 20.0)
