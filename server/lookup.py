"""Finds the agent, the thread and the message that a request names, within the caller's organization.

Agents are named by an id or by the word `default`: the organization's default agent or, where a thread is named too,
whichever agent the thread has. Another organization's object is not found.
"""

from __future__ import annotations

from agent_chat.server.errors import AgentDeleted
from agent_chat.stores.contracts import Store, ThreadPart
from agent_chat.stores.errors import AgentNotFound, MessageNotFound, ThreadNotFound
from agent_chat.stores.models import Agent, Message, Principal, Thread, is_id

DEFAULT = "default"


class Lookup:
    """Reads what requests name."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def agent(self, principal: Principal, agent_ref: str, *, deleted: bool = False) -> Agent:
        """The agent; `deleted`: also if it was deleted. Raises: AgentNotFound."""
        if agent_ref == DEFAULT:
            return await self._store.get_agent(principal, None)
        if not is_id(agent_ref):
            raise AgentNotFound(agent_ref)
        return await self._store.get_agent(principal, agent_ref, deleted=deleted)

    async def agent_of(self, principal: Principal, thread: Thread) -> Agent:
        """The agent that answers in the thread. Raises: AgentDeleted."""
        try:
            return await self._store.get_agent(principal, thread.agent_id)
        except AgentNotFound as error:
            raise AgentDeleted(thread.agent_id) from error

    async def thread(
        self, principal: Principal, agent_ref: str, thread_id: str, *, message_limit: int = 0
    ) -> ThreadPart:
        """The thread with its latest messages, in one read: a thread names its agent.

        Raises: ThreadNotFound, also for another agent's thread; AgentNotFound if there is no such agent either.
        """
        try:
            if not is_id(thread_id):
                raise ThreadNotFound(thread_id)
            part = await self._store.read(principal, thread_id, message_limit=message_limit)
            if agent_ref not in (DEFAULT, part.thread.agent_id):
                raise ThreadNotFound(thread_id)
        except ThreadNotFound:
            if agent_ref != DEFAULT:
                await self.agent(principal, agent_ref, deleted=True)
            raise
        return part

    async def message(self, principal: Principal, thread_id: str, message_id: str) -> Message:
        """Raises: ThreadNotFound, MessageNotFound."""
        if not is_id(message_id):
            raise MessageNotFound(message_id)
        return await self._store.get_message(principal, thread_id, message_id)
