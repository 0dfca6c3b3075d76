"""The Directory: organizations, users, agents, and keys that are stored as hashes (I11).

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
from agent_chat.stores.errors import AgentNotFound, KeyNotFound
from agent_chat.stores.models import Agent, Organization, Principal, User, new_id
from tests.support.backends import OpenStore
from tests.support.samples import AWKWARD, exactly, new_agent


@pytest.fixture
async def organization(store: Store) -> Organization:
    return await store.create_organization("Acme")


@pytest.fixture
async def user(store: Store, organization: Organization) -> User:
    return await store.create_user(organization.id, "Ada")


@pytest.fixture
def principal(user: User) -> Principal:
    return Principal(user.organization_id, user.id)


async def default_of(store: Store, principal: Principal) -> str | None:
    """The default agent's id, which the organization, `get_agent` and `list_agents` must agree on."""
    organization = await store.find_organization(principal.organization_id)
    assert organization is not None
    flagged = [agent.id for agent in (await store.list_agents(principal)).agents if agent.is_default]
    assert flagged == ([organization.default_agent_id] if organization.default_agent_id else [])
    if organization.default_agent_id is None:
        with pytest.raises(AgentNotFound):
            await store.get_agent(principal, None)
    else:
        default = await store.get_agent(principal, None)
        assert (default.id, default.is_default) == (organization.default_agent_id, True)
        assert await store.get_agent(principal, default.id) == default
    return organization.default_agent_id


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


# agents


async def test_an_agent_is_read_unchanged(store: Store, principal: Principal) -> None:
    agent = replace(new_agent(principal, "Été 🌞", is_default=True), metadata=AWKWARD, tools=["a"], model="m")
    assert exactly(await store.create_agent(principal, agent)) == exactly(agent)
    assert exactly(await store.get_agent(principal, agent.id)) == exactly(agent)
    assert exactly((await store.list_agents(principal)).agents) == exactly([agent])


async def test_the_first_agent_becomes_the_default_until_another_says_so(store: Store, principal: Principal) -> None:
    assert await default_of(store, principal) is None
    first = await store.create_agent(principal, new_agent(principal))
    assert first.is_default is True
    assert await default_of(store, principal) == first.id
    assert (await store.create_agent(principal, new_agent(principal))).is_default is False
    assert await default_of(store, principal) == first.id
    third = await store.create_agent(principal, new_agent(principal, is_default=True))
    assert third.is_default is True
    assert await default_of(store, principal) == third.id
    assert (await store.get_agent(principal, first.id)).is_default is False


async def test_one_of_several_concurrently_created_agents_is_the_default(store: Store, principal: Principal) -> None:
    created = await asyncio.gather(*[store.create_agent(principal, new_agent(principal)) for _ in range(10)])
    assert [agent.id for agent in created if agent.is_default] == [await default_of(store, principal)]
    assert len((await store.list_agents(principal)).agents) == 10


async def test_an_agent_of_an_organization_without_a_record_is_not_the_default(store: Store) -> None:
    principal = Principal(new_id(), new_id())
    agent = await store.create_agent(principal, new_agent(principal, is_default=True))
    assert agent.is_default is False
    assert (await store.update_agent(principal, agent, is_default=True)).is_default is False
    assert (await store.get_agent(principal, agent.id)).is_default is False
    await store.delete_agent(principal, agent.id)


async def test_agents_are_listed_oldest_first(store: Store, principal: Principal) -> None:
    created = [(await store.create_agent(principal, new_agent(principal, str(n)))).id for n in range(5)]
    assert [agent.id for agent in (await store.list_agents(principal)).agents] == created


async def test_an_unknown_agent_is_not_found(store: Store, principal: Principal) -> None:
    missing = new_agent(principal)
    for call in (
        store.get_agent(principal, missing.id),
        store.get_agent(principal, missing.id, deleted=True),
        store.get_agent(principal, None),
        store.update_agent(principal, missing),
        store.delete_agent(principal, missing.id),
    ):
        with pytest.raises(AgentNotFound):
            await call
    assert (await store.list_agents(principal)).agents == []


async def test_update_replaces_an_agent(store: Store, principal: Principal) -> None:
    stored = await store.create_agent(principal, new_agent(principal))
    agent = await store.create_agent(principal, new_agent(principal, "Bob"))
    wanted = replace(
        agent, name="Eve", instructions="New.", tools=[], mcp_servers=[], metadata=AWKWARD, max_tokens=None
    )
    updated = await store.update_agent(principal, wanted)
    assert exactly(replace(updated, updated_at="")) == exactly(replace(wanted, updated_at=""))
    assert await store.get_agent(principal, agent.id) == updated
    assert await store.get_agent(principal, stored.id) == stored


