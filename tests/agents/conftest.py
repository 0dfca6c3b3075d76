"""A stand-in for the model's service, and a live server whose default agent is a `claude` on it."""

from collections.abc import AsyncIterator

import pytest

from agent_chat.agents.claude.agent import Claude
from tests.support.anthropic_api import StandIn, stand_in
from tests.support.claude_server import claude_server, quick
from tests.support.mcp_pool import raw
from tests.support.servers import Live


@pytest.fixture(scope="module")
async def started() -> AsyncIterator[StandIn]:
    async with stand_in() as service:
        yield service


@pytest.fixture
def service(started: StandIn) -> StandIn:
    """The stand-in, reset: all tests of a module share it."""
    started.reset()
    return started


@pytest.fixture(scope="module")
async def claude(started: StandIn) -> AsyncIterator[Claude]:
    claude = quick(started)
    yield claude
    await claude.close()


@pytest.fixture(scope="module")
async def live(tmp_path_factory: pytest.TempPathFactory, started: StandIn, claude: Claude) -> AsyncIterator[Live]:
    """All tests of a module share one server; each has threads of its own."""
    async with claude_server(tmp_path_factory.mktemp("live"), started, claude, {"raw": raw()}) as live:
        yield live


@pytest.fixture(autouse=True)
def always_patient(patient: None) -> None:
    """Apply `patient` to every test of this folder."""
