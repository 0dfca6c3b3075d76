"""An organization, a user of it, and that user's principal."""

from __future__ import annotations

import pytest

from agent_chat.stores.contracts import Store
from agent_chat.stores.models import Organization, Principal, User


@pytest.fixture
async def organization(store: Store) -> Organization:
    return await store.create_organization("Acme")


@pytest.fixture
async def user(store: Store, organization: Organization) -> User:
    return await store.create_user(organization.id, "Ada")


@pytest.fixture
def principal(user: User) -> Principal:
    return Principal(user.organization_id, user.id)
