"""Connections to a model's service that closes idle connections."""

from __future__ import annotations

import asyncio

import pytest

from agent_chat.agents import Run, RunTools
from agent_chat.agents.claude import agent as claude
from agent_chat.stores.models import Principal, new_id
from tests.support.anthropic_api import stand_in
from tests.support.claude_runs import AGENT, Tools, message
from tests.support.claude_server import quick


async def test_no_request_is_sent_on_a_connection_that_the_service_is_about_to_close(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(claude, "IDLE_SECONDS", claude.IDLE_SECONDS / 5)
    caplog.set_level("INFO", claude.__name__)

    async def ask() -> None:
        run = Run(new_id(), Principal("o", "u"), AGENT, [message("user", "Hello")], RunTools(Tools()))
        assert [part async for part in model.reply(run)]

    async with stand_in(keep_alive_seconds=1) as service:
        model = quick(service)
        for idle in (0.96, 0.98, 1.0):
            await asyncio.gather(*[ask() for _ in range(40)])
            await asyncio.sleep(idle)
            await asyncio.gather(*[ask() for _ in range(40)])
        await model.close()
    assert [record.getMessage() for record in caplog.records if record.name == claude.__name__] == []
