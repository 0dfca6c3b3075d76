"""Agents, and which of them is an organization's default."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from agent_chat.stores.contracts import Store
from agent_chat.stores.errors import AgentNotFound
from agent_chat.stores.models import Agent, Principal, new_id
from tests.support.backends import OpenStore
from tests.support.samples import AWKWARD, exactly, new_agent


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
