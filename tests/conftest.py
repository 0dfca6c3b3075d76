"""Fixtures of all tests, and the marks that follow from what a test uses.

`browser`: every test with the fixture `desk`. `slow`: every test in tests/faults or with a MongoDB (SecantusDB is
slow), and each other test that takes more than half a second of CPU time, by a mark of its own.
"""

from pathlib import Path

import pytest

from agent_chat.agents.mcp import toolbox as mcp_toolbox

FAULTS = Path(__file__).parent / "faults"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if "desk" in fixtures:
            item.add_marker("browser")
        if "mongo_server" in fixtures or FAULTS in item.path.parents or item.path.name.startswith("test_mongo"):
            item.add_marker("slow")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait up to 20 s for a tool server that starts slowly on a busy machine, instead of the 2 s of a real run."""
    monkeypatch.setattr(mcp_toolbox, "READY_SECONDS", 20.0)
