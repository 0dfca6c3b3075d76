"""The Directory contract on MongoDB: organizations, users, keys, agents.

`order` tells which was made first: the clock of the process that made it, in nanoseconds.
"""

from __future__ import annotations

import time
from datetime import timedelta

import msgspec
from msgspec.structs import asdict, replace

from agent_chat.stores.contracts import SESSIONS_PER_KEY, AgentPage
from agent_chat.stores.errors import AgentNotFound, KeyNotFound, StoreUnavailable
from agent_chat.stores.fitting import READ_BYTES, select_fitting
from agent_chat.stores.models import Agent, Key, KeySource, Organization, Principal, User, hash_of, new_id, timestamp
from agent_chat.stores.mongo.database import Database
from agent_chat.stores.mongo.documents import Document

_OLDEST_FIRST = [("order", 1)]


def _document(made: Organization | User | Key) -> Document:
    fields = asdict(made)
    return {"_id": fields.pop("id"), **fields, "order": time.time_ns()}


def _organization(document: Document) -> Organization:
    return Organization(document["_id"], document["name"], document["default_agent_id"], document["created_at"])


def _user(document: Document) -> User:
    return User(document["_id"], document["organization_id"], document["name"], document["created_at"])


def _key(document: Document) -> Key:
    return Key(document["_id"], *(document.get(name) for name in Key.__struct_fields__[1:]))  # type: ignore[arg-type]


def _agent(document: Document, default_agent_id: str | None) -> Agent:
    agent = msgspec.json.decode(document["body"], type=Agent)
    return replace(agent, is_default=agent.id == default_agent_id)


