"""Organizations, users, keys and sessions; secrets are stored as hashes (I11).

The isolation of organizations (I1) is tested in `test_store_isolation`.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from hashlib import sha256

import msgspec
import pytest
from msgspec.structs import replace

from agent_chat.stores.contracts import Store
from agent_chat.stores.errors import KeyNotFound
from agent_chat.stores.models import Organization, User, new_id
from tests.support.backends import OpenStore

# organizations and users


async def test_an_organization_is_found_by_its_id_and_by_its_name(store: Store, organization: Organization) -> None:
    assert (organization.name, organization.default_agent_id) == ("Acme", None)
    assert await store.find_organization(organization.id) == organization
    assert await store.find_organization("Acme") == organization
    for other in (new_id(), "acm", "", "%"):
        assert await store.find_organization(other) is None


async def test_a_user_is_found_by_id_and_by_name_within_the_organization(
    store: Store, organization: Organization, user: User
) -> None:
    assert (user.organization_id, user.name) == (organization.id, "Ada")
    assert await store.find_user(organization.id, user.id) == user
    assert await store.find_user(organization.id, "Ada") == user
    for other in (new_id(), "Bob", "", "%"):
        assert await store.find_user(organization.id, other) is None


async def test_two_organizations_may_have_a_user_of_the_same_name(store: Store, user: User) -> None:
    other = await store.create_organization("Other")
    namesake = await store.create_user(other.id, user.name)
    assert await store.find_user(other.id, user.name) == namesake
    assert await store.find_user(user.organization_id, user.name) == user


# keys


async def test_a_key_has_its_users_principal(store: Store, user: User) -> None:
    await store.create_key(user, "secret")
    principal = await store.find_principal("secret")
    assert principal is not None
    assert (principal.organization_id, principal.user_id) == (user.organization_id, user.id)
    for other in (
        "",
        "Secret",
        "secret ",
        "secre",
        sha256(b"secret").hexdigest(),
        "ключ 🗝",
        "\x00",
        "\udcff",
        "\ud800",
    ):
        assert await store.find_principal(other) is None


async def test_only_the_hash_of_a_key_is_stored(store: Store, user: User) -> None:
    """I11."""
    key = await store.create_key(user, "a-long-secret-0123456789")
    assert key.hash == sha256(b"a-long-secret-0123456789").hexdigest()
    for stored in [key, *await store.list_keys()]:
        assert b"a-long-secret-0123456789" not in msgspec.json.encode(stored)
        assert (stored.user_id, stored.organization_id, stored.revoked_at) == (user.id, user.organization_id, None)


async def test_creating_a_key_again_returns_the_stored_one(store: Store, user: User) -> None:
    key = await store.create_key(user, "secret")
    assert await store.create_key(user, "secret") == key
    assert await store.list_keys() == [key]


async def test_concurrent_creations_of_one_key_return_the_same(store: Store, user: User) -> None:
    created = await asyncio.gather(*[store.create_key(user, "secret") for _ in range(10)])
    assert {key.id for key in created} == {key.id for key in await store.list_keys()}
    assert len(await store.list_keys()) == 1


async def test_a_revoked_key_has_no_principal_and_stays_listed(store: Store, user: User) -> None:
    one, two = await store.create_key(user, "one"), await store.create_key(user, "two")
    revoked = await store.revoke_key(one.id)
    assert revoked.revoked_at is not None
    assert replace(revoked, revoked_at=None) == one
    assert await store.find_principal("one") is None
    assert await store.find_principal("two") is not None
    assert await store.list_keys() == [revoked, two]


async def test_a_secret_whose_key_was_revoked_may_be_stored_again(store: Store, user: User) -> None:
    old = await store.create_key(user, "secret")
    await store.revoke_key(old.id)
    new = await store.create_key(user, "secret")
    assert (new.id != old.id, new.revoked_at) == (True, None)
    assert await store.find_principal("secret") is not None
    assert [key.id for key in await store.list_keys()] == [old.id, new.id]


async def test_an_unknown_key_is_not_found(store: Store) -> None:
    assert await store.list_keys() == []
    with pytest.raises(KeyNotFound):
        await store.revoke_key(new_id())


async def test_keys_of_every_organization_are_listed_oldest_first(store: Store, user: User) -> None:
    other = await store.create_user((await store.create_organization("Other")).id, "Bob")
    created = [await store.create_key(user if n % 2 else other, f"secret {n}") for n in range(6)]
    assert await store.list_keys() == created


async def test_a_key_has_its_source_and_one_without_gets_it(store: Store, user: User) -> None:
    unknown = await store.create_key(user, "one")
    assert unknown.source is None
    assert await store.create_key(user, "one", "environment") == replace(unknown, source="environment")
    assert (await store.create_key(user, "one", "first_start")).source == "environment"
    assert (await store.create_key(user, "two", "command_line")).source == "command_line"
    assert [key.source for key in await store.list_keys()] == ["environment", "command_line"]


async def test_only_unheld_keys_of_that_source_are_revoked(store: Store, user: User) -> None:
    old, new = [await store.create_key(user, secret, "environment") for secret in ("old", "new")]
    others = [await store.create_key(user, "other", source) for source in ("first_start",)]
    others.append(await store.create_key(user, "made", "command_line"))
    others.append(await store.create_key(user, "unknown"))
    assert await store.revoke_unheld_keys("environment", keep=new.id, seconds=60) == []
    assert await store.hold_key(old.id) is True
    [revoked] = await store.revoke_unheld_keys("environment", keep=new.id, seconds=0)
    assert replace(revoked, revoked_at=None) == old
    assert await store.hold_key(old.id) is False
    assert await store.hold_key(new_id()) is False
    assert await store.find_principal("old") is None
    for secret in ("new", "other", "made", "unknown"):
        assert await store.find_principal(secret) is not None
    assert [key.id for key in await store.revoke_unheld_keys("environment", keep=None, seconds=0)] == [new.id]
    assert await store.list_keys() == [revoked, *(await store.list_keys())[1:2], *others]


# sessions


async def test_a_session_has_its_keys_principal_until_it_is_deleted(store: Store, user: User) -> None:
    await store.create_key(user, "secret")
    principal = await store.create_session("secret", "token", seconds=60)
    assert principal == await store.find_principal("secret")
    assert await store.find_session_principal("token") == principal
    for other in ("", "secret", "Token", sha256(b"token").hexdigest(), "\x00", "\ud800"):
        assert await store.find_session_principal(other) is None
    assert await store.find_principal("token") is None
    await store.create_session("secret", "another", seconds=60)
    await store.delete_session("token")
    await store.delete_session("token")
    assert await store.find_session_principal("token") is None
    assert await store.find_session_principal("another") == principal


async def test_a_session_needs_a_valid_key_and_ends_with_it(store: Store, user: User) -> None:
    assert await store.create_session("secret", "token", seconds=60) is None
    key = await store.create_key(user, "secret")
    assert await store.create_session("secret", "token", seconds=60) is not None
    await store.revoke_key(key.id)
    assert await store.find_session_principal("token") is None
    assert await store.create_session("secret", "again", seconds=60) is None
    await store.create_key(user, "secret")
    assert await store.find_session_principal("token") is None


async def test_a_key_has_at_most_a_number_of_sessions_the_newest(open_store: OpenStore) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    async with open_store(clock=lambda: now) as store:
        user = await store.create_user((await store.create_organization("Acme")).id, "Ada")
        for secret in ("secret", "other"):
            await store.create_key(user, secret)
        await store.create_session("other", "another key's", seconds=60)
        for number in range(5):
            now += timedelta(seconds=1)
            await store.create_session("secret", f"token {number}", seconds=60, limit=3)
        valid = [n for n in range(5) if await store.find_session_principal(f"token {n}")]
        assert valid == [2, 3, 4]
        assert await store.find_session_principal("another key's") is not None


async def test_a_session_expires(open_store: OpenStore) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    async with open_store(clock=lambda: now) as store:
        user = await store.create_user((await store.create_organization("Acme")).id, "Ada")
        await store.create_key(user, "secret")
        await store.create_session("secret", "token", seconds=60)
        now += timedelta(seconds=59)
        assert await store.find_session_principal("token") is not None
        now += timedelta(seconds=1)
        assert await store.find_session_principal("token") is None
        await store.create_session("secret", "another", seconds=60)
        now -= timedelta(seconds=30)  # it is deleted, not merely expired
        assert await store.find_session_principal("token") is None