async def test_an_update_sets_and_unsets_the_default(store: Store, principal: Principal) -> None:
    first = await store.create_agent(principal, new_agent(principal))
    second = await store.create_agent(principal, new_agent(principal))
    assert (await store.update_agent(principal, second, is_default=True)).is_default is True
    assert await default_of(store, principal) == second.id
    assert (await store.update_agent(principal, first, is_default=False)).is_default is False
    assert await default_of(store, principal) == second.id
    assert (await store.update_agent(principal, second, is_default=False)).is_default is False
    assert await default_of(store, principal) is None
    third = await store.create_agent(principal, new_agent(principal))
    assert await default_of(store, principal) == third.id


async def test_an_update_that_does_not_mention_the_default_leaves_it_unchanged(
    store: Store, principal: Principal
) -> None:
    first, second = [await store.create_agent(principal, new_agent(principal)) for _ in range(2)]
    await store.update_agent(principal, second, is_default=True)
    assert first.is_default is True
    assert (await store.update_agent(principal, replace(first, name="Renamed"))).is_default is False
    assert (await store.update_agent(principal, replace(second, name="Renamed"))).is_default is True
    assert await default_of(store, principal) == second.id


async def test_a_deleted_agent_is_found_only_on_request(store: Store, principal: Principal) -> None:
    stored = await store.create_agent(principal, new_agent(principal))
    agent = await store.create_agent(principal, new_agent(principal))
    await store.delete_agent(principal, agent.id)
    assert (await store.list_agents(principal)).agents == [stored]
    for call in (
        store.get_agent(principal, agent.id),
        store.update_agent(principal, replace(agent, name="x"), is_default=True),
        store.delete_agent(principal, agent.id),
    ):
        with pytest.raises(AgentNotFound):
            await call
    found = await store.get_agent(principal, agent.id, deleted=True)
    assert (found.id, found.name, found.is_default) == (agent.id, agent.name, False)
    assert await store.get_agent(principal, stored.id, deleted=True) == stored
    assert await default_of(store, principal) == stored.id


async def test_the_oldest_remaining_agent_replaces_a_deleted_default(store: Store, principal: Principal) -> None:
    first, second, third = [await store.create_agent(principal, new_agent(principal)) for _ in range(3)]
    await store.delete_agent(principal, first.id)
    assert await default_of(store, principal) == second.id
    await store.delete_agent(principal, third.id)
    assert await default_of(store, principal) == second.id
    await store.delete_agent(principal, second.id)
    assert await default_of(store, principal) is None
    fourth = await store.create_agent(principal, new_agent(principal))
    assert await default_of(store, principal) == fourth.id


async def test_after_concurrent_deletions_and_creations_there_is_a_default(store: Store, principal: Principal) -> None:
    agents = [await store.create_agent(principal, new_agent(principal)) for _ in range(6)]
    await asyncio.gather(
        *[store.delete_agent(principal, agent.id) for agent in agents],
        *[store.create_agent(principal, new_agent(principal)) for _ in range(2)],
    )
    left = [agent.id for agent in (await store.list_agents(principal)).agents]
    assert len(left) == 2
    assert await default_of(store, principal) in left


async def test_a_reopened_store_has_its_directory(open_store: OpenStore) -> None:
    async with open_store() as store:
        user = await store.create_user((await store.create_organization("Acme")).id, "Ada")
        principal = Principal(user.organization_id, user.id)
        await store.create_key(user, "secret")
        await store.revoke_key((await store.create_key(user, "lost")).id)
        agent: Agent = await store.create_agent(principal, replace(new_agent(principal), metadata=AWKWARD))
        keys = await store.list_keys()
    async with open_store() as store:
        assert await store.find_user(principal.organization_id, "Ada") == user
        assert await store.list_keys() == keys
        assert await store.find_principal("secret") is not None
        assert await store.find_principal("lost") is None
        assert exactly(await store.get_agent(principal, None)) == exactly(agent)
        assert await default_of(store, principal) == agent.id


async def test_agents_are_listed_in_pages_within_their_bytes(store: Store, principal: Principal) -> None:
    """I9."""
    created = [replace(new_agent(principal), instructions="x" * 10_000) for _ in range(5)]
    for agent in created:
        await store.create_agent(principal, agent)

    async def page(**bounds: int) -> tuple[list[str], bool]:
        found = await store.list_agents(principal, **bounds)
        return [agent.id for agent in found.agents], found.more

    ids = [agent.id for agent in created]
    assert await page(limit=2) == (ids[:2], True)
    assert await page(limit=2, offset=3) == (ids[3:], False)
    assert await page(limit=5) == (ids, False)
    assert await page(limit=5, offset=1, max_bytes=25_000) == (ids[1:3], True)
    assert await page(limit=5, offset=4, max_bytes=1) == (ids[4:], False)
    assert await page(limit=5, offset=9) == ([], False)
