"""The first key: kept in the data folder, whole or not at all, and dead once it was revoked."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from msgspec.structs import replace

from agent_chat.agents.mcp.config import Server
from agent_chat.server.organizations import first_member
from agent_chat.server.own_key import KEY_FILE, _stored_secret, hold_forever, open_own_key
from agent_chat.stores.contracts import Store
from agent_chat.stores.models import Agent, Key, Principal, User, hash_of
from agent_chat.stores.sqlite.store import open_sqlite

OLD, NEW = "the-old-key-from-the-environment", "the-new-key-from-the-environment"


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await open_sqlite(tmp_path / "chat.db")
    try:
        yield opened
    finally:
        await opened.close()


async def member(store: Store) -> User:
    return await first_member(store, kind="demo", model=None, servers={})


async def start(store: Store, folder: Path, api_key: str | None = None) -> str:
    own = await open_own_key(store, await member(store), folder, api_key, shared=False)
    assert own is not None
    return own.secret


async def revoke(store: Store, secret: str) -> None:
    for key in await store.list_keys():
        if key.hint[-4:] == secret[-4:]:
            await store.revoke_key(key.id)


async def test_every_start_has_the_same_key_which_only_its_owner_can_read(store: Store, tmp_path: Path) -> None:
    key = await start(store, tmp_path)
    assert await start(store, tmp_path) == key
    assert await store.find_principal(key) is not None
    assert stat.S_IMODE((tmp_path / KEY_FILE).stat().st_mode) == 0o600
    assert [name for name in os.listdir(tmp_path) if name.startswith(KEY_FILE)] == [KEY_FILE]


async def test_a_first_key_that_was_revoked_is_replaced_and_stays_revoked(store: Store, tmp_path: Path) -> None:
    old = await start(store, tmp_path)
    await revoke(store, old)
    new = await start(store, tmp_path)
    assert await store.find_principal(old) is None
    assert await store.find_principal(new) is not None
    assert await start(store, tmp_path) == new
    assert stat.S_IMODE((tmp_path / KEY_FILE).stat().st_mode) == 0o600


async def test_a_new_first_key_replaces_the_one_whose_file_is_gone(store: Store, tmp_path: Path) -> None:
    old = await start(store, tmp_path)
    (tmp_path / KEY_FILE).unlink()
    assert await store.find_principal(await start(store, tmp_path)) is not None
    assert await store.find_principal(old) is None


async def test_the_environments_key_is_valid_again_from_the_next_start_on(store: Store, tmp_path: Path) -> None:
    for _ in range(2):
        assert await start(store, tmp_path, NEW) == NEW
        assert await store.find_principal(NEW) is not None
        await revoke(store, NEW)
    assert not (tmp_path / KEY_FILE).exists()


async def test_a_changed_or_removed_key_of_the_environment_ends_at_the_next_start(store: Store, tmp_path: Path) -> None:
    made = await store.create_key(await member(store), "made-by-the-command-line", "command_line")
    first = await start(store, tmp_path)
    await start(store, tmp_path, OLD)
    await start(store, tmp_path, NEW)
    assert await store.find_principal(OLD) is None
    assert await store.find_principal(NEW) is not None
    assert await start(store, tmp_path) == first
    assert await store.find_principal(NEW) is None
    assert await store.find_principal(first) is not None
    assert made in await store.list_keys()


async def test_keys_without_a_source_are_recognized_by_their_secret_and_never_replaced_else(
    store: Store, tmp_path: Path
) -> None:
    owner = await member(store)
    (tmp_path / KEY_FILE).write_text("stored-by-an-earlier-version\n")
    for secret in ("stored-by-an-earlier-version", OLD, "of unknown origin"):
        await store.create_key(owner, secret)
    await start(store, tmp_path, OLD)
    assert [key.source for key in await store.list_keys()] == ["first_start", "environment", None]
    await start(store, tmp_path, NEW)
    await start(store, tmp_path)
    valid = [key.source for key in await store.list_keys() if key.revoked_at is None]
    assert valid == ["first_start", None]


async def test_on_a_shared_database_no_key_is_made(store: Store, tmp_path: Path) -> None:
    assert await open_own_key(store, await member(store), tmp_path, None, shared=True) is None
    assert (await store.list_keys(), (tmp_path / KEY_FILE).exists()) == ([], False)


async def valid_keys(store: Store) -> list[Key]:
    return [key for key in await store.list_keys() if key.revoked_at is None]


async def test_a_rolling_restart_rotates_the_key_once_the_last_process_has_the_new_one(
    store: Store, tmp_path: Path
) -> None:
    """Two processes on a shared database; one still has the old key, and restarts with it meanwhile."""
    owner, seconds = await member(store), 0.3
    holding: list[asyncio.Task[None]] = []

    async def process(api_key: str | None) -> asyncio.Task[None]:
        own = await open_own_key(store, owner, tmp_path, api_key, shared=True)
        holding.append(asyncio.create_task(hold_forever(store, own, seconds)))
        return holding[-1]

    async def until_valid(*secrets: str) -> None:
        async with asyncio.timeout(10):
            while {key.hash for key in await valid_keys(store)} != {hash_of(secret) for secret in secrets}:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    try:
        one, other = [await process(OLD) for _ in range(2)]
        one.cancel()
        one = await process(NEW)
        other.cancel()
        other = await process(OLD)
        await asyncio.sleep(3 * seconds)
        await until_valid(OLD, NEW)
        other.cancel()
        other = await process(NEW)
        await until_valid(NEW)
        one.cancel()
        other.cancel()
        await process(None)
        await until_valid()
    finally:
        for task in holding:
            task.cancel()


async def test_an_empty_key_file_is_no_key(store: Store, tmp_path: Path) -> None:
    (tmp_path / KEY_FILE).write_text("\n")
    key = await start(store, tmp_path)
    assert key
    assert await start(store, tmp_path) == key


def test_those_who_start_together_have_one_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        made = [threads.submit(_stored_secret, tmp_path / KEY_FILE, ()) for _ in range(8)]
    assert len({future.result() for future in made}) == 1


async def agents_after(store: Store, folder: Path, kind: str, model: str | None = None) -> list[Agent]:
    owner = await first_member(store, kind=kind, model=model, servers={"tools": Server(command="x")})
    principal = Principal(owner.organization_id, owner.id)
    return (await store.list_agents(principal)).agents


async def test_the_demo_agent_becomes_a_real_one_once_there_is_a_key(store: Store, tmp_path: Path) -> None:
    (demo,) = await agents_after(store, tmp_path, "demo")
    (real,) = await agents_after(store, tmp_path, "claude", "m")
    assert (real.id, real.is_default, real.mcp_servers) == (demo.id, True, ["tools"])
    assert (real.name, real.kind, real.model) == ("Assistant", "claude", "m")
    assert await agents_after(store, tmp_path, "demo") == [real]


async def test_a_demo_agent_that_somebody_changed_stays_as_it_is(store: Store, tmp_path: Path) -> None:
    (demo,) = await agents_after(store, tmp_path, "demo")
    principal = Principal(demo.organization_id, "")
    changed = await store.update_agent(principal, replace(demo, instructions="Be brief.", updated_at="2100"))
    assert await agents_after(store, tmp_path, "claude") == [changed]
