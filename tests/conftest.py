"""Fixtures of all tests, the marks that follow from what a test uses, and the turns of those that must run alone.

`browser`: every test with the fixture `desk`. `slow`: every test in tests/faults or with a MongoDB (SecantusDB is
slow), and each other test that takes more than half a second of CPU time, by a mark of its own. `alone`: tests that
measure time; while one of them runs, no other process of pytest runs a test.
"""

import fcntl
import gc
import os
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from agent_chat.agents.mcp import toolbox as mcp_toolbox

FAULTS = Path(__file__).parent / "faults"
QUEUE, RUNNING = Path(__file__), Path(__file__).with_name("__init__.py")
"""Files whose locks `alone` needs."""


# Also where PYTHONDONTWRITEBYTECODE is set: without bytecode each process of pytest spends five seconds on rewriting
# the asserts of all tests, and each server process half a second on compiling our modules.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_collection_finish() -> None:
    """Exclude what importing the tests has made from garbage collections: 370,000 objects."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if "desk" in fixtures:
            item.add_marker("browser")
        if "mongo_server" in fixtures or FAULTS in item.path.parents or item.path.name.startswith("test_mongo"):
            item.add_marker("slow")


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outside the time limit of a test
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Let a test with the mark `alone` wait for those of other processes, and let theirs wait for it.

    Each test holds a lock: shared, or exclusively if it must be alone. Before that it takes its place in a queue, so
    that tests of other processes cannot pass one that must be alone again and again. Both are locks on files that every
    process has.
    """
    alone = item.get_closest_marker("alone") is not None
    with QUEUE.open() as queue, RUNNING.open() as running:
        fcntl.flock(queue, fcntl.LOCK_EX)
        fcntl.flock(running, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(queue, fcntl.LOCK_UN)
        return (yield)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait up to 20 s for a tool server that starts slowly on a busy machine, instead of the 2 s of a real run."""
    monkeypatch.setattr(mcp_toolbox, "READY_SECONDS", 20.0)
