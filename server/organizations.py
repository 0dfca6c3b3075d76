"""New organizations, and the one that the first start makes: with a user, a key and an agent, so that it works."""

from __future__ import annotations

import asyncio
import os
import secrets
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

from msgspec.structs import replace

from agents.mcp_config import Server as McpServer
from stores.contracts import Store
from stores.errors import DataFolderUnusable
from stores.models import Agent, Organization, Principal, User, hash_of, new_id, timestamp, utcnow

FIRST = "default"
KEY_FILE = "key"
_DEMO = "Demo"


def new_secret() -> str:
    """A new key: 256 random bits, recognizable in a leak scan."""
    return f"chat_{secrets.token_urlsafe(32)}"


async def member(
    store: Store, organization: str, user: str, *, kind: str, model: str | None, servers: Mapping[str, McpServer]
) -> tuple[Organization, User]:
    """Find or make the organization (by id or name), its user and, if it has no agent, its default agent.

    The demo agent that was made so, and that nobody has changed, becomes one of `kind` once there is a better kind.
    """
    found = await store.find_organization(organization) or await store.create_organization(organization)
    owner = await store.find_user(found.id, user) or await store.create_user(found.id, user)
    who = Principal(found.id, owner.id)
    name = _DEMO if kind == "demo" else "Assistant"
    now = timestamp(utcnow())
    agents = (await store.agents(who, limit=2)).agents
    if not agents:
        agent = Agent(
            id=new_id(),
            organization_id=found.id,
            name=name,
            kind=kind,
            model=model,
            instructions="",
            mcp_servers=[each for each, server in servers.items() if server.serves(found.id, found.name)],
            tools=None,
            max_tokens=None,
            is_default=False,
            metadata={},
            created_at=now,
            updated_at=now,
        )
        made = await store.create_agent(who, agent)
        if not made.is_default:  # another process, started at the same moment, made the default just now
            await store.delete_agent(who, made.id)
    elif kind != "demo" and len(agents) == 1 and _is_untouched_demo(agents[0]):
        await store.update_agent(who, replace(agents[0], name=name, kind=kind, model=model, updated_at=now))
    return found, owner


def _is_untouched_demo(agent: Agent) -> bool:
    return agent.kind == "demo" and agent.name == _DEMO and agent.updated_at == agent.created_at


async def first_start(
    store: Store, data_dir: Path, api_key: str | None, *, kind: str, model: str | None, servers: Mapping[str, McpServer]
) -> str:
    """See that there is an organization, a user, a key and an agent; the key.

    `api_key` (CHAT_API_KEY) is valid from each start on, though it was revoked before: the environment wins. The key
    that is kept in the data folder stays revoked once it was: a new one takes its place.
    """
    await _refuse_lost_database(store, data_dir)
    _, owner = await member(store, FIRST, FIRST, kind=kind, model=model, servers=servers)
    secret = api_key or _kept_secret(data_dir / KEY_FILE, await _revoked(store))
    await store.create_key(owner, secret)
    return secret


async def _refuse_lost_database(store: Store, data_dir: Path) -> None:
    """Raises: DataFolderUnusable if the database is empty beside a key and blobs: the old one was lost or moved.

    A start on an empty one would hide the loss, and its key would open nothing.
    """
    if not (data_dir / KEY_FILE).is_file() or await store.find_organization(FIRST):
        return
    blobs = data_dir / "blobs"
    if await asyncio.to_thread(lambda: blobs.is_dir() and any(blobs.iterdir())):
        reason = "the database is empty, but a key and attachments are here: restore it, or remove `key` and `blobs`"
        raise DataFolderUnusable(str(data_dir), reason)


async def _revoked(store: Store) -> set[str]:
    """The hashes of the secrets that open nothing any more."""
    keys = await store.keys()
    return {key.hash for key in keys if key.revoked_at} - {key.hash for key in keys if not key.revoked_at}


def _kept_secret(path: Path, revoked: Collection[str]) -> str:
    """The first key, from the data folder or made now; readable by the owner only.

    An empty file is none, and one whose key was revoked is replaced.
    """
    try:
        kept = path.read_text().strip()
    except FileNotFoundError:
        return _keep(path, new_secret(), replace=False)
    if kept and hash_of(kept) not in revoked:
        return kept
    return _keep(path, new_secret(), replace=True)


def _keep(path: Path, secret: str, *, replace: bool) -> str:
    """Write the file whole or not at all; the secret in it, which another process may have kept first."""
    descriptor, written = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secret + "\n")
            file.flush()
            os.fsync(descriptor)
        if replace:
            os.replace(written, path)
        else:
            os.link(written, path)
        return secret
    except FileExistsError:
        return path.read_text().strip()
    finally:
        Path(written).unlink(missing_ok=True)
