"""A tool whose schema the model's service rejects must not fail an agent's answers."""

from __future__ import annotations

from typing import Any

import pytest

from agent_chat.agents import Ended, Run, RunTools, Text, Tool
from agent_chat.agents.claude.agent import Claude
from agent_chat.stores.models import Principal, new_id
from tests.support.anthropic_api import StandIn
from tests.support.claude_runs import AGENT, Tools, message

GOOD = {"type": "object", "properties": {"a.b-c_1": {"type": "integer", "exclusiveMinimum": 0}}}
BAD: dict[str, dict[str, Any]] = {
    "a number of draft 4": {"type": "object", "properties": {"a": {"exclusiveMinimum": True}}},
    "a tuple of draft 7": {"type": "object", "properties": {"a": {"items": [{"type": "string"}]}}},
    "a bracket in a name": {"type": "object", "properties": {"filter[id]": {}}},
    "a dollar in a name": {"type": "object", "properties": {"$top": {}}},
    "a long name": {"type": "object", "properties": {"x" * 65: {}}},
}


class Two(Tools):
    """A valid tool and an invalid one, as a third-party toolbox may offer them."""

    def __init__(self, bad: dict[str, Any]) -> None:
        draft = {"$schema": "http://json-schema.org/draft-04/schema#"}
        self._tools = [Tool("good", "", {**GOOD, **draft}), Tool("bad", "", {**bad, **draft})]

    async def available(self) -> list[Tool]:
        return self._tools


@pytest.mark.parametrize("why", BAD)
async def test_a_tool_that_the_service_would_reject_is_skipped(service: StandIn, claude: Claude, why: str) -> None:
    run = Run(new_id(), Principal("o", "u"), AGENT, [message("user", "Hello")], RunTools(Two(BAD[why])))
    parts = [part async for part in claude.reply(run) if not isinstance(part, Ended)]
    assert parts == [Text("Fine.")]
    assert service.refused == []
    assert [tool["name"] for tool in service.requests[-1]["tools"]] == ["good"]
