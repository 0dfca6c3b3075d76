"""The vocabulary that an agent's author needs.

An agent is an async generator: `async def reply(run: Run) -> AsyncIterator[Part]`. It is given a Run (what was
said so far, its own configuration, its tools) and yields parts; the server turns them into events, keeps them, and
shows them to whoever watches. It knows nothing of threads' logs, stores or HTTP.

    async def reply(run):
        yield Text("Let me look. ")
        async for part in run.tools.call([ToolUse("1", "current_time", {"timezone": "Asia/Tokyo"})]):
            yield part
        yield Text("Done.")

A base class was refused: there is one method, and a function is enough.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol

import msgspec

from agent_chat.stores.models import Agent, Attachment, JSONObject, Message, Principal


class Text(msgspec.Struct, frozen=True):
    """More of the answer, in Markdown. Before the text that follows a tool call the server inserts a blank line."""

    text: str


class Reasoning(msgspec.Struct, frozen=True):
    """More of what the model thinks: shown while it runs, not kept."""

    text: str


class ToolStarted(msgspec.Struct, frozen=True):
    """A tool is about to be called. `id` names the call within this run; `round` counts the model's turns, from 0.

    Yield it before the call is made: the generator is not resumed until the store has the first call that is not
    repeatable. `repeatable` means that making the call again does no harm: the tool only reads, is idempotent, or is
    not called at all. A run that fails after any other call is never retryable, and its Idempotency-Key stays used.
    """

    id: str
    tool_name: str
    arguments: JSONObject
    round: int = 0
    repeatable: bool = False


class ToolProgress(msgspec.Struct, frozen=True):
    """`progress` of `total` (null: unknown), with a word about it if the tool has one."""

    id: str
    progress: float
    total: float | None = None
    message: str | None = None


class ToolCompleted(msgspec.Struct, frozen=True):
    """The call ended, with an object as its result or an error in words: exactly one of the two is set."""

    id: str
    result: JSONObject | None = None
    error: str | None = None


class Ended(msgspec.Struct, frozen=True):
    """What is known about the answer: any of the fields of `message.metadata.run`. Optional; the last one counts."""

    stop_reason: str | None = None
    model: str | None = None
    usage: JSONObject | None = None


ToolPart = ToolStarted | ToolProgress | ToolCompleted
Part = Text | Reasoning | ToolPart | Ended


class AgentError(Exception):
    """The run fails, in words that the client may read; what was said so far is kept.

    Args:
        detail: one sentence for the client.
        code: `agent_failed`, `agent_overloaded` or `agent_timeout`.
        retryable: whether the same message may succeed later. The run is retryable only if, besides, it has called
            no tools but repeatable ones.
        retry_after: seconds, where the model's service said so.
    """

    def __init__(
        self, detail: str, *, code: str = "agent_failed", retryable: bool = False, retry_after: float | None = None
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code
        self.retryable = retryable
        self.retry_after = retry_after


class Tool(msgspec.Struct, frozen=True):
    """A tool as the model is told of it; `parameters` is a JSON Schema.

    `repeatable`: it declares itself read-only or idempotent (MCP's readOnlyHint, idempotentHint). See ToolStarted.
    """

    name: str
    description: str
    parameters: JSONObject
    repeatable: bool = False


class ToolUse(msgspec.Struct, frozen=True):
    """A call that the agent wants made."""

    id: str
    name: str
    arguments: JSONObject


class Toolbox(Protocol):
    """The tools of one agent, during one run."""

    async def available(self) -> list[Tool]:
        """The tools there are now. A server that can't be reached is left out, and `missing` says so."""
        ...

    @property
    def missing(self) -> dict[str, str]:
        """The servers that could not be reached, each with the reason in words."""
        ...

    def call(self, uses: Sequence[ToolUse], *, round: int = 0) -> AsyncIterator[ToolPart]:
        """Make the calls side by side and yield what happens, as it happens.

        Every call that started completes: an unknown tool, refused arguments, a dead server or a time limit is an
        `error` of its ToolCompleted, never an exception. Closing the iterator cancels the calls.
        """
        ...


class Files(Protocol):
    """The attachments of one run's thread."""

    async def text(self, attachment: Attachment) -> str | None:
        """The text that was extracted from it; "" for a picture, or where nothing could be read; null: it is lost."""
        ...

    async def picture(self, attachment: Attachment) -> bytes | None:
        """A picture's bytes, of a size that models take; null: they are lost."""
        ...


class NoFiles:
    """The Files of a thread without attachments."""

    async def text(self, attachment: Attachment) -> str | None:
        return None

    async def picture(self, attachment: Attachment) -> bytes | None:
        return None


class Run(msgspec.Struct, frozen=True):
    """What an agent is given: who asks, its own configuration, the messages so far (the last is the one to answer).

    `earlier`: the thread has older messages than these.
    """

    id: str
    who: Principal
    agent: Agent
    messages: list[Message]
    tools: Toolbox
    earlier: bool = False
    files: Files = NoFiles()


Reply = Callable[[Run], AsyncIterator[Part]]
MakeTitle = Callable[[Run], Awaitable[str]]
