"""Runs reply functions in tests: no server, no store, no model.

    from agent_chat.agents.testing import ScriptedTools, run_reply

    async def test_it_reports_the_time() -> None:
        tools = ScriptedTools({"current_time": {"time": "12:00"}})
        answer = await run_reply(reply, "What time is it?", tools=tools)
        assert answer.content == "It is 12:00."
        assert tools.uses[0].arguments == {"timezone": "UTC"}

The parts become the message by the same class as in the server (agents/answer.py), so that an agent which violates a
rule, such as completing a call that it never started, fails here too.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Literal

import msgspec
from msgspec.structs import replace

from agent_chat.agents.answer import AnswerBuilder
from agent_chat.agents.parts import AgentError, File, Part, ToolCompleted, ToolPart, ToolStarted
from agent_chat.agents.registry import Kind, OpenKind
from agent_chat.agents.run import Files, NoFiles, Reply, Run
from agent_chat.agents.tools import RunTools, Tool, ToolUse
from agent_chat.stores.models import (
    Agent,
    Attachment,
    JSONObject,
    Message,
    Principal,
    ToolCall,
    new_answer,
    new_id,
    timestamp,
    utcnow,
)

__all__ = ["Answer", "Function", "ScriptedTools", "make_agent", "make_message", "run_kind", "run_reply"]

Function = Callable[[JSONObject], JSONObject | Awaitable[JSONObject]]
"""The script of a tool: its result for given arguments. Whatever it raises becomes the error of the call."""

PRINCIPAL = Principal("organization", "user")
_THREAD_ID = "thread"


class ScriptedTools:
    """A Toolbox whose tools return what the test says.

    Args:
        results: by the tool's name its result, its error (a string), or a function of the arguments.
        tools: how the tools are described to a model; by default with a schema that accepts any object.
        missing: unreachable servers by name, with the reason.

    Attributes:
        uses: the calls that were made, in order.
    """

    def __init__(
        self,
        results: Mapping[str, JSONObject | str | Function] = {},
        *,
        tools: Sequence[Tool] = (),
        missing: Mapping[str, str] = {},
    ) -> None:
        self.uses: list[ToolUse] = []
        self._results = dict(results)
        self._described = {tool.name: tool for tool in tools}
        self._missing = dict(missing)

    async def available(self) -> list[Tool]:
        """See Toolbox."""
        return [self._described.get(name) or Tool(name, "", {"type": "object"}) for name in self._results]

    @property
    def missing(self) -> dict[str, str]:
        """See Toolbox."""
        return dict(self._missing)

    async def call(self, uses: Sequence[ToolUse], *, round: int = 0) -> AsyncGenerator[ToolPart, None]:
        """See Toolbox."""
        for use in uses:
            tool = self._described.get(use.name)
            yield ToolStarted(use.id, use.name, use.arguments, round, repeatable=tool is not None and tool.repeatable)
        calls = [asyncio.create_task(self._complete(use)) for use in uses]
        try:
            for call in asyncio.as_completed(calls):
                yield await call
        finally:
            for task in calls:
                task.cancel()
            if calls:
                await asyncio.wait(calls)

    async def _complete(self, use: ToolUse) -> ToolCompleted:
        self.uses.append(use)
        match self._results.get(use.name):
            case None:
                return ToolCompleted(use.id, error=f"There is no tool named {use.name!r}.")
            case str(error):
                return ToolCompleted(use.id, error=error)
            case dict(result):
                return ToolCompleted(use.id, result)
            case function:
                try:
                    outcome = function(use.arguments)
                    return ToolCompleted(use.id, await outcome if inspect.isawaitable(outcome) else outcome)
                except Exception as error:
                    return ToolCompleted(use.id, error=str(error) or type(error).__name__)


class Answer(msgspec.Struct, frozen=True):
    """What a run generated.

    Attributes:
        parts: what the reply function yielded and what its tools published, in the order in which clients see it.
        message: the message as the server would store it, without `content_html`.
        error: the AgentError with which the run failed.
    """

    parts: list[Part]
    message: Message
    error: AgentError | None = None

    @property
    def content(self) -> str:
        """The text of the answer."""
        return self.message.content

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The tool calls of the answer."""
        return self.message.tool_calls

    @property
    def attachments(self) -> list[Attachment]:
        """The attachments of the answer."""
        return self.message.attachments


def make_agent(**fields: object) -> Agent:
    """An agent's configuration; `fields` replaces any of it, such as `metadata`."""
    agent = Agent("agent", PRINCIPAL.organization_id, "Agent", "test", None, "", [], None, None, True, {}, "", "")
    return replace(agent, **fields)


def make_message(
    content: str, role: Literal["user", "assistant", "system"] = "user", attachments: Sequence[Attachment] = ()
) -> Message:
    """A stored message of the thread."""
    now = timestamp(utcnow())
    return Message(new_id(), _THREAD_ID, content, "", role, [], list(attachments), {}, now)


async def run_reply(
    reply: Reply,
    messages: str | Sequence[Message],
    *,
    tools: ScriptedTools | None = None,
    agent: Agent | None = None,
    files: Files | None = None,
    seconds: float = 30.0,
) -> Answer:
    """Run a reply function to its end.

    Args:
        messages: the thread, oldest first, or the text of its only message.
        seconds: how long it may take.

    Raises: TimeoutError; whatever the reply function raises except AgentError; TypeError and ValueError for parts
        that the server rejects.
    """
    thread = [make_message(messages)] if isinstance(messages, str) else list(messages)
    claimed = new_answer(_THREAD_ID, thread[-1].id if thread else "", None, timestamp(utcnow()))
    builder = AnswerBuilder(claimed, utcnow)
    parts: list[Part] = []

    async def take(part: Part) -> None:
        if isinstance(part, File):
            builder.attach(_make_attachment(part))
        else:
            builder.take(part)
        parts.append(part)

    run_tools = RunTools(tools or ScriptedTools(), take)
    run = Run(claimed.id, PRINCIPAL, agent or make_agent(), thread, run_tools, files=files or NoFiles())
    try:
        async with asyncio.timeout(seconds):
            await _exhaust(reply, run, take)
    except AgentError as error:
        failure = {"code": error.code, "detail": error.detail, "retryable": error.retryable}
        return Answer(parts, builder.message().with_run(status="failed", error=failure), error)
    finally:
        await run_tools.close()
    return Answer(parts, builder.message().with_run(status="completed"))


async def run_kind(
    kind: Kind | OpenKind, messages: str | Sequence[Message], *, tools: ScriptedTools | None = None
) -> Answer:
    """Open the kind, run its reply function as `run_reply` does, and close it."""
    async with AsyncExitStack() as stack:
        opened = await stack.enter_async_context(kind.open()) if isinstance(kind, OpenKind) else kind
        return await run_reply(opened.reply, messages, tools=tools)


async def _exhaust(reply: Reply, run: Run, take: Callable[[Part], Awaitable[None]]) -> None:
    parts = reply(run)
    try:
        async for part in parts:
            await take(part)
    finally:
        if isinstance(parts, AsyncGenerator):
            await parts.aclose()


def _make_attachment(file: File) -> Attachment:
    digest = hashlib.sha256(file.data).hexdigest()
    now = timestamp(utcnow())
    return Attachment(new_id(), file.name, file.content_type, len(file.data), digest, "ready", 0, False, None, now)
