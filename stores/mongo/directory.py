"""The Directory contract on MongoDB: organizations, users, keys, sessions and agents.

`order` sorts records by their creation: nanoseconds on the clock of the process that created them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

import msgspec
from msgspec.structs import asdict, replace

from agent_chat.stores import rules
from agent_chat.stores.contracts import SESSIONS_PER_KEY, AgentPage
from agent_chat.stores.errors import AgentNotFound, KeyNotFound, StoreUnavailable
from agent_chat.stores.fitting import READ_BYTES, select_fitting
from agent_chat.stores.models import Agent, Key, KeySource, Organization, Principal, User, hash_of, timestamp
from agent_chat.stores.mongo.database import MongoBase
from agent_chat.stores.mongo.native import Document

_OLDEST_FIRST = [("order", 1)]


def _build_document(record: Organization | User | Key) -> Document:
    fields = asdict(record)
    return {"_id": fields.pop("id"), **fields, "order": time.time_ns()}


def _build_organization(document: Document) -> Organization:
    return Organization(document["_id"], document["name"], document["default_agent_id"], document["created_at"])


def _build_user(document: Document) -> User:
    return User(document["_id"], document["organization_id"], document["name"], document["created_at"])


def _build_key(document: Document) -> Key:
    # keys of earlier versions have no `source`
    return Key(document["_id"], *(document.get(name) for name in Key.__struct_fields__[1:]))  # type: ignore[arg-type]


def _build_agent(document: Document, default_agent_id: str | None) -> Agent:
    agent = msgspec.json.decode(document["body"], type=Agent)
    return replace(agent, is_default=agent.id == default_agent_id)


class MongoDirectory(MongoBase):
    """Organizations, users, keys, sessions and agents in MongoDB."""

    async def create_organization(self, name: str) -> Organization:
        organization = rules.new_organization(name, self.clock())
        while not await self.db.organizations.insert(_build_document(organization)):
            if existing := await self.db.organizations.find_one({"name": name}):
                return _build_organization(existing)
        return organization

    async def find_organization(self, id_or_name: str) -> Organization | None:
        found = await self.db.organizations.find_one({"_id": id_or_name})
        if found is None:
            found = await self.db.organizations.find_one({"name": id_or_name})
        return _build_organization(found) if found else None

    async def create_user(self, organization_id: str, name: str) -> User:
        user = rules.new_user(organization_id, name, self.clock())
        while not await self.db.users.insert(_build_document(user)):
            if existing := await self.db.users.find_one({"organization_id": organization_id, "name": name}):
                return _build_user(existing)
        return user

    async def find_user(self, organization_id: str, id_or_name: str) -> User | None:
        found = await self.db.users.find_one({"_id": id_or_name, "organization_id": organization_id})
        if found is None:
            found = await self.db.users.find_one({"organization_id": organization_id, "name": id_or_name})
        return _build_user(found) if found else None

    async def create_key(self, user: User, secret: str, source: KeySource | None = None) -> Key:
        key = rules.new_key(user, secret, source, self.clock())
        valid = {"hash": key.hash, "valid": True}
        held = {"held_at": "$$NOW", "source": {"$ifNull": ["$source", source]}}
        while not await self.db.keys.insert(_build_document(key) | valid | {"held_at": await self.db.now()}):
            if existing := await self.db.keys.update_one(valid, [{"$set": held}]):
                return _build_key(existing)
        return key

    async def hold_key(self, key_id: str) -> bool:
        query = {"_id": key_id, "valid": True}
        return await self.db.keys.update_one(query, [{"$set": {"held_at": "$$NOW"}}], {"_id": 1}) is not None

    async def revoke_unheld_keys(self, source: KeySource, *, keep: str | None, seconds: float) -> list[Key]:
        until = await self.db.now() - timedelta(seconds=seconds)
        unheld = {"source": source, "valid": True, "held_at": {"$lte": until}}
        changes = {"$set": {"valid": False, "revoked_at": timestamp(self.clock())}}
        found = [key["_id"] for key in await self.db.keys.find(unheld, {"_id": 1}) if key["_id"] != keep]
        revoked = [await self.db.keys.update_one({"_id": key_id, **unheld}, changes) for key_id in found]
        return [_build_key(document) for document in revoked if document is not None]

    async def list_keys(self) -> list[Key]:
        return [_build_key(document) for document in await self.db.keys.find({}, sort=_OLDEST_FIRST)]

    async def revoke_key(self, key_id: str) -> Key:
        changes = {"valid": False, "revoked_at": {"$ifNull": ["$revoked_at", timestamp(self.clock())]}}
        document = await self.db.keys.update_one({"_id": key_id}, [{"$set": changes}])
        if document is None:
            raise KeyNotFound(key_id)
        return _build_key(document)

    async def find_principal(self, secret: str) -> Principal | None:
        key = await self._find_key(secret)
        return Principal(key["organization_id"], key["user_id"]) if key else None

    async def _find_key(self, secret: str) -> Document | None:
        """The valid key of this secret."""
        query = {"hash": hash_of(secret), "valid": True}
        return await self.db.keys.find_one(query, {"organization_id": 1, "user_id": 1})

    async def create_session(
        self, secret: str, token: str, *, seconds: float, limit: int = SESSIONS_PER_KEY
    ) -> Principal | None:
        now = self.clock()
        await self.db.sessions.delete_many({"expires_at": {"$lte": timestamp(now)}})
        key = await self._find_key(secret)
        if key is None:
            return None
        session = {
            "_id": hash_of(token),
            "key_id": key["_id"],
            "organization_id": key["organization_id"],
            "user_id": key["user_id"],
            "created_at": timestamp(now),
            "expires_at": timestamp(now + timedelta(seconds=seconds)),
        }
        await self.db.sessions.insert(session)
        query, newest_first = {"key_id": key["_id"]}, [("created_at", -1)]
        for surplus in await self.db.sessions.find(query, {"_id": 1}, sort=newest_first, skip=limit, limit=100):
            await self.db.sessions.delete_one({"_id": surplus["_id"]})
        return Principal(key["organization_id"], key["user_id"])

    async def find_session_principal(self, token: str) -> Principal | None:
        query = {"_id": hash_of(token), "expires_at": {"$gt": timestamp(self.clock())}}
        for session in await self.db.sessions.find_joined(query, "keys", "key_id"):
            if any(key["valid"] for key in session["keys"]):
                return Principal(session["organization_id"], session["user_id"])
        return None

    async def delete_session(self, token: str) -> None:
        await self.db.sessions.delete_one({"_id": hash_of(token)})

    async def create_agent(self, principal: Principal, agent: Agent) -> Agent:
        document = {
            "_id": agent.id,
            "organization_id": principal.organization_id,
            "body": msgspec.json.encode(agent),
            "deleted": False,
            "order": time.time_ns(),
        }
        if not await self.db.agents.insert(document):
            raise StoreUnavailable(f"agent {agent.id} exists already")
        default = await self._change_default(principal, lambda current: rules.default_after_creation(current, agent))
        return replace(agent, is_default=agent.id == default)

    async def list_agents(
        self, principal: Principal, *, limit: int = 100, offset: int = 0, max_bytes: int = READ_BYTES
    ) -> AgentPage:
        query = {"organization_id": principal.organization_id, "deleted": False}
        size = {"size": {"$bsonSize": "$$ROOT"}}
        sized = await self.db.agents.find(query, size, sort=_OLDEST_FIRST, skip=offset, limit=limit + 1)
        chosen = select_fitting([each["size"] for each in sized[:limit]], max_bytes)
        ids = [sized[index]["_id"] for index in chosen]
        documents = await self.db.agents.find({**query, "_id": {"$in": ids}}, sort=_OLDEST_FIRST)
        default = await self._read_default(principal)
        return AgentPage([_build_agent(document, default) for document in documents], more=len(chosen) < len(sized))

    async def get_agent(self, principal: Principal, agent_id: str | None, *, deleted: bool = False) -> Agent:
        """One command: a post reads its agent before anything is stored."""
        organization_id = principal.organization_id
        if agent_id is None:
            found = await self.db.organizations.find_joined({"_id": organization_id}, "agents", "default_agent_id")
            agents = [agent for organization in found for agent in organization["agents"]]
            default = found[0]["default_agent_id"] if found else None
        else:
            query = {"_id": agent_id, "organization_id": organization_id}
            agents = await self.db.agents.find_joined(query, "organizations", "organization_id")
            default = next((each["default_agent_id"] for agent in agents for each in agent["organizations"]), None)
        if not agents or (agents[0]["deleted"] and not deleted):
            raise AgentNotFound(agent_id or default or "default")
        return _build_agent(agents[0], default)

    async def update_agent(self, principal: Principal, agent: Agent, *, is_default: bool | None = None) -> Agent:
        query = {"_id": agent.id, "organization_id": principal.organization_id, "deleted": False}
        body = msgspec.json.encode(agent)
        if await self.db.agents.update_one(query, {"$set": {"body": body}}, {"_id": 1}) is None:
            raise AgentNotFound(agent.id)
        default = await self._change_default(
            principal, lambda current: rules.default_after_update(current, agent.id, is_default)
        )
        return replace(agent, is_default=agent.id == default)

    async def delete_agent(self, principal: Principal, agent_id: str) -> None:
        query = {"_id": agent_id, "organization_id": principal.organization_id, "deleted": False}
        if await self.db.agents.update_one(query, {"$set": {"deleted": True}}, {"_id": 1}) is None:
            raise AgentNotFound(agent_id)
        await self._replace_default(principal, agent_id)

    # the default agent

    async def _read_default(self, principal: Principal) -> str | None:
        document = await self.db.organizations.find_one({"_id": principal.organization_id}, {"default_agent_id": 1})
        return document["default_agent_id"] if document else None

    async def _change_default(self, principal: Principal, rule: Callable[[str | None], str | None]) -> str | None:
        """Store what `rule` makes of the current default agent; returns the default that is then in force."""
        query = {"_id": principal.organization_id}
        while document := await self.db.organizations.find_one(query, {"default_agent_id": 1}):
            current: str | None = document["default_agent_id"]
            wanted = rule(current)
            if wanted == current or await self._move_default(principal, current, wanted):
                return wanted
        return None

    async def _replace_default(self, principal: Principal, deleted: str) -> None:
        """Replace a deleted default by the oldest remaining agent.

        Another process may delete that one in the meantime, having found that it was not the default. So its deletion
        is checked once more after it has become the default; an agent that was created while the default was None is
        found in the same way.
        """
        replaced: str | None = deleted
        query = {"organization_id": principal.organization_id, "deleted": False}
        while True:
            oldest = await self.db.agents.find(query, {"_id": 1}, sort=_OLDEST_FIRST, limit=1)
            current = await self._read_default(principal)
            wanted = rules.default_after_deletion(current, replaced, oldest[0]["_id"] if oldest else None)
            if wanted == current:
                return
            if await self._move_default(principal, current, wanted):
                replaced = wanted

    async def _move_default(self, principal: Principal, current: str | None, wanted: str | None) -> bool:
        """Compare and set; False if the default is not `current`."""
        query = {"_id": principal.organization_id, "default_agent_id": current}
        changes = {"$set": {"default_agent_id": wanted}}
        return await self.db.organizations.update_one(query, changes, {"_id": 1}) is not None
