"""The chat service: everything that routes and the WebSocket call. It knows nothing of HTTP.

A user's message becomes a run, the run writes the thread's log, and every answer is a reading of that log. This module
has the threads and the agents, publishes facts and opens viewers; posting.py has the messages; lookup.py finds what is
named. `ai_chat_service.md` describes how a service built around conversations moves here.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping, Sequence

from msgspec import UNSET

from agent_chat.agents.mcp.config import Server as McpServer
from agent_chat.agents.registry import Registry
from agent_chat.server.agent_configuration import AgentConfiguration
from agent_chat.server.errors import Draining, InvalidRequest, ThreadEmpty
from agent_chat.server.facts import FactPublisher
from agent_chat.server.files.attachments import Attachments
from agent_chat.server.files.content_html import Renderer
from agent_chat.server.inputs import (
    AgentCreate,
    AgentUpdate,
    IfBusy,
    MessageCreate,
    ThreadCreate,
    ThreadUpdate,
    Upload,
)
from agent_chat.server.limits import Limits, Slots
from agent_chat.server.log_lines import security_facts
from agent_chat.server.lookup import Lookup
from agent_chat.server.model_policy import ModelPolicy
from agent_chat.server.posting import Posting
from agent_chat.server.quota import Quota, size_of
from agent_chat.server.reading.queries import find_turn
from agent_chat.server.reading.viewer import SNAPSHOT_MESSAGES, Viewer, resume
from agent_chat.server.runs.runner import Runner
from agent_chat.server.thread_creation import ThreadCreation
from agent_chat.server.timing import Timing
from agent_chat.server.titles import generate_title
from agent_chat.server.usage import Usage
from agent_chat.stores.contracts import AgentPage, Created, EventLog, MessagePage, Posted, Store, ThreadPage, ThreadPart
from agent_chat.stores.errors import LogUnavailable, MessageNotFound
from agent_chat.stores.events import ThreadDeleted, ThreadUpdated
from agent_chat.stores.fitting import READ_BYTES
from agent_chat.stores.models import Agent, Attachment, Clock, Message, Principal, Thread, new_id, timestamp, utcnow

security = logging.getLogger("chat.security")


class AIChatService:
    """Threads, messages, runs and agents, for one Principal per call.

    Args:
        servers: the MCP servers that the operator configured, by name.
        default_kind: the kind of agents for which the client names none.
        model_policy: the operator's limits on models.

    Attributes:
        run_slots: how many runs each organization has in this process.
        usage: what the runs of organizations consumed.
        queues: what waits for worker processes, by name; for metrics.
    """

    def __init__(
        self,
        store: Store,
        log: EventLog,
        runner: Runner,
        facts: FactPublisher,
        registry: Registry,
        renderer: Renderer,
        *,
        servers: Mapping[str, McpServer],
        default_kind: str,
        model_policy: ModelPolicy,
        limits: Limits,
        attachments: Attachments,
        quota: Quota,
        timing: Timing = Timing(),
        clock: Clock = utcnow,
    ) -> None:
        self.store = store
        self.log = log
        self.runner = runner
        self.facts = facts
        self.attachments = attachments
        self.run_slots = Slots("runs at once", limits.runs)
        self.usage = Usage(store, sweep=timing.usage_sweep, clock=clock)
        self.queues = {"render": renderer.turns, "extract": attachments.turns}
        self._quota = quota
        self._registry = registry
        self._timing = timing
        self._clock = clock
        self._lookup = Lookup(store)
        self._creation = ThreadCreation(store, self._lookup, quota, clock)
        self._agents = AgentConfiguration(
            store,
            kinds=registry,
            default_kind=default_kind,
            servers=servers,
            model_policy=model_policy,
            now=self._now,
        )
        self._posting = Posting(
            store,
            log,
            runner,
            facts,
            self._lookup,
            attachments=attachments,
            renderer=renderer,
            quota=quota,
            run_slots=self.run_slots,
            timing=timing,
            clock=clock,
        )

    # Agents

    async def create_agent(self, principal: Principal, body: AgentCreate) -> Agent:
        """Create an agent.

        Raises: InvalidRequest for an unknown kind or MCP server, or for more than the operator allows; StorageFull.
        """
        agent = await self._agents.build(principal, body)
        async with self._quota.spending(principal.organization_id, size_of(agent)):
            return await self.store.create_agent(principal, agent)

    async def list_agents(self, principal: Principal, *, limit: int, offset: int) -> AgentPage:
        """List the organization's agents, oldest first."""
        return await self.store.list_agents(principal, limit=limit, offset=offset)

    async def get_agent(self, principal: Principal, agent_ref: str) -> Agent:
        """Read an agent. Raises: AgentNotFound."""
        return await self._lookup.agent(principal, agent_ref)

    async def update_agent(self, principal: Principal, agent_ref: str, body: AgentUpdate) -> Agent:
        """Change what the body sets. Raises: AgentNotFound, InvalidRequest, StorageFull."""
        agent = await self._lookup.agent(principal, agent_ref)
        changed = await self._agents.change(principal, agent, body)
        is_default = None if body.is_default is UNSET else body.is_default
        async with self._quota.spending(principal.organization_id, max(0, size_of(changed) - size_of(agent))):
            return await self.store.update_agent(principal, changed, is_default=is_default)

    async def delete_agent(self, principal: Principal, agent_ref: str) -> None:
        """Delete an agent; its threads stay readable. Raises: AgentNotFound."""
        agent = await self._lookup.agent(principal, agent_ref)
        await self.store.delete_agent(principal, agent.id)
        security.info("agent deleted", extra=security_facts(principal, agent_id=agent.id))

    # Threads

    async def create_thread(
        self, principal: Principal, agent_ref: str, body: ThreadCreate, *, idempotency_key: str | None = None
    ) -> Created:
        """Create a thread, or return the one that the key created before, or that has the external id.

        Raises: AgentNotFound, InvalidRequest, IdempotencyMismatch, StorageFull.
        """
        return await self._creation.create(principal, agent_ref, body, idempotency_key)

    async def list_threads(
        self,
        principal: Principal,
        agent_ref: str,
        *,
        limit: int,
        offset: int,
        archived: bool | None,
        message_limit: int,
        external_id: str | None = None,
    ) -> ThreadPage:
        """List the organization's threads with an agent, which may be deleted. Raises: AgentNotFound."""
        agent = await self._lookup.agent(principal, agent_ref, deleted=True)
        return await self.store.list_threads(
            principal,
            agent.id,
            limit=limit,
            offset=offset,
            archived=archived,
            message_limit=message_limit,
            max_bytes=READ_BYTES,
            external_id=external_id,
        )

    async def find_thread(self, principal: Principal, agent_ref: str, thread_id: str) -> Thread:
        """Read a thread without its messages. Raises: AgentNotFound, ThreadNotFound."""
        return (await self._lookup.thread(principal, agent_ref, thread_id)).thread

    async def get_thread(
        self, principal: Principal, agent_ref: str, thread_id: str, *, message_limit: int = SNAPSHOT_MESSAGES
    ) -> ThreadPart:
        """Read a thread with its latest messages; a run whose process died is ended first.

        Raises: AgentNotFound, ThreadNotFound.
        """
        part = await self._lookup.thread(principal, agent_ref, thread_id, message_limit=message_limit)
        running = [message.id for message in part.thread.messages if message.in_progress]
        repaired = [await self.runner.repairer.repair_if_orphaned(principal, run_id) for run_id in running]
        return await self.store.read(principal, thread_id, message_limit=message_limit) if any(repaired) else part

    async def update_thread(
        self, principal: Principal, agent_ref: str, thread_id: str, body: ThreadUpdate
    ) -> ThreadPart:
        """Change a thread's title, or archive or un-archive it. Raises: AgentNotFound, ThreadNotFound."""
        await self._lookup.thread(principal, agent_ref, thread_id)
        title = None if body.title is UNSET else body.title
        archived = None if body.archived is UNSET else body.archived
        if title is not None or archived is not None:
            thread = await self.store.update(principal, thread_id, title=title, archived=archived)
            self.facts.publish(principal, thread_id, ThreadUpdated(thread))
        return await self.store.read(principal, thread_id, message_limit=SNAPSHOT_MESSAGES)

    async def delete_thread(self, principal: Principal, agent_ref: str, thread_id: str) -> None:
        """Delete a thread with all its messages and files; its run stops. Raises: AgentNotFound, ThreadNotFound."""
        await self._lookup.thread(principal, agent_ref, thread_id)
        running = await self.store.delete(principal, thread_id)
        security.info("thread deleted", extra=security_facts(principal, deleted_thread_id=thread_id))
        self.facts.publish(principal, thread_id, ThreadDeleted(thread_id))
        if running:
            await self.log.signal(running)
        await self.attachments.delete_thread_blobs(principal, thread_id)

    async def generate_title(self, principal: Principal, agent_ref: str, thread_id: str) -> ThreadPart:
        """Generate a title from the messages and store it. It counts as a run while it is generated.

        Raises: AgentNotFound, ThreadNotFound, ThreadEmpty, AgentDeleted, Draining, RateLimited, AgentError.
        """
        part = await self._lookup.thread(principal, agent_ref, thread_id, message_limit=SNAPSHOT_MESSAGES)
        thread = part.thread
        if not thread.messages:
            raise ThreadEmpty(thread_id)
        agent = await self._lookup.agent_of(principal, thread)
        kind = self._registry.kind(agent.kind)
        if self.runner.draining:
            raise Draining
        slot = self.run_slots.reserve(principal.organization_id)
        try:
            run = self.runner.prepare(principal, agent, new_id(), thread.messages)
            title = await generate_title(kind, run, self._timing.title)
        finally:
            slot.release()
        updated = await self.store.update(principal, thread_id, title=title)
        self.facts.publish(principal, thread_id, ThreadUpdated(updated))
        return await self.store.read(principal, thread_id, message_limit=SNAPSHOT_MESSAGES)

    # Attachments

    async def add_files(
        self, principal: Principal, agent_ref: str, thread_id: str, files: Sequence[Upload]
    ) -> list[Attachment]:
        """Store uploaded files for later messages. Raises: AgentNotFound, ThreadNotFound, StorageFull."""
        await self._lookup.thread(principal, agent_ref, thread_id)
        return await self.attachments.add(principal, thread_id, files)

    async def get_attachment(
        self, principal: Principal, agent_ref: str, thread_id: str, attachment_id: str
    ) -> Attachment:
        """Read an attachment's metadata. Raises: AgentNotFound, ThreadNotFound, AttachmentNotFound."""
        await self._lookup.thread(principal, agent_ref, thread_id)
        return await self.attachments.get(principal, thread_id, attachment_id)

    async def read_attachment(
        self, principal: Principal, thread_id: str, attachment: Attachment, start: int, end: int
    ) -> AsyncIterator[bytes]:
        """Read its bytes from `start` to before `end`, in pieces. Raises: BlobUnavailable."""
        return await self.attachments.read(principal, thread_id, attachment, start, end)

    # Messages and runs

    async def list_messages(
        self, principal: Principal, agent_ref: str, thread_id: str, *, before: str | None, limit: int
    ) -> MessagePage:
        """List the latest messages before one of them, oldest first.

        Raises: AgentNotFound, ThreadNotFound, InvalidRequest if `before` is not a message of the thread.
        """
        await self._lookup.thread(principal, agent_ref, thread_id)
        try:
            return await self.store.list_messages(principal, thread_id, before=before, limit=limit)
        except MessageNotFound as error:
            raise InvalidRequest("before", f"{before} is not a message of this thread.") from error

    async def get_message(self, principal: Principal, agent_ref: str, thread_id: str, message_id: str) -> Message:
        """Read a message; if it is a run's whose process died, the run is ended first.

        Raises: AgentNotFound, ThreadNotFound, MessageNotFound.
        """
        await self._lookup.thread(principal, agent_ref, thread_id)
        message = await self._lookup.message(principal, thread_id, message_id)
        if message.in_progress and await self.runner.repairer.repair_if_orphaned(principal, message_id):
            message = await self.store.get_message(principal, thread_id, message_id)
        return message

    async def post_message(
        self,
        principal: Principal,
        agent_ref: str,
        thread_id: str,
        body: MessageCreate,
        *,
        idempotency_key: str | None = None,
        if_busy: IfBusy = "reject",
        files: Sequence[Upload] = (),
        stream: bool = False,
    ) -> Posted:
        """Store the message; a user's message claims the thread and starts its run.

        Args:
            files: become attachments of the thread, behind those that the body names.
            stream: set `Posted.position`, for a call of `stream` that follows.

        Raises: AgentNotFound, ThreadNotFound, ThreadArchived, ThreadBusy, AgentDeleted, IdempotencyMismatch,
        InvalidRequest, Draining, RateLimited, StorageFull.
        """
        return await self._posting.post(
            principal,
            agent_ref,
            thread_id,
            body,
            idempotency_key=idempotency_key,
            if_busy=if_busy,
            files=files,
            stream=stream,
        )

    def check_capacity(self, principal: Principal) -> None:
        """Raises: Draining or RateLimited if no run of this organization can start here now."""
        self._posting.check_capacity(principal)

    async def wait(self, principal: Principal, thread_id: str, run_id: str, seconds: float | None = None) -> Message:
        """Return the run's message once it is finished, or as it is after so many seconds. See Posting.wait."""
        return await self._posting.wait(principal, thread_id, run_id, seconds)

    async def cancel(self, principal: Principal, agent_ref: str, thread_id: str, message_id: str) -> Message:
        """Cancel a run of any process, and return its message as stored. A finished message stays as it is.

        Raises: AgentNotFound, ThreadNotFound, MessageNotFound.
        """
        await self._lookup.thread(principal, agent_ref, thread_id)
        message = await self._lookup.message(principal, thread_id, message_id)
        return await self._posting.cancel(principal, thread_id, message_id) if message.in_progress else message

    # Reading the log

    async def watch(self, principal: Principal, agent_ref: str, thread_id: str, after: str | None) -> Viewer:
        """Follow a thread until it is deleted. Raises: AgentNotFound, ThreadNotFound."""
        await self.get_thread(principal, agent_ref, thread_id, message_limit=1)
        return Viewer(self.store, self.log, principal, thread_id, after=after, timing=self._timing)

    async def stream(self, principal: Principal, thread_id: str, posted: Posted) -> Viewer:
        """Read the log from the posted message's `message.created` to its run's terminal event.

        A replay is read from where the log still has the message; otherwise the stream begins with a snapshot.
        """
        position = posted.position
        if posted.replayed:
            try:
                position = await find_turn(self.log, thread_id, posted.message_id, posted.run_id)
            except LogUnavailable:
                position = None
        return Viewer(
            self.store,
            self.log,
            principal,
            thread_id,
            after=position,
            begin=posted.message_id,
            until=posted.run_id or posted.message_id,
            timing=self._timing,
        )

    async def resume(self, principal: Principal, agent_ref: str, thread_id: str, position: str) -> Viewer | None:
        """Read the rest of a post's stream; None if there is none. Raises: AgentNotFound, ThreadNotFound."""
        await self._lookup.thread(principal, agent_ref, thread_id)
        return await resume(self.store, self.log, principal, thread_id, position, self._timing)

    def _now(self) -> str:
        return timestamp(self._clock())
