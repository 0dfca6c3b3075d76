"""A live server per test, in the test's own event loop."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.servers import Live, live_server


@pytest.fixture
async def live(tmp_path: Path) -> AsyncIterator[Live]:
    async with live_server(tmp_path) as live:
        yield live
