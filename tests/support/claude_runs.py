"""What a run of a Claude agent is made of, without a server: an agent, messages, and a toolbox without tools."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

from agent_chat.agents import Part, Run, RunTools, Text, Tool
from agent_chat.agents.claude.agent import Claude
from agent_chat.stores.models import Agent, Message, Principal, new_id
from tests.support.anthropic_api import Gate, StandIn, says, text
from tests.support.claude_server import quick

AGENT = Agent(new_id(), "o", "", "claude", None, "", ["a"], None, None, True, {}, "", "")


def png(body: bytes = b"") -> str:
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()


def message(role: Any, content: str, number: int = 0, **run: Any) -> Message:
    metadata = {"run": run} if run else {}
    calls = run.pop("calls", [])
    return Message(new_id(), "t", content, "", role, calls, [], metadata, str(number))


class Tools:
    @property
    def missing(self) -> dict[str, str]:
        return {}

    async def available(self) -> list[Tool]:
        return []

    async def call(self, uses: Any, *, round: int = 0) -> Any:
        yield


ANSWER = says(text("Fine."))


FIRST_DELTA = 3


async def answer(model: Claude) -> list[Part]:
    run = Run(new_id(), Principal("o", "u"), AGENT, [message("user", "Hello")], RunTools(Tools()))
    return [part async for part in model.reply(run)]


def gated(service: StandIn, streams: int) -> list[Gate]:
    """Let each of so many requests wait at its first delta."""
    gates = [Gate() for _ in range(streams)]
    waiting = iter(gates)
    service.otherwise = lambda request: ANSWER.waits(FIRST_DELTA, next(waiting))
    return gates


async def streams_at_once(service: StandIn, streams: int) -> None:
    """Have so many streams open at the same time; fails where one does not begin before the others end."""
    model = quick(service, stall_seconds=60)
    gates = gated(service, streams)
    async with asyncio.timeout(0.1 * streams), asyncio.TaskGroup() as group:
        runs = [group.create_task(answer(model)) for _ in range(streams)]
        for gate in gates:
            await gate.reached.wait()
        assert not any(run.done() for run in runs)
        for gate in gates:
            gate.go.set()
    assert all(Text("Fine.") in run.result() for run in runs)
    await model.close()
