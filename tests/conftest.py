"""What every test shares: the event loop that anyio's plugin runs them in."""

import pytest


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"