class MongoDirectory(Database):
    async def create_organization(self, name: str) -> Organization:
        made = Organization(new_id(), name, None, timestamp(self.clock()))
        while not await self.db.organizations.insert(_document(made)):
            if there := await self.db.organizations.one({"name": name}):
                return _organization(there)
        return made

    async def find_organization(self, id_or_name: str) -> Organization | None:
        found = await self.db.organizations.one({"_id": id_or_name})
        if found is None:
            found = await self.db.organizations.one({"name": id_or_name})
        return _organization(found) if found else None

    async def create_user(self, organization_id: str, name: str) -> User:
        made = User(new_id(), organization_id, name, timestamp(self.clock()))
        while not await self.db.users.insert(_document(made)):
            if there := await self.db.users.one({"organization_id": organization_id, "name": name}):
                return _user(there)
        return made

    async def find_user(self, organization_id: str, id_or_name: str) -> User | None:
        found = await self.db.users.one({"_id": id_or_name, "organization_id": organization_id})
        if found is None:
            found = await self.db.users.one({"organization_id": organization_id, "name": id_or_name})
        return _user(found) if found else None

    async def create_key(self, user: User, secret: str, source: KeySource | None = None) -> Key:
        made = Key(
            new_id(),
            user.organization_id,
            user.id,
            hash_of(secret),
            f"…{secret[-4:]}",
            timestamp(self.clock()),
            source=source,
        )
        valid = {"hash": made.hash, "valid": True}
        held = {"held_at": "$$NOW", "source": {"$ifNull": ["$source", source]}}
        while not await self.db.keys.insert(_document(made) | valid | {"held_at": await self.db.now()}):
            if stored := await self.db.keys.change(valid, [{"$set": held}]):
                return _key(stored)
        return made

    async def hold_key(self, key_id: str) -> bool:
        query = {"_id": key_id, "valid": True}
        return await self.db.keys.change(query, [{"$set": {"held_at": "$$NOW"}}], {"_id": 1}) is not None

    async def revoke_unheld_keys(self, source: KeySource, *, keep: str | None, seconds: float) -> list[Key]:
        until = await self.db.now() - timedelta(seconds=seconds)
        unheld = {"source": source, "valid": True, "held_at": {"$lte": until}}
        changes = {"$set": {"valid": False, "revoked_at": timestamp(self.clock())}}
        found = [key["_id"] for key in await self.db.keys.many(unheld, {"_id": 1}) if key["_id"] != keep]
        revoked = [await self.db.keys.change({"_id": key_id, **unheld}, changes) for key_id in found]
        return [_key(document) for document in revoked if document is not None]

    async def list_keys(self) -> list[Key]:
        return [_key(document) for document in await self.db.keys.many({}, sort=_OLDEST_FIRST)]

    async def revoke_key(self, key_id: str) -> Key:
        changes = {"valid": False, "revoked_at": {"$ifNull": ["$revoked_at", timestamp(self.clock())]}}
        document = await self.db.keys.change({"_id": key_id}, [{"$set": changes}])
        if document is None:
            raise KeyNotFound(key_id)
        return _key(document)

    async def find_principal(self, secret: str) -> Principal | None:
        found = await self.db.keys.one({"hash": hash_of(secret), "valid": True}, {"organization_id": 1, "user_id": 1})
        return Principal(found["organization_id"], found["user_id"]) if found else None

    async def create_session(
        self, secret: str, token: str, *, seconds: float, limit: int = SESSIONS_PER_KEY
    ) -> Principal | None:
        now = self.clock()
        await self.db.sessions.remove_all({"expires_at": {"$lte": timestamp(now)}})
        key = await self.db.keys.one({"hash": hash_of(secret), "valid": True}, {"organization_id": 1, "user_id": 1})
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
        for surplus in await self.db.sessions.many(query, {"_id": 1}, sort=newest_first, skip=limit, limit=100):
            await self.db.sessions.remove({"_id": surplus["_id"]})
        return Principal(key["organization_id"], key["user_id"])

    async def find_session_principal(self, token: str) -> Principal | None:
        query = {"_id": hash_of(token), "expires_at": {"$gt": timestamp(self.clock())}}
        session = await self.db.sessions.one(query)
        if session is None or await self.db.keys.one({"_id": session["key_id"], "valid": True}, {"_id": 1}) is None:
            return None
        return Principal(session["organization_id"], session["user_id"])

    async def delete_session(self, token: str) -> None:
        await self.db.sessions.remove({"_id": hash_of(token)})

    async def create_agent(self, who: Principal, agent: Agent) -> Agent:
        document = {
            "_id": agent.id,
            "organization_id": who.organization_id,
            "body": msgspec.json.encode(agent),
            "deleted": False,
            "order": time.time_ns(),
        }
        if not await self.db.agents.insert(document):
            raise StoreUnavailable(f"agent {agent.id} is there already")
        if agent.is_default:
            await self._set_default(who, agent.id)
        else:
            none_yet = {"_id": who.organization_id, "default_agent_id": None}
            await self.db.organizations.change(none_yet, {"$set": {"default_agent_id": agent.id}}, {"_id": 1})
        return await self.get_agent(who, agent.id)

    async def list_agents(
        self, who: Principal, *, limit: int = 100, offset: int = 0, max_bytes: int = READ_BYTES
    ) -> AgentPage:
        query = {"organization_id": who.organization_id, "deleted": False}
        size = {"size": {"$bsonSize": "$$ROOT"}}
        sized = await self.db.agents.many(query, size, sort=_OLDEST_FIRST, skip=offset, limit=limit + 1)
        chosen = select_fitting([each["size"] for each in sized[:limit]], max_bytes)
        ids = [sized[index]["_id"] for index in chosen]
        documents = await self.db.agents.many({**query, "_id": {"$in": ids}}, sort=_OLDEST_FIRST)
        default = await self._default(who)
        return AgentPage([_agent(document, default) for document in documents], more=len(chosen) < len(sized))

    async def get_agent(self, who: Principal, agent_id: str | None, *, deleted: bool = False) -> Agent:
        default = await self._default(who)
        wanted = default if agent_id is None else agent_id
        if wanted is None:
            raise AgentNotFound("default")
        document = await self.db.agents.one({"_id": wanted, "organization_id": who.organization_id})
        if document is None or (document["deleted"] and not deleted):
            raise AgentNotFound(wanted)
        return _agent(document, default)

    async def update_agent(self, who: Principal, agent: Agent, *, is_default: bool | None = None) -> Agent:
        query = {"_id": agent.id, "organization_id": who.organization_id, "deleted": False}
        body = msgspec.json.encode(agent)
        if await self.db.agents.change(query, {"$set": {"body": body}}, {"_id": 1}) is None:
            raise AgentNotFound(agent.id)
        if is_default:
            await self._set_default(who, agent.id)
        elif is_default is False:
            await self._unset_default(who, agent.id)
        return await self.get_agent(who, agent.id)

    async def delete_agent(self, who: Principal, agent_id: str) -> None:
        query = {"_id": agent_id, "organization_id": who.organization_id, "deleted": False}
        if await self.db.agents.change(query, {"$set": {"deleted": True}}, {"_id": 1}) is None:
            raise AgentNotFound(agent_id)
        await self._replace_default(who, agent_id)

    async def _default(self, who: Principal) -> str | None:
        document = await self.db.organizations.one({"_id": who.organization_id}, {"default_agent_id": 1})
        return document["default_agent_id"] if document else None

    async def _set_default(self, who: Principal, agent_id: str) -> None:
        changes = {"$set": {"default_agent_id": agent_id}}
        await self.db.organizations.change({"_id": who.organization_id}, changes, {"_id": 1})

    async def _unset_default(self, who: Principal, agent_id: str) -> None:
        await self._move_default(who, agent_id, None)

    async def _replace_default(self, who: Principal, deleted: str) -> None:
        """In place of a deleted agent the oldest remaining one becomes the default.

        That one may be deleted meanwhile by another process, which then found that it was not the default: so it is
        checked again. After None is stored, an agent that was created meanwhile is found by the next turn.
        """
        current: str | None = deleted
        while True:
            query = {"organization_id": who.organization_id, "deleted": False}
            oldest = await self.db.agents.many(query, {"_id": 1}, sort=_OLDEST_FIRST, limit=1)
            successor: str | None = oldest[0]["_id"] if oldest else None
            if successor == current or not await self._move_default(who, current, successor):
                return
            current = successor

    async def _move_default(self, who: Principal, current: str | None, successor: str | None) -> bool:
        """Compare and set; False if the default is not `current`."""
        query = {"_id": who.organization_id, "default_agent_id": current}
        changes = {"$set": {"default_agent_id": successor}}
        return await self.db.organizations.change(query, changes, {"_id": 1}) is not None
