"""`python -m server keys …` beside a running server: a key is valid from its creation to its revocation."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from agent_chat.server.command_line import main
from agent_chat.server.timing import Timing
from tests.support.client import Client
from tests.support.servers import Live, live_server


@pytest.fixture
async def live(tmp_path: Path) -> AsyncIterator[Live]:
    async with live_server(tmp_path, timing=Timing(key_lookup=0.0)) as live:
        yield live


async def run_keys(live: Live, *words: str) -> str:
    """The command in a process of its own; what it prints."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "server", "keys", *words),
        env={**os.environ, "CHAT_DATA_DIR": str(live.data_dir)},
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(20):
        out, _ = await process.communicate()
    assert process.returncode == 0
    return out.decode()


async def call_keys(live: Live, *words: str) -> str:
    """The same without waiting for another interpreter."""
    environment = {"CHAT_DATA_DIR": str(live.data_dir)}
    result = await asyncio.to_thread(CliRunner().invoke, main, ["keys", *words], env=environment)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.slow
async def test_a_key_created_beside_a_running_server_works_until_it_is_revoked(live: Live) -> None:
    told = await run_keys(live, "create", "--organization", "acme", "--user", "bob")
    bob = Client(live.url, told.split()[-1])
    try:
        assert (await bob.http.get("/api/v1/agents")).status_code == 200
        row = next(row for row in (await call_keys(live, "list")).splitlines() if "\tbob\t" in row)
        key_id, organization, _, _, source, _, state = row.split("\t")
        assert (organization, source, state) == ("acme", "command_line", "valid")
        assert told.split()[-1] not in row
        assert await call_keys(live, "revoke", key_id) == f"Revoked {key_id}\n"
        assert (await bob.http.get("/api/v1/agents")).status_code == 401
        assert "\trevoked " in next(row for row in (await call_keys(live, "list")).splitlines() if "\tbob\t" in row)
        assert (await live.http.get("/api/v1/agents")).status_code == 200
    finally:
        await bob.http.aclose()
