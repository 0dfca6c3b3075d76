"""The contract of the directory: organizations, their users, keys and agents."""

from __future__ import annotations

from typing import Protocol

import msgspec

from agent_chat.stores.fitting import READ_BYTES
from agent_chat.stores.models import Agent, Key, KeySource, Organization, Principal, User

SESSIONS_PER_KEY = 1000


class AgentPage(msgspec.Struct, frozen=True):
    """Agents, oldest first. `more`: there are further agents after these."""

    agents: list[Agent]
    more: bool


class Directory(Protocol):
    """Organizations, users, keys and agents. Keys and sessions are stored as hashes (I11)."""

    async def create_organization(self, name: str) -> Organization:
        """Create an organization, or return the one that has this name, even if it was created concurrently."""
        ...

    async def find_organization(self, id_or_name: str) -> Organization | None:
        """Return the organization, or None."""
        ...

    async def create_user(self, organization_id: str, name: str) -> User:
        """Create a user of the organization, or return the one that has this name."""
        ...

    async def find_user(self, organization_id: str, id_or_name: str) -> User | None:
        """Return the organization's user, or None."""
        ...

    async def create_key(self, user: User, secret: str, source: KeySource | None = None) -> Key:
        """Store the hash of `secret` as a key that is held from now on.

        A valid key with the same secret is returned instead; it gets `source` if it has none.
        """
        ...

    async def hold_key(self, key_id: str) -> bool:
        """Record that a process uses the key now, by the database's clock; False if it is revoked or unknown."""
        ...

    async def revoke_unheld_keys(self, source: KeySource, *, keep: str | None, seconds: float) -> list[Key]:
        """Revoke the valid keys of this source that no process has held for `seconds`, except the key with id `keep`.

        Returns the keys that this call revoked.
        """
        ...

    async def list_keys(self) -> list[Key]:
        """Return every key of the installation, also revoked ones, oldest first: for the operator, not for the API."""
        ...

    async def revoke_key(self, key_id: str) -> Key:
        """Revoke the key. Raises: KeyNotFound."""
        ...

    async def find_principal(self, secret: str) -> Principal | None:
        """Return the principal of an unrevoked key; None for any other string."""
        ...

    async def create_session(
        self, secret: str, token: str, *, seconds: float, limit: int = SESSIONS_PER_KEY
    ) -> Principal | None:
        """Store the hash of `token`, which stands for the valid key `secret` for `seconds`; None for any other secret.

        Deletes the sessions that have expired, and the oldest of this key beyond `limit`.
        """
        ...

    async def find_session_principal(self, token: str) -> Principal | None:
        """Return the principal of an unexpired session whose key is not revoked; None for any other string."""
        ...

    async def delete_session(self, token: str) -> None:
        """Delete the session, if it exists."""
        ...

    async def create_agent(self, principal: Principal, agent: Agent) -> Agent:
        """Store a new agent. It becomes the default if it says so, or if the organization has no default."""
        ...

    async def list_agents(
        self, principal: Principal, *, limit: int = 100, offset: int = 0, max_bytes: int = READ_BYTES
    ) -> AgentPage:
        """Return the organization's agents that are not deleted, oldest first.

        Fewer than `limit` where they would exceed `max_bytes` of JSON, but at least one (I9).
        """
        ...

    async def get_agent(self, principal: Principal, agent_id: str | None, *, deleted: bool = False) -> Agent:
        """Return one agent; for None the organization's default. `deleted` includes deleted agents.

        Raises: AgentNotFound.
        """
        ...

    async def update_agent(self, principal: Principal, agent: Agent, *, is_default: bool | None = None) -> Agent:
        """Replace the agent.

        Args:
            is_default: True makes it the default; False leaves the organization without one if it is the default;
                None changes nothing, whatever `agent.is_default` was when the agent was read.

        Raises: AgentNotFound.
        """
        ...

    async def delete_agent(self, principal: Principal, agent_id: str) -> None:
        """Hide the agent; its threads stay readable. The oldest remaining agent becomes the default if it was.

        Raises: AgentNotFound.
        """
        ...
