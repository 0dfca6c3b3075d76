"""Real processes, one MongoDB and one Redis for all tests that leave them running, and a database for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.mongo_server import mongo_server as mongo_server
from tests.support.mongo_server import mongo_url as mongo_url
from tests.support.services import redis_url as redis_url
from tests.support.site import Site, opened_site


@pytest.fixture
async def site(tmp_path: Path, mongo_url: str, redis_url: str) -> AsyncIterator[Site]:
    async with opened_site(tmp_path, mongo_url, redis_url) as site:
        yield site


@pytest.fixture
async def hasty_site(tmp_path: Path, mongo_url: str, redis_url: str) -> AsyncIterator[Site]:
    """One whose leases last two seconds, so that tests need not wait for twenty."""
    async with opened_site(tmp_path, mongo_url, redis_url, TEST_LEASE="2") as site:
        yield site
