"""The Directory contract on SQLite: organizations, users, keys, agents."""

from __future__ import annotations

import sqlite3

import msgspec
from msgspec.structs import replace

from stores.contracts import AgentPage
from stores.errors import AgentNotFound, KeyNotFound
from stores.fitting import READ_BYTES, latest_fitting
from stores.models import Agent, Key, Organization, Principal, User, hash_of, new_id, timestamp
from stores.sqlite_database import Database, reading, writing


def _agent(db: sqlite3.Connection, row: sqlite3.Row) -> Agent:
    agent = msgspec.json.decode(row["body"], type=Agent)
    default = db.execute(
        "SELECT default_agent_id FROM organizations WHERE id = ?", (row["organization_id"],)
    ).fetchone()
    return replace(agent, is_default=default is not None and default[0] == agent.id)


class SQLiteDirectory(Database):
    @writing
    def create_organization(self, db: sqlite3.Connection, name: str) -> Organization:
        row = db.execute("SELECT * FROM organizations WHERE name = ? ORDER BY rowid", (name,)).fetchone()
        if row:
            return Organization(*row)
        made = Organization(new_id(), name, None, timestamp(self.clock()))
        db.execute("INSERT INTO organizations VALUES (?, ?, ?, ?)", msgspec.structs.astuple(made))
        return made

    @reading
    def find_organization(self, db: sqlite3.Connection, id_or_name: str) -> Organization | None:
        row = db.execute(
            "SELECT * FROM organizations WHERE id = ?1 OR name = ?1 ORDER BY id = ?1 DESC, rowid", (id_or_name,)
        ).fetchone()
        return Organization(*row) if row else None

    @writing
    def create_user(self, db: sqlite3.Connection, organization_id: str, name: str) -> User:
        same = "SELECT * FROM users WHERE organization_id = ? AND name = ? ORDER BY rowid"
        row = db.execute(same, (organization_id, name)).fetchone()
        if row:
            return User(*row)
        made = User(new_id(), organization_id, name, timestamp(self.clock()))
        db.execute("INSERT INTO users VALUES (?, ?, ?, ?)", msgspec.structs.astuple(made))
        return made

    @reading
    def find_user(self, db: sqlite3.Connection, organization_id: str, id_or_name: str) -> User | None:
        row = db.execute(
            "SELECT * FROM users WHERE organization_id = ?2 AND (id = ?1 OR name = ?1) ORDER BY id = ?1 DESC, rowid",
            (id_or_name, organization_id),
        ).fetchone()
        return User(*row) if row else None

    @writing
    def create_key(self, db: sqlite3.Connection, user: User, secret: str) -> Key:
        row = db.execute("SELECT * FROM keys WHERE hash = ? AND revoked_at IS NULL", (hash_of(secret),)).fetchone()
        if row:
            return Key(*(row[name] for name in Key.__struct_fields__))
        made = Key(new_id(), user.organization_id, user.id, hash_of(secret), f"…{secret[-4:]}", timestamp(self.clock()))
        db.execute(
            "INSERT INTO keys (id, organization_id, user_id, hash, hint, created_at, revoked_at)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            msgspec.structs.astuple(made),
        )
        return made

    @reading
    def keys(self, db: sqlite3.Connection) -> list[Key]:
        rows = db.execute("SELECT * FROM keys ORDER BY rowid").fetchall()
        return [Key(*(row[name] for name in Key.__struct_fields__)) for row in rows]

    @writing
    def revoke_key(self, db: sqlite3.Connection, key_id: str) -> Key:
        row = db.execute(
            "UPDATE keys SET revoked_at = COALESCE(revoked_at, ?) WHERE id = ? RETURNING *",
            (timestamp(self.clock()), key_id),
        ).fetchone()
        if row is None:
            raise KeyNotFound(key_id)
        return Key(*(row[name] for name in Key.__struct_fields__))

    @reading
    def principal(self, db: sqlite3.Connection, secret: str) -> Principal | None:
        row = db.execute(
            "SELECT organization_id, user_id FROM keys WHERE hash = ? AND revoked_at IS NULL", (hash_of(secret),)
        ).fetchone()
        return Principal(*row) if row else None

    @writing
    def create_agent(self, db: sqlite3.Connection, who: Principal, agent: Agent) -> Agent:
        db.execute(
            "INSERT INTO agents (id, organization_id, body) VALUES (?, ?, ?)",
            (agent.id, who.organization_id, msgspec.json.encode(agent)),
        )
        if agent.is_default:
            self._set_default(db, who, agent.id)
        else:
            db.execute(
                "UPDATE organizations SET default_agent_id = ? WHERE id = ? AND default_agent_id IS NULL",
                (agent.id, who.organization_id),
            )
        return self._find(db, who, agent.id)

    @reading
    def agents(
        self,
        db: sqlite3.Connection,
        who: Principal,
        *,
        limit: int = 100,
        offset: int = 0,
        max_bytes: int = READ_BYTES,
    ) -> AgentPage:
        sized = db.execute(
            "SELECT id, length(body) AS size FROM agents WHERE organization_id = ? AND NOT deleted"
            " ORDER BY seq LIMIT ? OFFSET ?",
            (who.organization_id, limit + 1, offset),
        ).fetchall()
        wanted = latest_fitting([row["size"] for row in sized[:limit]], max_bytes)
        return AgentPage([self._find(db, who, sized[index]["id"]) for index in wanted], more=len(wanted) < len(sized))

    @reading
    def agent(self, db: sqlite3.Connection, who: Principal, agent_id: str | None, *, deleted: bool = False) -> Agent:
        if agent_id is None:
            row = db.execute(
                "SELECT default_agent_id FROM organizations WHERE id = ?", (who.organization_id,)
            ).fetchone()
            if row is None or row[0] is None:
                raise AgentNotFound("default")
            agent_id = str(row[0])
        return self._find(db, who, agent_id, deleted=deleted)

    @writing
    def update_agent(
        self, db: sqlite3.Connection, who: Principal, agent: Agent, *, is_default: bool | None = None
    ) -> Agent:
        was = self._find(db, who, agent.id)
        db.execute("UPDATE agents SET body = ? WHERE id = ?", (msgspec.json.encode(agent), agent.id))
        if is_default:
            self._set_default(db, who, agent.id)
        elif is_default is False and was.is_default:
            self._set_default(db, who, None)
        return self._find(db, who, agent.id)

    @writing
    def delete_agent(self, db: sqlite3.Connection, who: Principal, agent_id: str) -> None:
        if self._find(db, who, agent_id).is_default:
            self._set_default(db, who, None)
        db.execute("UPDATE agents SET deleted = 1 WHERE id = ?", (agent_id,))

    def _find(self, db: sqlite3.Connection, who: Principal, agent_id: str, *, deleted: bool = False) -> Agent:
        row = db.execute(
            "SELECT * FROM agents WHERE id = ? AND organization_id = ?", (agent_id, who.organization_id)
        ).fetchone()
        if row is None or (row["deleted"] and not deleted):
            raise AgentNotFound(agent_id)
        return _agent(db, row)

    def _set_default(self, db: sqlite3.Connection, who: Principal, agent_id: str | None) -> None:
        db.execute("UPDATE organizations SET default_agent_id = ? WHERE id = ?", (agent_id, who.organization_id))
