"""The Directory contract on SQLite: organizations, users, keys, agents."""

from __future__ import annotations

import sqlite3
from datetime import timedelta

import msgspec
from msgspec.structs import replace

from agent_chat.stores import rules
from agent_chat.stores.contracts import SESSIONS_PER_KEY, AgentPage
from agent_chat.stores.errors import AgentNotFound, KeyNotFound
from agent_chat.stores.fitting import READ_BYTES, select_fitting
from agent_chat.stores.models import Agent, Key, KeySource, Organization, Principal, User, hash_of, timestamp
from agent_chat.stores.sqlite.database import NOW, SQLiteBase, runs_in_reader, runs_in_writer


def _build_key(row: sqlite3.Row) -> Key:
    return Key(*(row[name] for name in Key.__struct_fields__))


class SQLiteDirectory(SQLiteBase):
    """Organizations, users, keys, sessions and agents in SQLite."""

    @runs_in_writer
    def create_organization(self, db: sqlite3.Connection, name: str) -> Organization:
        row = db.execute("SELECT * FROM organizations WHERE name = ? ORDER BY rowid", (name,)).fetchone()
        if row:
            return Organization(*row)
        organization = rules.new_organization(name, self.clock())
        db.execute("INSERT INTO organizations VALUES (?, ?, ?, ?)", msgspec.structs.astuple(organization))
        return organization

    @runs_in_reader
    def find_organization(self, db: sqlite3.Connection, id_or_name: str) -> Organization | None:
        row = db.execute(
            "SELECT * FROM organizations WHERE id = ?1 OR name = ?1 ORDER BY id = ?1 DESC, rowid", (id_or_name,)
        ).fetchone()
        return Organization(*row) if row else None

    @runs_in_writer
    def create_user(self, db: sqlite3.Connection, organization_id: str, name: str) -> User:
        row = db.execute(
            "SELECT * FROM users WHERE organization_id = ? AND name = ? ORDER BY rowid", (organization_id, name)
        ).fetchone()
        if row:
            return User(*row)
        user = rules.new_user(organization_id, name, self.clock())
        db.execute("INSERT INTO users VALUES (?, ?, ?, ?)", msgspec.structs.astuple(user))
        return user

    @runs_in_reader
    def find_user(self, db: sqlite3.Connection, organization_id: str, id_or_name: str) -> User | None:
        row = db.execute(
            "SELECT * FROM users WHERE organization_id = ?2 AND (id = ?1 OR name = ?1) ORDER BY id = ?1 DESC, rowid",
            (id_or_name, organization_id),
        ).fetchone()
        return User(*row) if row else None

    @runs_in_writer
    def create_key(self, db: sqlite3.Connection, user: User, secret: str, source: KeySource | None = None) -> Key:
        row = db.execute(
            f"UPDATE keys SET source = COALESCE(source, ?), held_at = {NOW} WHERE hash = ? AND revoked_at IS NULL"
            " RETURNING *",
            (source, hash_of(secret)),
        ).fetchone()
        if row:
            return _build_key(row)
        key = rules.new_key(user, secret, source, self.clock())
        row = db.execute(
            "INSERT INTO keys (id, organization_id, user_id, hash, hint, created_at, revoked_at, source, held_at)"
            f" VALUES (?, ?, ?, ?, ?, ?, ?, ?, {NOW}) RETURNING *",
            msgspec.structs.astuple(key),
        ).fetchone()
        return _build_key(row)

    @runs_in_writer
    def hold_key(self, db: sqlite3.Connection, key_id: str) -> bool:
        query = f"UPDATE keys SET held_at = {NOW} WHERE id = ? AND revoked_at IS NULL"
        return db.execute(query, (key_id,)).rowcount == 1

    @runs_in_writer
    def revoke_unheld_keys(
        self, db: sqlite3.Connection, source: KeySource, *, keep: str | None, seconds: float
    ) -> list[Key]:
        rows = db.execute(
            "UPDATE keys SET revoked_at = ? WHERE source = ? AND revoked_at IS NULL AND id IS NOT ?"
            f" AND held_at <= {NOW} - ? RETURNING *",
            (timestamp(self.clock()), source, keep, seconds),
        ).fetchall()
        return [_build_key(row) for row in rows]

    @runs_in_reader
    def list_keys(self, db: sqlite3.Connection) -> list[Key]:
        return [_build_key(row) for row in db.execute("SELECT * FROM keys ORDER BY rowid")]

    @runs_in_writer
    def revoke_key(self, db: sqlite3.Connection, key_id: str) -> Key:
        row = db.execute(
            "UPDATE keys SET revoked_at = COALESCE(revoked_at, ?) WHERE id = ? RETURNING *",
            (timestamp(self.clock()), key_id),
        ).fetchone()
        if row is None:
            raise KeyNotFound(key_id)
        return _build_key(row)

    @runs_in_reader
    def find_principal(self, db: sqlite3.Connection, secret: str) -> Principal | None:
        row = db.execute(
            "SELECT organization_id, user_id FROM keys WHERE hash = ? AND revoked_at IS NULL", (hash_of(secret),)
        ).fetchone()
        return Principal(*row) if row else None

    @runs_in_writer
    def create_session(
        self, db: sqlite3.Connection, secret: str, token: str, *, seconds: float, limit: int = SESSIONS_PER_KEY
    ) -> Principal | None:
        now = self.clock()
        db.execute("DELETE FROM sessions WHERE expires_at <= ?", (timestamp(now),))
        row = db.execute(
            "INSERT INTO sessions (hash, key_id, organization_id, user_id, created_at, expires_at)"
            " SELECT ?, id, organization_id, user_id, ?, ? FROM keys WHERE hash = ? AND revoked_at IS NULL"
            " RETURNING key_id, organization_id, user_id",
            (hash_of(token), timestamp(now), timestamp(now + timedelta(seconds=seconds)), hash_of(secret)),
        ).fetchone()
        if row is None:
            return None
        db.execute(
            "DELETE FROM sessions WHERE rowid IN (SELECT rowid FROM sessions WHERE key_id = ?"
            " ORDER BY created_at DESC, rowid DESC LIMIT -1 OFFSET ?)",
            (row["key_id"], limit),
        )
        return Principal(row["organization_id"], row["user_id"])

    @runs_in_reader
    def find_session_principal(self, db: sqlite3.Connection, token: str) -> Principal | None:
        row = db.execute(
            "SELECT sessions.organization_id, sessions.user_id FROM sessions JOIN keys ON keys.id = sessions.key_id"
            " WHERE sessions.hash = ? AND sessions.expires_at > ? AND keys.revoked_at IS NULL",
            (hash_of(token), timestamp(self.clock())),
        ).fetchone()
        return Principal(*row) if row else None

    @runs_in_writer
    def delete_session(self, db: sqlite3.Connection, token: str) -> None:
        db.execute("DELETE FROM sessions WHERE hash = ?", (hash_of(token),))

    @runs_in_writer
    def create_agent(self, db: sqlite3.Connection, principal: Principal, agent: Agent) -> Agent:
        db.execute(
            "INSERT INTO agents (id, organization_id, agent) VALUES (?, ?, CAST(? AS TEXT))",
            (agent.id, principal.organization_id, msgspec.json.encode(agent)),
        )
        self._set_default(db, principal, rules.default_after_creation(self._default_id(db, principal), agent))
        return self._read_agent(db, principal, agent.id)

    @runs_in_reader
    def list_agents(
        self,
        db: sqlite3.Connection,
        principal: Principal,
        *,
        limit: int = 100,
        offset: int = 0,
        max_bytes: int = READ_BYTES,
    ) -> AgentPage:
        sized = db.execute(
            "SELECT id, size FROM agents WHERE organization_id = ? AND NOT deleted ORDER BY seq LIMIT ? OFFSET ?",
            (principal.organization_id, limit + 1, offset),
        ).fetchall()
        chosen = select_fitting([row["size"] for row in sized[:limit]], max_bytes)
        agents = [self._read_agent(db, principal, sized[index]["id"]) for index in chosen]
        return AgentPage(agents, more=len(chosen) < len(sized))

    @runs_in_reader
    def get_agent(
        self, db: sqlite3.Connection, principal: Principal, agent_id: str | None, *, deleted: bool = False
    ) -> Agent:
        if agent_id is None and (agent_id := self._default_id(db, principal)) is None:
            raise AgentNotFound("default")
        return self._read_agent(db, principal, agent_id, deleted=deleted)

    @runs_in_writer
    def update_agent(
        self, db: sqlite3.Connection, principal: Principal, agent: Agent, *, is_default: bool | None = None
    ) -> Agent:
        self._read_agent(db, principal, agent.id)
        db.execute("UPDATE agents SET agent = CAST(? AS TEXT) WHERE id = ?", (msgspec.json.encode(agent), agent.id))
        self._set_default(
            db, principal, rules.default_after_update(self._default_id(db, principal), agent.id, is_default)
        )
        return self._read_agent(db, principal, agent.id)

    @runs_in_writer
    def delete_agent(self, db: sqlite3.Connection, principal: Principal, agent_id: str) -> None:
        self._read_agent(db, principal, agent_id)
        db.execute("UPDATE agents SET deleted = 1 WHERE id = ?", (agent_id,))
        row = db.execute(
            "SELECT id FROM agents WHERE organization_id = ? AND NOT deleted ORDER BY seq", (principal.organization_id,)
        ).fetchone()
        oldest = row[0] if row else None
        self._set_default(
            db, principal, rules.default_after_deletion(self._default_id(db, principal), agent_id, oldest)
        )

    def _read_agent(
        self, db: sqlite3.Connection, principal: Principal, agent_id: str, *, deleted: bool = False
    ) -> Agent:
        """Raises: AgentNotFound."""
        row = db.execute(
            "SELECT CAST(agent AS BLOB) AS agent, deleted FROM agents WHERE id = ? AND organization_id = ?",
            (agent_id, principal.organization_id),
        ).fetchone()
        if row is None or (row["deleted"] and not deleted):
            raise AgentNotFound(agent_id)
        agent = msgspec.json.decode(row["agent"], type=Agent)
        return replace(agent, is_default=agent.id == self._default_id(db, principal))

    def _default_id(self, db: sqlite3.Connection, principal: Principal) -> str | None:
        query = "SELECT default_agent_id FROM organizations WHERE id = ?"
        row = db.execute(query, (principal.organization_id,)).fetchone()
        return row[0] if row else None

    def _set_default(self, db: sqlite3.Connection, principal: Principal, agent_id: str | None) -> None:
        db.execute("UPDATE organizations SET default_agent_id = ? WHERE id = ?", (agent_id, principal.organization_id))
