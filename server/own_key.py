"""The server's own key: CHAT_API_KEY, or the one that the first start creates and stores in the data folder.

A new key replaces the earlier ones of its source. On an embedded database this process is the only one, so earlier
keys are revoked at start. On a shared database other processes may still run with the earlier CHAT_API_KEY, and a
rolling restart must not lock out their clients, nor may a process that restarts with the old setting revoke the new
key. So each process holds its key (`hold_forever`), and every process revokes those keys of the environment that no
process has held for a while. That needs no order among the processes: the old key is revoked after the last process
that has it has ended.

The first start on a shared database creates no key: every container with an empty data folder would add one.

Keys of versions that stored no source are recognized by their secret, if it is CHAT_API_KEY or in the data folder's
file. All others stay valid until they are revoked by hand, since `keys create` may have created them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
from collections.abc import Collection
from pathlib import Path

import msgspec

from agent_chat.server.organizations import FIRST, new_secret
from agent_chat.stores.contracts import Store
from agent_chat.stores.errors import DataFolderUnusable, StoreUnavailable
from agent_chat.stores.models import Key, KeySource, User, hash_of

KEY_FILE = "key"
_ROUNDS = 6
"""Rounds of `hold_forever` within the time after which a key counts as unheld."""

logger = logging.getLogger("chat.security")


class OwnKey(msgspec.Struct, frozen=True):
    """The server's own key.

    Attributes:
        secret: shown to the operator for the source `first_start` only; CHAT_API_KEY is never printed.
    """

    id: str
    source: KeySource
    secret: str


async def open_own_key(
    store: Store, owner: User, data_dir: Path, api_key: str | None, *, shared: bool
) -> OwnKey | None:
    """Create the server's own key, or make it valid again; None on a shared database without CHAT_API_KEY.

    CHAT_API_KEY is valid after each start, even if it was revoked before. A key of the data folder that was revoked
    stays revoked and is replaced by a new one.
    """
    path = data_dir / KEY_FILE
    await _recognize_stored_secret(store, owner, path)
    if api_key is not None:
        own = await _store(store, owner, api_key, "environment")
    elif shared:
        own = None
    else:
        own = await _store(store, owner, _stored_secret(path, await _revoked(store)), "first_start")
        await _revoke_replaced(store, own, "first_start", 0.0)
    if not shared:
        await _revoke_replaced(store, own, "environment", 0.0)
    unknown = [key.id for key in await store.list_keys() if key.source is None and key.revoked_at is None]
    if unknown:
        logger.warning(
            "%d valid keys have no recorded source; revoke those that are not needed (`keys list`)", len(unknown)
        )
    return own


async def refuse_lost_database(store: Store, data_dir: Path) -> None:
    """Refuse to start on an empty database if the data folder has a key and blobs: the database was lost or moved.

    A start would hide the loss, and the stored key would give access to nothing.

    Raises: DataFolderUnusable.
    """
    if not (data_dir / KEY_FILE).is_file() or await store.find_organization(FIRST):
        return
    blobs = data_dir / "blobs"
    if await asyncio.to_thread(lambda: blobs.is_dir() and any(blobs.iterdir())):
        reason = "the database is empty, but a key and attachments are here: restore it, or remove `key` and `blobs`"
        raise DataFolderUnusable(str(data_dir), reason)


async def hold_forever(store: Store, own: OwnKey | None, seconds: float) -> None:
    """On a shared database: hold the own key, and revoke CHAT_API_KEYs that no process has held for `seconds`.

    While the database is unreachable no process can hold its key, so nothing is revoked until it has been reachable
    for longer than the other processes need for their next round.
    """
    reachable = 0
    valid = True
    while True:
        await asyncio.sleep(seconds / _ROUNDS)
        try:
            if own is not None and own.source == "environment" and not await store.hold_key(own.id) and valid:
                valid = False
                logger.warning("CHAT_API_KEY is revoked", extra={"key_id": own.id})
            reachable += 1
            if reachable > _ROUNDS // 2:
                await _revoke_replaced(store, own, "environment", seconds)
        except StoreUnavailable:
            reachable = 0


async def _store(store: Store, owner: User, secret: str, source: KeySource) -> OwnKey:
    key = await store.create_key(owner, secret, source)
    return OwnKey(key.id, source, secret)


async def _recognize_stored_secret(store: Store, owner: User, path: Path) -> None:
    """Record the source of the data folder's key, if it is valid and a version that stored no source created it."""
    secret = _read(path)
    if secret and await store.find_principal(secret) is not None:
        await store.create_key(owner, secret, "first_start")


async def _revoke_replaced(store: Store, own: OwnKey | None, source: KeySource, seconds: float) -> None:
    for key in await store.revoke_unheld_keys(source, keep=own.id if own else None, seconds=seconds):
        _log_revoked(key)


def _log_revoked(key: Key) -> None:
    facts = {"key_id": key.id, "organization_id": key.organization_id, "source": key.source}
    logger.warning("key revoked: replaced by another one, or its setting was removed", extra=facts)


async def _revoked(store: Store) -> set[str]:
    """The hashes of revoked secrets."""
    keys = await store.list_keys()
    return {key.hash for key in keys if key.revoked_at} - {key.hash for key in keys if not key.revoked_at}


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""


def _stored_secret(path: Path, revoked: Collection[str]) -> str:
    """The key in the data folder's file, which is created if it is missing, empty or has a revoked key.

    Only the owner can read the file.
    """
    try:
        stored = path.read_text().strip()
    except FileNotFoundError:
        return _write(path, new_secret(), replace=False)
    if stored and hash_of(stored) not in revoked:
        return stored
    return _write(path, new_secret(), replace=True)


def _write(path: Path, secret: str, *, replace: bool) -> str:
    """Write the file atomically, and return the secret in it, which another process may have written first."""
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
