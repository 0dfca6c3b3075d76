"""An agent for tests that carries out the user's message, one command a line.

say TEXT            one delta
text JSON           one delta, written as a JSON string: of several lines
think TEXT          one reasoning delta
count N [MS]        N deltas ("0 ", "1 ", …), MS milliseconds apart
tool NAME JSON      call a tool of the agent's MCP servers and wait for it
open NAME           start a tool call that is never completed; `lookup NAME` one that is repeatable
result NAME JSON    a tool call with this result, without a tool
file NAME TEXT      a text file of the answer
hold NAME           report it (`Gates.reached`) and wait for the test (`Gates.release`)
until NAME          AgentError that may be retried, until the test has released NAME
fail DETAIL         AgentError; `overload DETAIL` one that may be retried; `crash` an exception of another kind
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path

from agent_chat.agents import AgentError, File, Part, Reasoning, Run, Text, ToolCompleted, ToolStarted, ToolUse

INTERNAL_TEXT = "secret internal text"


class Gates:
    """Where scripts wait, by name: tests wait until a script has reached a gate, and release it."""

    def __init__(self) -> None:
        self._reached: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._released: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    async def reached(self, name: str) -> None:
        async with asyncio.timeout(10):
            await self._reached[name].wait()

    def release(self, name: str) -> None:
        self._released[name].set()

    def released(self, name: str) -> bool:
        return self._released[name].is_set()

    async def hold(self, name: str) -> None:
        self._reached[name].set()
        await self._released[name].wait()


class FolderGates(Gates):
    """Gates between processes: files `NAME.reached` and `NAME.released` in a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    async def reached(self, name: str) -> None:
        async with asyncio.timeout(20):
            while not (self._folder / f"{name}.reached").exists():  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    def release(self, name: str) -> None:
        (self._folder / f"{name}.released").touch()

    def released(self, name: str) -> bool:
        return (self._folder / f"{name}.released").exists()

    async def hold(self, name: str) -> None:
        (self._folder / f"{name}.reached").touch()
        while not (self._folder / f"{name}.released").exists():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


class Scripted:
    """The reply function of kind `scripted`."""

    def __init__(self, gates: Gates | None = None) -> None:
        self.gates = gates or Gates()

    async def __call__(self, run: Run) -> AsyncIterator[Part]:
        for number, line in enumerate(run.messages[-1].content.splitlines()):
            command, _, rest = line.partition(" ")
            match command:
                case "say":
                    yield Text(rest)
                case "text":
                    yield Text(json.loads(rest))
                case "think":
                    yield Reasoning(rest)
                case "count":
                    count, _, delay = rest.partition(" ")
                    for index in range(int(count)):
                        yield Text(f"{index} ")
                        await asyncio.sleep(float(delay or 0) / 1000)
                case "tool":
                    name, _, arguments = rest.partition(" ")
                    async for part in run.tools.call([ToolUse(f"call_{number}", name, json.loads(arguments))]):
                        yield part
                case "open" | "lookup":
                    yield ToolStarted(f"call_{number}", rest, {}, repeatable=command == "lookup")
                case "result":
                    name, _, result = rest.partition(" ")
                    yield ToolStarted(f"call_{number}", name, {})
                    yield ToolCompleted(f"call_{number}", json.loads(result))
                case "file":
                    name, _, content = rest.partition(" ")
                    yield File(name, "text/plain", content.encode())
                case "until":
                    if not self.gates.released(rest):
                        raise AgentError(f"waiting for {rest}", code="agent_overloaded", retryable=True)
                case "hold":
                    await self.gates.hold(rest)
                case "fail":
                    raise AgentError(rest)
                case "overload":
                    raise AgentError(rest, code="agent_overloaded", retryable=True)
                case "crash":
                    raise RuntimeError(INTERNAL_TEXT)
                case _:
                    yield Text(line)


async def tells(run: Run) -> AsyncIterator[Part]:
    """Says what it was given."""
    thinking = run.agent.metadata.get("thinking", {}).get("budget_tokens")
    tools = sorted(tool.name for tool in await run.tools.available())
    yield Text(f"{run.agent.model} {run.agent.max_tokens} {thinking} {'echo' in tools} {run.tools.missing}")
