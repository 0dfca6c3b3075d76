"""The first key: kept in the data folder, whole or not at all, and dead once it was revoked."""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from msgspec.structs import replace

from agents.mcp_config import Server
from server.organizations import KEY_FILE, _kept_secret, first_start
from stores.contracts import Store
from stores.models import Agent, Principal
from stores.sqlite import open_sqlite


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await open_sqlite(tmp_path / "chat.db")
    try:
        yield opened
    finally:
        await opened.close()


async def start(store: Store, folder: Path, api_key: str | None = None) -> str:
    return await first_start(store, folder, api_key, kind="demo", model=None, servers={})


async def revoke(store: Store, secret: str) -> None:
    for key in await store.keys():
        if key.hint[-4:] == secret[-4:]:
            await store.revoke_key(key.id)


async def test_every_start_has_the_same_key_which_only_its_owner_can_read(store: Store, tmp_path: Path) -> None:
    key = await start(store, tmp_path)
    assert await start(store, tmp_path) == key
    assert await store.principal(key) is not None
    assert stat.S_IMODE((tmp_path / KEY_FILE).stat().st_mode) == 0o600
    assert [name for name in os.listdir(tmp_path) if name.startswith(KEY_FILE)] == [KEY_FILE]


async def test_a_first_key_that_was_revoked_is_replaced_and_stays_revoked(store: Store, tmp_path: Path) -> None:
    old = await start(store, tmp_path)
    await revoke(store, old)
    new = await start(store, tmp_path)
    assert await store.principal(old) is None
    assert await store.principal(new) is not None
    assert await start(store, tmp_path) == new
    assert stat.S_IMODE((tmp_path / KEY_FILE).stat().st_mode) == 0o600


async def test_the_environments_key_is_valid_again_from_the_next_start_on(store: Store, tmp_path: Path) -> None:
    for _ in range(2):
        assert await start(store, tmp_path, "from-the-environment") == "from-the-environment"
        assert await store.principal("from-the-environment") is not None
        await revoke(store, "from-the-environment")
    assert not (tmp_path / KEY_FILE).exists()


async def test_an_empty_key_file_is_no_key(store: Store, tmp_path: Path) -> None:
    (tmp_path / KEY_FILE).write_text("\n")
    key = await start(store, tmp_path)
    assert key
    assert await start(store, tmp_path) == key


def test_those_who_start_together_have_one_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        made = [threads.submit(_kept_secret, tmp_path / KEY_FILE, ()) for _ in range(8)]
    assert len({future.result() for future in made}) == 1


async def agents_after(store: Store, folder: Path, kind: str, model: str | None = None) -> list[Agent]:
    key = await first_start(store, folder, "a-key", kind=kind, model=model, servers={"tools": Server(command="x")})
    who = await store.principal(key)
    assert who is not None
    return (await store.agents(who)).agents


async def test_the_demo_agent_becomes_a_real_one_once_there_is_a_key(store: Store, tmp_path: Path) -> None:
    (demo,) = await agents_after(store, tmp_path, "demo")
    (real,) = await agents_after(store, tmp_path, "claude", "m")
    assert (real.id, real.is_default, real.mcp_servers) == (demo.id, True, ["tools"])
    assert (real.name, real.kind, real.model) == ("Assistant", "claude", "m")
    assert await agents_after(store, tmp_path, "demo") == [real]


async def test_a_demo_agent_that_somebody_changed_stays_as_it_is(store: Store, tmp_path: Path) -> None:
    (demo,) = await agents_after(store, tmp_path, "demo")
    who = Principal(demo.organization_id, "")
    changed = await store.update_agent(who, replace(demo, instructions="Be brief.", updated_at="2100"))
    assert await agents_after(store, tmp_path, "claude") == [changed]
