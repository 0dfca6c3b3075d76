"""Creating threads: a new one, the one that an Idempotency-Key created before, or the one that has the external id."""

from __future__ import annotations

from msgspec import UNSET
from msgspec.structs import replace

from agent_chat.server.errors import InvalidRequest
from agent_chat.server.inputs import ThreadCreate, make_idempotency
from agent_chat.server.lookup import Lookup
from agent_chat.server.quota import Quota, size_of
from agent_chat.server.reading.viewer import SNAPSHOT_MESSAGES
from agent_chat.stores.contracts import Created, Store
from agent_chat.stores.contracts.storage import RECORD_BYTES
from agent_chat.stores.errors import ThreadNotFound
from agent_chat.stores.models import Clock, Principal, Thread, new_id, timestamp


class ThreadCreation:
    """Creates threads, or finds those that exist."""

    def __init__(self, store: Store, lookup: Lookup, quota: Quota, clock: Clock) -> None:
        self._store = store
        self._lookup = lookup
        self._quota = quota
        self._clock = clock

    async def create(
        self, principal: Principal, agent_ref: str, body: ThreadCreate, idempotency_key: str | None
    ) -> Created:
        """See AIChatService.create_thread."""
        agent = await self._lookup.agent(principal, agent_ref)
        if body.agent_id is not UNSET and body.agent_id != agent.id:
            raise InvalidRequest("agent_id", "agent_id must be the agent of the path.")
        if body.external_id is not UNSET and idempotency_key is None:
            # a lookup, as most are: it needs no room in the quota. A key is checked first, by the store
            found = await self._store.find_thread(principal, agent.id, body.external_id)
            if found and (created := await self._read(principal, Created(found, replayed=False, found=True))):
                return created
        thread = self._build(principal, agent.id, body)
        async with self._quota.spending(principal.organization_id, RECORD_BYTES + size_of(thread)) as spent:
            created = await self._store.create(principal, thread, make_idempotency(idempotency_key, body))
        if not (created.replayed or created.found):
            return created
        spent.give_back()
        return await self._read(principal, created) or created

    def _build(self, principal: Principal, agent_id: str, body: ThreadCreate) -> Thread:
        now = timestamp(self._clock())
        thread = Thread(
            id=new_id(),
            agent_id=agent_id,
            user_id=principal.user_id,
            organization_id=principal.organization_id,
            title="" if body.title is UNSET else body.title,
            metadata={} if body.metadata is UNSET else body.metadata,
            created_at=now,
            updated_at=now,
            archived=False,
        )
        return thread if body.external_id is UNSET else thread.with_external_id(body.external_id)

    async def _read(self, principal: Principal, created: Created) -> Created | None:
        """An existing thread with its latest messages; None if it was deleted meanwhile."""
        try:
            part = await self._store.read(principal, created.thread.id, message_limit=SNAPSHOT_MESSAGES)
        except ThreadNotFound:
            return None
        return replace(created, thread=part.thread, cut=part.cut)
