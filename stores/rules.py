"""Decisions that every store must make alike, as pure functions: a store reads, decides here, and writes the result.

Without them each store would decide again how long an Idempotency-Key counts, which runs free their key, how times
move, or which agent becomes the default, and stores would come to differ where no test compares them.

Some decisions must be part of one atomic write. SQLite takes them here, inside its transaction; MongoDB states them
again as expressions in `mongo/documents.py`, each of which names the function that it repeats. The contract tests run
both.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Literal

import msgspec

from agent_chat.stores.contracts.storage import BlobRemoval
from agent_chat.stores.errors import IdempotencyMismatch, ThreadArchived, ThreadBusy
from agent_chat.stores.models import (
    Agent,
    Idempotency,
    Key,
    KeySource,
    Message,
    Organization,
    Principal,
    User,
    hash_of,
    new_id,
    timestamp,
)

KEY_SECONDS = 24 * 3600
"""How long an Idempotency-Key counts."""

PostDecision = Literal["replay", "retry", "store"]


# Times


def next_timestamp(stamp: str, previous: str | None) -> str:
    """Return `stamp`, or one millisecond after `previous` where `stamp` is not later (I7). `timestamp` makes both."""
    if previous is None or stamp > previous:
        return stamp
    return timestamp(datetime.fromisoformat(previous) + timedelta(milliseconds=1))


# Idempotency


class UsedKey(msgspec.Struct, frozen=True):
    """What an Idempotency-Key stored in its thread.

    `run_id`: None if it stored a message that started no run. `used_at`: seconds since 1970. `free`: its run has
    failed and may be retried, so the key may store again.
    """

    fingerprint: str
    message_id: str
    run_id: str | None
    used_at: float
    free: bool


def key_counts(idempotency: Idempotency, fingerprint: str, used_at: float, now: float) -> bool:
    """True if a key that was used at `used_at` still counts; an older one is like one that was never used.

    Args:
        idempotency: what the request brought.
        fingerprint: what was stored with the key.
        used_at: when it was stored, in seconds since 1970, as is `now`.

    Raises: IdempotencyMismatch if it still counts and was used with another body.
    """
    if used_at <= now - KEY_SECONDS:
        return False
    if fingerprint != idempotency.fingerprint:
        raise IdempotencyMismatch(idempotency.key)
    return True


def decide_post(
    thread_id: str, key: UsedKey | None, *, archived: bool, running: str | None, starts_run: bool
) -> PostDecision:
    """What storing a message does.

    `replay`: nothing is stored, what the key stored before is returned, even if the thread is archived or busy.
    `retry`: the run of the key's first attempt failed and freed the key, so only the answer is stored, as a reply
    to the first user message. `store`: the message is stored, with the answer if it starts a run.

    Args:
        key: what the request's key stored before, if it still counts.
        running: the id of the run that has the thread.
        starts_run: the message claims the thread.

    Raises: ThreadArchived; ThreadBusy if the message starts a run while another run has the thread.
    """
    if key is not None and not key.free:
        return "replay"
    if archived:
        raise ThreadArchived(thread_id)
    if not starts_run:
        return "store"
    if running is not None:
        raise ThreadBusy(running)
    return "store" if key is None else "retry"


def frees_key(finished: Message) -> bool:
    """True if the run that made this message failed and may be retried: the same key then starts a run again."""
    error = (finished.run or {}).get("error")
    return bool(error and error["retryable"])


# The default agent


def default_after_creation(current: str | None, created: Agent) -> str | None:
    """The organization's default agent once `created` is stored: `created` if it says so or if there is none."""
    return created.id if created.is_default or current is None else current


def default_after_update(current: str | None, agent_id: str, is_default: bool | None) -> str | None:
    """The default once an agent was updated; `is_default` None: the update does not mention it."""
    if is_default:
        return agent_id
    return None if is_default is False and current == agent_id else current


def default_after_deletion(current: str | None, deleted: str | None, oldest: str | None) -> str | None:
    """The default once an agent was deleted; `oldest`: the organization's oldest remaining agent."""
    return oldest if current == deleted else current


# New records


def new_organization(name: str, now: datetime) -> Organization:
    """Build a new organization."""
    return Organization(new_id(), name, None, timestamp(now))


def new_user(organization_id: str, name: str, now: datetime) -> User:
    """Build a new user."""
    return User(new_id(), organization_id, name, timestamp(now))


def new_key(user: User, secret: str, source: KeySource | None, now: datetime) -> Key:
    """The key's record: of the secret it has only the hash and, as a hint for people, the last four characters."""
    return Key(
        id=new_id(),
        organization_id=user.organization_id,
        user_id=user.id,
        hash=hash_of(secret),
        hint=f"…{secret[-4:]}",
        created_at=timestamp(now),
        source=source,
    )


# Storage


def granted_bytes(stored: int, need: int, want: int, limit: int) -> int:
    """How many more bytes an organization may store: up to `want`, but 0 if `limit` does not allow `need`."""
    return 0 if stored + need > limit else min(want, limit - stored)


def removal_of_thread(principal: Principal, thread_id: str) -> BlobRemoval:
    """All blobs of a thread; its bytes are subtracted where the thread is deleted."""
    return BlobRemoval(thread_id, principal.organization_id, thread_id, None, 0)


def removal_of_attachment(principal: Principal, thread_id: str, attachment_id: str, size: int) -> BlobRemoval:
    """Build the removal of one attachment's blobs."""
    return BlobRemoval(attachment_id, principal.organization_id, thread_id, attachment_id, size)
