"""Calls of the ThreadStore with the arguments that its tests repeat, and their results in a comparable form."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from msgspec.structs import replace

from agent_chat.stores.contracts import Posted, Store, ThreadPage
from agent_chat.stores.fitting import READ_BYTES
from agent_chat.stores.models import Idempotency, Message, Principal
from tests.support.samples import WORKER, turn


async def read_page(
    store: Store,
    principal: Principal,
    agent_id: str = "agent",
    *,
    limit: int = 10,
    offset: int = 0,
    archived: bool | None = None,
    message_limit: int = 50,
    max_bytes: int = READ_BYTES,
    external_id: str | None = None,
) -> ThreadPage:
    return await store.list_threads(
        principal,
        agent_id,
        limit=limit,
        offset=offset,
        archived=archived,
        message_limit=message_limit,
        max_bytes=max_bytes,
        external_id=external_id,
    )


def increases(stamps: list[str]) -> bool:
    return all(earlier < later for earlier, later in pairwise(stamps))


class PostedIds(NamedTuple):
    """A Posted by its ids."""

    message_id: str
    run_id: str | None
    replayed: bool
    again: bool = False


def posted_ids(posted: Posted | None) -> PostedIds | None:
    return PostedIds(posted.message_id, posted.run_id, posted.replayed, posted.again) if posted else None


def with_content(answer: Message, content: str) -> Message:
    return replace(answer, content=content)


async def claim(
    store: Store, principal: Principal, thread_id: str, key: Idempotency | None = None
) -> tuple[Message, Message, Posted]:
    """Claim the thread with new messages; returns the question, the answer and the result of the claim."""
    question, answer = turn(thread_id)
    return question, answer, await store.claim(principal, question, answer, worker=WORKER, idempotency=key)
