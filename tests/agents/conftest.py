"""A stand-in for the model's service, and a live server whose default agent is a quick-tempered `claude` on it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agents.claude import Claude
from tests.agents.serving import claude_server
from tests.agents.standin import StandIn, stand_in
from tests.journeys.live import Live
from tests.units.test_mcp import raw

STALL_SECONDS = 0.3


@pytest.fixture
async def service() -> AsyncIterator[StandIn]:
    async with stand_in() as service:
        yield service


@pytest.fixture
async def claude(service: StandIn) -> AsyncIterator[Claude]:
    claude = Claude(
        service.key,
        service.url,
        model="stand-in-1",
        title_model="small",
        stall_seconds=STALL_SECONDS,
        retry_seconds=0.01,
    )
    yield claude
    await claude.close()


@pytest.fixture
async def live(tmp_path: Path, service: StandIn, claude: Claude) -> AsyncIterator[Live]:
    async with claude_server(tmp_path, service, claude, {"raw": raw()}) as live:
        yield live
