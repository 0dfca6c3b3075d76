"""Fixtures of all tests."""

import pytest

from agent_chat.agents.mcp import toolbox as mcp_toolbox


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait up to 20 s for a tool server that starts slowly on a busy machine, instead of the 2 s of a real run."""
    monkeypatch.setattr(mcp_toolbox, "READY_SECONDS", 20.0)
