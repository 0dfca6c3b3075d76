"""The tools of a run, with two call forms: one for generators, one for frameworks that call tools back.

A generator that decides on its calls itself iterates over `call` and yields the parts. A framework (pydantic-ai,
LangGraph, openai-agents) calls a function of ours from within its own loop, often in several concurrent tasks, while
the generator waits for the framework's next event and cannot yield. `invoke` is for that function: it publishes the
parts of the call itself. A queue that the generator would have to drain was refused: a generator that forgets to drain
it would hide its calls, and the store could not have a call before it is made.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol

import msgspec
from msgspec.structs import replace

from agent_chat.agents.parts import ToolCompleted, ToolPart
from agent_chat.stores.models import JSONObject, new_id

Publish = Callable[[ToolPart], Awaitable[None]]


class Tool(msgspec.Struct, frozen=True):
    """A tool as it is described to the model.

    Attributes:
        parameters: a JSON Schema of the arguments.
        repeatable: the tool declares itself read-only or idempotent (MCP's readOnlyHint, idempotentHint).
    """

    name: str
    description: str
    parameters: JSONObject
    repeatable: bool = False


class ToolUse(msgspec.Struct, frozen=True):
    """A call that the agent requests. `id` is unique within the run; with "" the server makes one."""

    id: str
    name: str
    arguments: JSONObject


class Toolbox(Protocol):
    """Where the tools of one run come from. The server implements it with MCP servers, tests with scripted tools."""

    async def available(self) -> list[Tool]:
        """List the tools. Those of an unreachable server are missing; `missing` then has its name."""
        ...

    @property
    def missing(self) -> dict[str, str]:
        """The unreachable servers by name, each with the reason in a sentence."""
        ...

    def call(self, uses: Sequence[ToolUse], *, round: int = 0) -> AsyncIterator[ToolPart]:
        """Make the calls concurrently and yield their parts as they come.

        The first parts are one ToolStarted for each use; no call is made before the iterator is asked for more. Every
        started call completes: an unknown tool, invalid arguments, an unreachable server or a time limit is the
        `error` of its ToolCompleted, never an exception. Closing the iterator cancels the calls.
        """
        ...


def _with_id(use: ToolUse) -> ToolUse:
    return use if use.id else replace(use, id=new_id())


async def _publish_nothing(part: ToolPart) -> None:
    pass


class RunTools:
    """`run.tools`: the tools of one run.

    Args:
        toolbox: where the tools come from.
        publish: publishes a part in the run's thread. Raises CancelledError once the run has ended. The default
            publishes nothing.
    """

    def __init__(self, toolbox: Toolbox, publish: Publish = _publish_nothing) -> None:
        self._toolbox = toolbox
        self._publish = publish
        self._round = -1
        self._calls: set[asyncio.Task[ToolCompleted]] = set()
        self._closed = False

    async def available(self) -> list[Tool]:
        """List the tools. Those of an unreachable server are missing; `missing` then has its name."""
        return await self._toolbox.available()

    @property
    def missing(self) -> dict[str, str]:
        """The unreachable servers by name, each with the reason in a sentence."""
        return self._toolbox.missing

    def call(self, uses: Sequence[ToolUse], *, round: int = 0) -> AsyncIterator[ToolPart]:
        """Make the calls concurrently and yield their parts, which the generator yields in turn. See Toolbox.call."""
        self._round = max(self._round, round)
        return self._toolbox.call([_with_id(use) for use in uses], round=round)

    async def invoke(self, use: ToolUse, *, round: int | None = None) -> ToolCompleted:
        """Make one call and publish its parts, which the generator must not yield again.

        For frameworks that call tools back; any number of invocations may run at the same time, in any task. What the
        generator yielded before comes before the call, and what it yields after `invoke` has returned comes after it.
        The call is made only after the store has it, unless its tool is repeatable. A failure of the tool is the
        `error` of what is returned. Cancelling the caller cancels the call.

        Args:
            round: the model's turn that requested the call. By default calls that overlap share a round, and a call
                that begins when no other one is open begins the next round.

        Raises: asyncio.CancelledError if the run has ended.
        """
        if self._closed:
            raise asyncio.CancelledError("the run has ended")
        if round is None:
            round = max(0, self._round if self._calls else self._round + 1)
        self._round = max(self._round, round)
        use = _with_id(use)
        # a task of its own, so that close() can end it where a framework has left it behind
        call = asyncio.create_task(self._invoke(use, round), name=f"tool call {use.id}")
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return await call

    async def publish(self, part: ToolPart) -> None:
        """Publish a part of a call that the framework makes itself, from its callback. Await it before the call.

        Raises: asyncio.CancelledError if the run has ended.
        """
        await self._publish(part)

    async def close(self) -> None:
        """Cancel the invocations that are still open. The server calls it when the run has ended."""
        self._closed = True
        for call in self._calls:
            call.cancel()
        if self._calls:
            await asyncio.wait(self._calls)

    async def _invoke(self, use: ToolUse, round: int) -> ToolCompleted:
        is_open = False
        parts = self._toolbox.call([use], round=round)
        try:
            async for part in parts:
                await self._publish(part)
                is_open = not isinstance(part, ToolCompleted)
                if isinstance(part, ToolCompleted):
                    return part
            raise RuntimeError(f"the toolbox did not complete the call {use.id!r}")
        except asyncio.CancelledError:
            if is_open:  # the framework has given up this call; the run may go on without it
                await self._publish(ToolCompleted(use.id, error="The call was cancelled."))
            raise
        finally:
            if isinstance(parts, AsyncGenerator):
                await parts.aclose()
