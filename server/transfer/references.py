"""Users and agents of an organization, which files name rather than identify: ids differ between installations."""

from __future__ import annotations

from collections import Counter

from agent_chat.server.lookup import DEFAULT
from agent_chat.stores.contracts import Store
from agent_chat.stores.errors import AgentNotFound, StoreError
from agent_chat.stores.models import Agent, Principal, is_id


class UnknownReference(StoreError):
    """A file or an option names something that the organization does not have. The text is the whole sentence."""


class References:
    """Names and ids of one organization's users and agents, each read once.

    Deleted agents have only their id: their threads stay readable.
    """

    def __init__(self, store: Store, organization_id: str) -> None:
        self._store = store
        self._principal = Principal(organization_id, "")
        self._agents: list[Agent] | None = None
        self._agent_ids: dict[str, str] = {}
        self._agent_names: dict[str, str] | None = None
        self._user_ids: dict[str, str] = {}
        self._user_names: dict[str, str] = {}

    async def user_id(self, reference: str, *, create: bool = True) -> str:
        """The user's id; a new name creates a user, unless `create` is False. Raises: UnknownReference."""
        if reference not in self._user_ids:
            organization_id = self._principal.organization_id
            user = await self._store.find_user(organization_id, reference)
            if user is None and (is_id(reference) or not create):
                raise UnknownReference(f"The organization has no user {reference!r}.")
            user = user or await self._store.create_user(organization_id, reference)
            self._user_ids[reference] = user.id
        return self._user_ids[reference]

    async def user_name(self, user_id: str) -> str:
        """The user's name; the id if there is no such user."""
        if user_id not in self._user_names:
            user = await self._store.find_user(self._principal.organization_id, user_id)
            self._user_names[user_id] = user.name if user and not is_id(user.name) else user_id
        return self._user_names[user_id]

    async def agent_id(self, reference: str) -> str:
        """The id of the agent with this id or name, or of the default agent. Raises: UnknownReference."""
        if reference not in self._agent_ids:
            self._agent_ids[reference] = await self._find_agent(reference)
        return self._agent_ids[reference]

    async def agent_name(self, agent_id: str) -> str:
        """The agent's name if it names this agent and no other; else the id."""
        if self._agent_names is None:
            agents = await self._list_agents()
            counts = Counter(agent.name for agent in agents)
            unclear = {name for name, count in counts.items() if count > 1 or name == DEFAULT or is_id(name)}
            self._agent_names = {agent.id: agent.name for agent in agents if agent.name not in unclear}
        return self._agent_names.get(agent_id, agent_id)

    async def _find_agent(self, reference: str) -> str:
        if reference == DEFAULT or is_id(reference):
            try:
                id = None if reference == DEFAULT else reference
                return (await self._store.get_agent(self._principal, id, deleted=True)).id
            except AgentNotFound as error:
                raise UnknownReference(f"The organization has no agent {reference!r}.") from error
        found = [agent.id for agent in await self._list_agents() if agent.name == reference]
        if len(found) > 1:
            raise UnknownReference(f"The organization has {len(found)} agents named {reference!r}: use an id.")
        if not found:
            raise UnknownReference(f"The organization has no agent {reference!r}.")
        return found[0]

    async def _list_agents(self) -> list[Agent]:
        if self._agents is None:
            self._agents = []
            more = True
            while more:
                page = await self._store.list_agents(self._principal, offset=len(self._agents))
                self._agents += page.agents
                more = page.more
        return self._agents
