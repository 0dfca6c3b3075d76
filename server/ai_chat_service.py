"""The chat service: what every route and the WebSocket call. It knows no HTTP.

A user's message becomes a run, the run writes the thread's log, and every answer is a reading of that log: this
module claims threads, starts runs, says facts and hands out viewers. `ai_chat_service.md` beside it tells how a
service built around conversations moves here.

Agents are named by an id or by the word `default`: the organization's default agent, or, where a thread is named
too, whatever agent the thread has.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Collection, Mapping, Sequence

import msgspec
from msgspec import UNSET
from msgspec.structs import replace

from agent_chat.agents.mcp.config import Server as McpServer
from agent_chat.agents.registry import Registry
from agent_chat.server.errors import AgentDeleted, AnswerUnknown, Draining, InvalidRequest, ThreadEmpty
from agent_chat.server.facts import FactPublisher
from agent_chat.server.files.attachments import Attachments
from agent_chat.server.files.content_html import Renderer
from agent_chat.server.inputs import (
    FILES,
    AgentCreate,
    AgentUpdate,
    IfBusy,
    MessageCreate,
    ThreadCreate,
    ThreadUpdate,
    Upload,
    fingerprint,
)
from agent_chat.server.limits import Limits, Slots
from agent_chat.server.model_policy import ModelPolicy
from agent_chat.server.quota import Quota, size_of
from agent_chat.server.reading.viewer import Viewer, resumed
from agent_chat.server.runs.runner import Runner
from agent_chat.server.titles import generate_title
from agent_chat.stores.contracts import AgentPage, Created, EventLog, MessagePage, Posted, Store, ThreadPage, ThreadPart
from agent_chat.stores.contracts.storage import RECORD_BYTES
from agent_chat.stores.errors import (
    AgentNotFound,
    Gap,
    LogUnavailable,
    MessageNotFound,
    StoreDamaged,
    StoreUnavailable,
    ThreadArchived,
    ThreadBusy,
    ThreadNotFound,
)
from agent_chat.stores.events import TERMINAL_TYPES, MessageCreated, ThreadDeleted, ThreadUpdated
from agent_chat.stores.fitting import READ_BYTES
from agent_chat.stores.models import (
    Agent,
    Attachment,
    Clock,
    Idempotency,
    Message,
    Principal,
    Thread,
    is_id,
    new_answer,
    new_id,
    timestamp,
    utcnow,
)

security = logging.getLogger("chat.security")

DEFAULT = "default"
CANCEL_SECONDS = 5.0
_POLL_SECONDS = 5.0
_AWAY_SECONDS = 0.5
STORE_SECONDS = 30.0
"""How long a client that waits for an answer is kept waiting for a database that is away."""


class Post(msgspec.Struct, frozen=True):
    """What posting a message did.

    `after`: a position before anything of it was published; None without a stream, or if the log was unreachable.
    """

    posted: Posted
    after: str | None


class AIChatService:
    """Threads, messages, runs and agents for one Principal at a time.

    Args:
        servers: the MCP servers that the operator configured, by name.
        default_kind: the kind of agents that don't say one.
        model_policy: what agents may ask of models.
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
        clock: Clock = utcnow,
    ) -> None:
        self.store = store
        self.log = log
        self.runner = runner
        self.facts = facts
        self.attachments = attachments
        self._quota = quota
        self._registry = registry
        self._renderer = renderer
        self.queues = {"render": renderer.turns, "extract": attachments.turns}
        self._servers = servers
        self._default_kind = default_kind
        self._model_policy = model_policy
        self.run_slots = Slots("runs at once", limits.runs)
        self._clock = clock

    # Agents

    async def create_agent(self, who: Principal, body: AgentCreate) -> Agent:
        """Raises: InvalidRequest for an unknown kind or MCP server, or for more than the operator allows."""
        now = timestamp(self._clock())
        kind = self._default_kind if body.kind is UNSET else body.kind
        agent = Agent(
            id=new_id(),
            organization_id=who.organization_id,
            name=body.name,
            kind=kind,
            model=body.model,
            instructions=body.instructions,
            mcp_servers=body.mcp_servers,
            tools=body.tools,
            max_tokens=body.max_tokens,
            is_default=body.is_default,
            metadata={} if body.metadata is UNSET else body.metadata,
            created_at=now,
            updated_at=now,
        )
        checked = await self._checked(who, agent, AgentCreate.__struct_fields__)
        async with self._quota.spending(who.organization_id, size_of(checked)):
            return await self.store.create_agent(who, checked)

    async def list_agents(self, who: Principal, *, limit: int, offset: int) -> AgentPage:
        """List the organization's agents, the oldest first."""
        return await self.store.list_agents(who, limit=limit, offset=offset)

    async def get_agent(self, who: Principal, agent_ref: str) -> Agent:
        """Raises: AgentNotFound."""
        return await self._agent(who, agent_ref)

    async def update_agent(self, who: Principal, agent_ref: str, body: AgentUpdate) -> Agent:
        """Raises: AgentNotFound, InvalidRequest."""
        agent = await self._agent(who, agent_ref)
        given = {name: value for name, value in msgspec.structs.asdict(body).items() if value is not UNSET}
        changed = replace(agent, **given, updated_at=timestamp(self._clock()))
        is_default = None if body.is_default is UNSET else body.is_default
        checked = await self._checked(who, changed, given)
        async with self._quota.spending(who.organization_id, max(0, size_of(checked) - size_of(agent))):
            return await self.store.update_agent(who, checked, is_default=is_default)

    async def delete_agent(self, who: Principal, agent_ref: str) -> None:
        """Raises: AgentNotFound."""
        agent = await self._agent(who, agent_ref)
        await self.store.delete_agent(who, agent.id)
        security.info("agent deleted", extra=_by(who, agent_id=agent.id))

    async def _checked(self, who: Principal, agent: Agent, given: Collection[str]) -> Agent:
        """The agent, once those fields of it that a client has sent are known to be allowed. Raises: InvalidRequest."""
        if agent.kind not in self._registry:
            raise InvalidRequest("kind", f"There is no kind {agent.kind!r}; there are {', '.join(self._registry)}.")
        self._model_policy.check(agent, given)
        if "mcp_servers" in given:
            await self._check_servers(who, agent.mcp_servers)
        return agent

    async def _check_servers(self, who: Principal, names: Sequence[str]) -> None:
        """Another organization's server is unknown, like one that does not exist. Raises: InvalidRequest."""
        organization = await self.store.find_organization(who.organization_id)
        for index, name in enumerate(names):
            server = self._servers.get(name)
            if server is None or not server.serves(who.organization_id, organization.name if organization else None):
                raise InvalidRequest(f"mcp_servers[{index}]", f"The operator configured no MCP server {name!r}.")

    # Threads

    async def create_thread(
        self, who: Principal, agent_ref: str, body: ThreadCreate, *, idempotency_key: str | None = None
    ) -> Created:
        """Raises: AgentNotFound, InvalidRequest, IdempotencyMismatch."""
        agent = await self._agent(who, agent_ref)
        if body.agent_id is not UNSET and body.agent_id != agent.id:
            raise InvalidRequest("agent_id", "agent_id must be the agent of the path.")
        now = timestamp(self._clock())
        thread = Thread(
            id=new_id(),
            agent_id=agent.id,
            user_id=who.user_id,
            organization_id=who.organization_id,
            title="" if body.title is UNSET else body.title,
            metadata={} if body.metadata is UNSET else body.metadata,
            created_at=now,
            updated_at=now,
            archived=False,
        )
        async with self._quota.spending(who.organization_id, RECORD_BYTES + size_of(thread)) as spent:
            made = await self.store.create(who, thread, _idempotency(idempotency_key, body))
        if not made.replayed:
            return made
        spent.give_back()
        part = await self.store.read(who, made.thread.id, message_limit=50)
        return replace(made, thread=part.thread, cut=part.cut)

    async def list_threads(
        self, who: Principal, agent_ref: str, *, limit: int, offset: int, archived: bool | None, message_limit: int
    ) -> ThreadPage:
        """Raises: AgentNotFound."""
        agent = await self._agent(who, agent_ref, deleted=True)
        return await self.store.list_threads(
            who,
            agent.id,
            limit=limit,
            offset=offset,
            archived=archived,
            message_limit=message_limit,
            max_bytes=READ_BYTES,
        )

    async def get_thread(
        self, who: Principal, agent_ref: str, thread_id: str, *, message_limit: int = 50
    ) -> ThreadPart:
        """Raises: AgentNotFound, ThreadNotFound."""
        part = await self._read(who, agent_ref, thread_id, message_limit)
        healed = [await self.runner.heal(who, message.id) for message in part.thread.messages if message.in_progress]
        return await self.store.read(who, thread_id, message_limit=message_limit) if any(healed) else part

    async def update_thread(self, who: Principal, agent_ref: str, thread_id: str, body: ThreadUpdate) -> ThreadPart:
        """Raises: AgentNotFound, ThreadNotFound."""
        thread = await self._thread(who, agent_ref, thread_id)
        title = None if body.title is UNSET else body.title
        archived = None if body.archived is UNSET else body.archived
        if title is not None or archived is not None:
            thread = await self.store.update(who, thread_id, title=title, archived=archived)
            self.facts.publish(who, thread_id, ThreadUpdated(thread))
        return await self.store.read(who, thread.id, message_limit=50)

    async def delete_thread(self, who: Principal, agent_ref: str, thread_id: str) -> None:
        """Delete it with all its messages; a run that has it stops. Raises: AgentNotFound, ThreadNotFound."""
        await self._thread(who, agent_ref, thread_id)
        running = await self.store.delete(who, thread_id)
        security.info("thread deleted", extra=_by(who, deleted_thread_id=thread_id))
        self.facts.publish(who, thread_id, ThreadDeleted(thread_id))
        if running:
            await self.log.signal(running)
        await self.attachments.delete_thread_blobs(who, thread_id)

    async def generate_title(self, who: Principal, agent_ref: str, thread_id: str) -> ThreadPart:
        """Generate and store a title; it counts as a run while it is generated.

        Raises: AgentNotFound, ThreadNotFound, ThreadEmpty, AgentDeleted, Draining, RateLimited, AgentError.
        """
        thread = (await self._read(who, agent_ref, thread_id, message_limit=50)).thread
        if not thread.messages:
            raise ThreadEmpty(thread_id)
        agent = await self._living_agent(who, thread)
        kind = self._registry.kind(agent.kind)
        if self.runner.draining:
            raise Draining
        slot = self.run_slots.reserve(who.organization_id)
        try:
            title = await generate_title(kind, self.runner.prepared(who, agent, new_id(), thread.messages))
        finally:
            slot.release()
        updated = await self.store.update(who, thread_id, title=title)
        self.facts.publish(who, thread_id, ThreadUpdated(updated))
        return await self.store.read(who, thread_id, message_limit=50)

    # Attachments

    async def find_thread(self, who: Principal, agent_ref: str, thread_id: str) -> Thread:
        """The thread without messages: what an upload checks before it takes a body.

        Raises: AgentNotFound, ThreadNotFound.
        """
        return await self._thread(who, agent_ref, thread_id)

    async def add_files(
        self, who: Principal, agent_ref: str, thread_id: str, files: Sequence[Upload]
    ) -> list[Attachment]:
        """Keep uploaded files for later messages. Raises: AgentNotFound, ThreadNotFound, StorageFull."""
        await self._thread(who, agent_ref, thread_id)
        return await self.attachments.add(who, thread_id, files)

    async def get_attachment(self, who: Principal, agent_ref: str, thread_id: str, attachment_id: str) -> Attachment:
        """Raises: AgentNotFound, ThreadNotFound, AttachmentNotFound."""
        await self._thread(who, agent_ref, thread_id)
        return await self.attachments.get(who, thread_id, attachment_id)

    async def read_attachment(
        self, who: Principal, thread_id: str, attachment: Attachment, start: int, end: int
    ) -> AsyncIterator[bytes]:
        """Its bytes, in pieces. Raises: BlobUnavailable."""
        return await self.attachments.read(who, thread_id, attachment, start, end)

    # Messages and runs

    async def list_messages(
        self, who: Principal, agent_ref: str, thread_id: str, *, before: str | None, limit: int
    ) -> MessagePage:
        """Raises: AgentNotFound, ThreadNotFound, InvalidRequest if `before` isn't a message of the thread."""
        await self._thread(who, agent_ref, thread_id)
        try:
            return await self.store.list_messages(who, thread_id, before=before, limit=limit)
        except MessageNotFound as error:
            raise InvalidRequest("before", f"{before} is not a message of this thread.") from error

    async def get_message(self, who: Principal, agent_ref: str, thread_id: str, message_id: str) -> Message:
        """Raises: AgentNotFound, ThreadNotFound, MessageNotFound."""
        await self._thread(who, agent_ref, thread_id)
        message = await self._message(who, thread_id, message_id)
        if message.in_progress and await self.runner.heal(who, message_id):
            message = await self.store.get_message(who, thread_id, message_id)
        return message

    async def post_message(
        self,
        who: Principal,
        agent_ref: str,
        thread_id: str,
        body: MessageCreate,
        *,
        idempotency_key: str | None = None,
        if_busy: IfBusy = "reject",
        files: Sequence[Upload] = (),
        stream: bool = False,
    ) -> Post:
        """Store the message and, if it is the user's, claim the thread and start its run.

        `files` become attachments of the thread and stand behind those that the body names. `stream`: a `stream` of
        the post follows; only that needs the log's position.

        Raises: AgentNotFound, ThreadNotFound, ThreadArchived, ThreadBusy, AgentDeleted, IdempotencyMismatch,
        InvalidRequest, Draining, StorageFull.
        """
        thread = await self._thread(who, agent_ref, thread_id)
        idempotency = _idempotency(idempotency_key, body, files)
        after = await self._tail(thread_id) if stream else None
        if idempotency and (replayed := await self.store.replay(who, thread_id, idempotency)):
            answer = replayed.answer
            if replayed.unpublished:
                self.facts.publish(who, thread_id, MessageCreated(replayed.message))
            if not (answer and answer.in_progress and await self.runner.heal(who, answer.id)):
                return Post(replayed, after)
        agent = await self._living_agent(who, thread)
        if thread.archived:
            raise ThreadArchived(thread_id)
        attachments = await self.attachments.get_referenced(
            who, thread_id, [reference.id for reference in body.attachments]
        )
        if len(attachments) + len(files) > FILES:
            raise InvalidRequest("files", f"A message may have at most {FILES} attachments.")
        added = await self.attachments.add(who, thread_id, files)
        try:
            message = await self._made(who, thread_id, body, attachments + added)
            async with self._quota.spending(who.organization_id, RECORD_BYTES + size_of(message)) as spent:
                posted = await self._stored(who, agent, message, idempotency, if_busy)
                if posted.replayed:
                    spent.give_back()
        except StoreUnavailable:  # it may be stored all the same
            raise
        except Exception:
            await self.attachments.remove(who, thread_id, added)
            raise
        brought_before = [each for each in added if each not in posted.message.attachments]
        await self.attachments.remove(who, thread_id, brought_before)
        return Post(posted, after)

    def check_room(self, who: Principal) -> None:
        """Raises: Draining or RateLimited if no run of this organization can start here now."""
        if self.runner.draining:
            raise Draining
        self.run_slots.check(who.organization_id)

    async def _stored(
        self, who: Principal, agent: Agent, message: Message, idempotency: Idempotency | None, if_busy: IfBusy
    ) -> Posted:
        """Store the message; a user's claims the thread and starts its run."""
        if message.role == "user":
            return await self._claim(who, agent, message, idempotency, if_busy)
        posted = await self.store.append_message(who, message, idempotency)
        if not posted.replayed or posted.unpublished:
            self.facts.publish(who, message.thread_id, MessageCreated(posted.message))
        return posted

    async def _claim(
        self, who: Principal, agent: Agent, question: Message, idempotency: Idempotency | None, if_busy: IfBusy
    ) -> Posted:
        if self.runner.draining:
            raise Draining
        answer = new_answer(question.thread_id, question.id, agent.model, question.created_at)

        def claim() -> Awaitable[Posted]:
            return self.store.claim(who, question, answer, worker=self.runner.worker, idempotency=idempotency)

        with self.run_slots.starting(who.organization_id) as slot:
            try:
                posted = await claim()
            except ThreadBusy as busy:
                if not await self._freed(who, question.thread_id, busy.message_id, if_busy):
                    raise
                posted = await claim()
            if posted.replayed:
                slot.release()
            else:
                self.runner.start(who, agent, posted, slot)
        return posted

    async def _freed(self, who: Principal, thread_id: str, run_id: str, if_busy: IfBusy) -> bool:
        """True if the run that has the thread was ended: a dead one always, a living one with `interrupt`."""
        if await self.runner.heal(who, run_id):
            return True
        if if_busy == "interrupt":
            await self._cancel(who, thread_id, run_id)
            return True
        return False

    async def wait(self, who: Principal, thread_id: str, run_id: str, seconds: float | None = None) -> Message:
        """The run's message once it is finished, or as it is after that many seconds.

        The run itself, or the log if another process has it, tells when to ask the store; that is asked every five
        seconds all the same.

        Raises: ThreadNotFound, MessageNotFound; AnswerUnknown if the database has been unreachable for 30 seconds,
        has refused for 30 seconds to store the run's end (a full disk), or is unreachable when the time is over.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while True:
                    here = self.runner.has(run_id)
                    if here:
                        patience = STORE_SECONDS - self.runner.unstored_seconds(run_id)
                        await self.runner.until_stored(run_id, max(0.0, min(patience, _POLL_SECONDS)))
                    position = None if here else await self._tail(thread_id)
                    message = await self._asked(who, thread_id, run_id, STORE_SECONDS)
                    if not message.in_progress:
                        return message
                    if self.runner.unstored_seconds(run_id) >= STORE_SECONDS:
                        raise AnswerUnknown(thread_id, run_id)
                    if not here:
                        await self._until_end(thread_id, position)
        return await self._asked(who, thread_id, run_id, 0.0)

    async def _asked(self, who: Principal, thread_id: str, run_id: str, patience: float) -> Message:
        """The run's message. Raises: AnswerUnknown after so many seconds in which the database did not answer."""
        until = time.monotonic() + patience
        while True:
            try:
                return await self.store.get_message(who, thread_id, run_id)
            except StoreDamaged:
                raise
            except StoreUnavailable as error:
                if time.monotonic() >= until:
                    raise AnswerUnknown(thread_id, run_id) from error
                await asyncio.sleep(_AWAY_SECONDS)

    async def _tail(self, thread_id: str) -> str | None:
        """The log's last position; null while the log is away."""
        try:
            return await self.log.tail(thread_id)
        except LogUnavailable:
            return None

    async def _until_end(self, thread_id: str, position: str | None) -> None:
        """Read the log until a run has ended, it can't be followed, or it is time to ask the store."""
        if position is None:
            await asyncio.sleep(_AWAY_SECONDS)
            return
        cursor = self.log.cursor(thread_id, position)
        try:
            async with asyncio.timeout(_POLL_SECONDS):
                while not any(entry.type in _TURNS for entry in await cursor.next()):
                    pass
        except (Gap, LogUnavailable, TimeoutError):
            pass
        finally:
            cursor.close()

    async def cancel(self, who: Principal, agent_ref: str, thread_id: str, message_id: str) -> Message:
        """Stop that run, from any process; the message as kept. A finished one stays as it is.

        Raises: AgentNotFound, ThreadNotFound, MessageNotFound.
        """
        await self._thread(who, agent_ref, thread_id)
        message = await self._message(who, thread_id, message_id)
        return await self._cancel(who, thread_id, message_id) if message.in_progress else message

    async def _cancel(self, who: Principal, thread_id: str, run_id: str) -> Message:
        """Tell the owner; after five seconds without an end, end the run in its place."""
        await self.store.cancel(who, thread_id, run_id)
        await self.log.signal(run_id)
        message = await self.wait(who, thread_id, run_id, CANCEL_SECONDS)
        if message.in_progress and (record := await self.store.find_record(who, run_id)):
            await self.runner.repair(record)
            message = await self.store.get_message(who, thread_id, run_id)
        return message

    # Reading the log

    async def watch(self, who: Principal, agent_ref: str, thread_id: str, after: str | None) -> Viewer:
        """Follow a thread for as long as it exists. Raises: AgentNotFound, ThreadNotFound."""
        await self.get_thread(who, agent_ref, thread_id, message_limit=1)
        return Viewer(self.store, self.log, who, thread_id, after=after)

    async def stream(self, who: Principal, thread_id: str, post: Post) -> Viewer:
        """The log from the posted message's `message.created` to its run's end.

        A replayed post is read from where the log still has it, else it begins with a snapshot.
        """
        posted = post.posted
        after: str | None = post.after
        if posted.replayed:
            try:
                after = await self.log.find(thread_id, posted.message_id, posted.run_id)
            except LogUnavailable:
                after = None
        return Viewer(
            self.store,
            self.log,
            who,
            thread_id,
            after=after,
            begin=posted.message_id,
            until=posted.run_id or posted.message_id,
        )

    async def resume(self, who: Principal, agent_ref: str, thread_id: str, position: str) -> Viewer | None:
        """The rest of a post's stream; null if there is none. Raises: AgentNotFound, ThreadNotFound."""
        await self._thread(who, agent_ref, thread_id)
        return await resumed(self.store, self.log, who, thread_id, position)

    # Steps

    async def _agent(self, who: Principal, agent_ref: str, *, deleted: bool = False) -> Agent:
        if agent_ref == DEFAULT:
            return await self.store.get_agent(who, None)
        if not is_id(agent_ref):
            raise AgentNotFound(agent_ref)
        return await self.store.get_agent(who, agent_ref, deleted=deleted)

    async def _living_agent(self, who: Principal, thread: Thread) -> Agent:
        try:
            return await self.store.get_agent(who, thread.agent_id)
        except AgentNotFound as error:
            raise AgentDeleted(thread.agent_id) from error

    async def _thread(self, who: Principal, agent_ref: str, thread_id: str) -> Thread:
        return (await self._read(who, agent_ref, thread_id, message_limit=0)).thread

    async def _read(self, who: Principal, agent_ref: str, thread_id: str, message_limit: int) -> ThreadPart:
        if agent_ref != DEFAULT:
            await self._agent(who, agent_ref, deleted=True)
        if not is_id(thread_id):
            raise ThreadNotFound(thread_id)
        part = await self.store.read(who, thread_id, message_limit=message_limit)
        if agent_ref not in (DEFAULT, part.thread.agent_id):
            raise ThreadNotFound(thread_id)
        return part

    async def _message(self, who: Principal, thread_id: str, message_id: str) -> Message:
        if not is_id(message_id):
            raise MessageNotFound(message_id)
        return await self.store.get_message(who, thread_id, message_id)

    async def _made(
        self, who: Principal, thread_id: str, body: MessageCreate, attachments: list[Attachment]
    ) -> Message:
        if body.content_html is UNSET:
            html = await self._renderer.render_markdown(who.organization_id, body.content)
        else:
            html = await self._renderer.sanitize(who.organization_id, body.content_html)
        return Message(
            id=new_id(),
            thread_id=thread_id,
            content=body.content,
            content_html=html,
            role=body.role,
            tool_calls=[],
            attachments=attachments,
            metadata={} if body.metadata is UNSET else body.metadata,
            created_at=timestamp(self._clock()),
        )


def _by(who: Principal, **facts: str) -> dict[str, str]:
    """The facts of a security event: who did it, and to what."""
    return {"organization_id": who.organization_id, "user_id": who.user_id, **facts}


_TURNS = TERMINAL_TYPES | {"thread.deleted"}


def _idempotency(key: str | None, body: msgspec.Struct, files: Sequence[Upload] = ()) -> Idempotency | None:
    """The key with what must be the same when it comes again: the body, and the files by name and content."""
    if key is None:
        return None
    return Idempotency(key, fingerprint(body, *(f"{file.filename}\n{file.sha256}" for file in files)))
