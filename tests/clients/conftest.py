"""One browser and one live server for all tests of this folder; a test that kills its server brings its own."""

from collections.abc import AsyncIterator

import pytest

from tests.support.browser import Desk, Visit, chromium
from tests.support.servers import Live, live_server


@pytest.fixture(scope="session")
async def desk() -> AsyncIterator[Desk]:
    async with chromium() as desk:
        yield desk


@pytest.fixture(scope="session")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Live]:
    """Its default agent writes without delays."""
    async with live_server(tmp_path_factory.mktemp("data")) as server:
        (demo,) = await server.get("/api/v1/agents")
        quick = {"metadata": {"demo": {"delay_ms": 0}}}
        (await server.http.patch(f"/api/v1/agents/{demo['id']}", json=quick)).raise_for_status()
        yield server


@pytest.fixture
async def visit(desk: Desk, server: Live) -> AsyncIterator[Visit]:
    """An empty tab; unexpected errors in its console fail the test."""
    async with desk.visit_as_new(server) as visit:
        yield visit


@pytest.fixture(autouse=True)
def always_patient(patient: None) -> None:
    """Apply `patient` to every test of this folder."""
