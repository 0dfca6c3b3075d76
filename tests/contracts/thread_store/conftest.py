"""One principal and one of its threads."""

from __future__ import annotations

import pytest

from agent_chat.stores.contracts import Store
from agent_chat.stores.models import Principal, Thread
from tests.support.samples import new_principal, started_thread


@pytest.fixture
def principal() -> Principal:
    return new_principal()


@pytest.fixture
async def thread(store: Store, principal: Principal) -> Thread:
    return await started_thread(store, principal)
