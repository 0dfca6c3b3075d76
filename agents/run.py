"""What an agent is given: the Run, and the types of the functions that make up a kind of agents."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

import msgspec

from agent_chat.agents.parts import Part
from agent_chat.agents.tools import RunTools
from agent_chat.stores.models import Agent, Attachment, Message, Principal


class Files(Protocol):
    """Reads the attachments of one run's thread."""

    async def text(self, attachment: Attachment) -> str | None:
        """The text that was extracted from it: "" for a picture or where there was none to read; None if it is lost."""
        ...

    async def picture(self, attachment: Attachment) -> bytes | None:
        """A picture's bytes, scaled down to a size that models accept; None if they are lost."""
        ...


class NoFiles:
    """The Files of a thread without attachments."""

    async def text(self, attachment: Attachment) -> str | None:
        """See Files."""
        return None

    async def picture(self, attachment: Attachment) -> bytes | None:
        """See Files."""
        return None


class Run(msgspec.Struct, frozen=True):
    """One run of an agent: everything that its reply function is given.

    Attributes:
        id: the run's id, which is also the id of the message that it generates.
        principal: the user who posted the message, and the organization.
        agent: the agent's configuration.
        messages: the thread's messages, oldest first; the last one is to be answered.
        tools: the agent's tools.
        earlier: whether the thread has older messages than these.
        files: reads the attachments of the messages.
    """

    id: str
    principal: Principal
    agent: Agent
    messages: list[Message]
    tools: RunTools
    earlier: bool = False
    files: Files = NoFiles()

    @property
    def thread_id(self) -> str:
        """The thread's id, for frameworks that have a memory of their own; "" without messages."""
        return self.messages[-1].thread_id if self.messages else ""


Reply = Callable[[Run], AsyncIterator[Part]]
"""Generates the answer to the last message of a run."""

MakeTitle = Callable[[Run], Awaitable[str]]
"""Generates a title for the thread of a run."""
