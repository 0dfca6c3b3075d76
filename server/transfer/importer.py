"""Import of threads: see `lines` for the format.

All lines of a thread are read and checked before anything of it is stored, and a new thread is stored as a whole, so
that a bad line, a full disk or a killed process leaves whole threads behind, and a repeated import stores the rest.

A thread is found again by its external id, else by its id. A UUID that is free stays the thread's id, and its messages
keep their UUIDs too. Every other id (not a UUID, or taken, mostly by another organization) is replaced by one that is
derived from it, the same in every import. An existing thread gets the messages that it does not have, as messages that
were posted now.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import BinaryIO

import msgspec
from msgspec.structs import replace

from agent_chat.server.files.content_html import Renderer, escape_text
from agent_chat.server.lookup import DEFAULT
from agent_chat.server.transfer.lines import (
    LINE_BYTES,
    BadLine,
    MessageLine,
    ThreadLine,
    build_message,
    decode_line,
)
from agent_chat.server.transfer.progress import Counts
from agent_chat.server.transfer.references import References, UnknownReference
from agent_chat.stores.contracts import Store
from agent_chat.stores.errors import StoreUnavailable, ThreadNotFound
from agent_chat.stores.models import MESSAGE_BYTES, SERVER_FACTS, Message, Principal, Thread, is_id, timestamp
from agent_chat.stores.rules import next_timestamp

_NAMESPACE = uuid.UUID("0b0c5a52-0f5e-5a43-9d0c-6f8f2f0a7c11")
_READ_BYTES = 2**18
_MEMORY_BYTES = 2**20
"""How much of a thread's messages is in memory before they are written to a temporary file."""
_CONCURRENT_THREADS = 16
"""How many threads are stored at the same time, so that one commit serves several."""
_PAGE = 100


class IncomingThread:
    """A thread of the file with its messages, as JSON in memory or, beyond _MEMORY_BYTES, in a temporary file.

    The messages have the ids of the file.
    """

    def __init__(self, line: ThreadLine, principal: Principal, agent_id: str) -> None:
        self.line = line
        self.principal = principal
        self.agent_id = agent_id
        self.message_ids: set[str] = set()
        self._last_given = ""
        self._last_stored: str | None = None
        self._spool = tempfile.SpooledTemporaryFile(_MEMORY_BYTES)  # noqa: SIM115

    @property
    def updated_at(self) -> str:
        """When the thread was changed: the time of its latest message if the file does not say it."""
        if self.line.updated_at is not None:
            return timestamp(self.line.updated_at)
        return self._last_stored or timestamp(self.line.created_at)

    def add(self, number: int, message: Message) -> None:
        """Append a message; one that is not later than the message before it is moved past it. Raises: BadLine."""
        if message.id in self.message_ids:
            raise BadLine(number, f"The thread has a message with the id {message.id!r} already.")
        if message.created_at < self._last_given:
            raise BadLine(number, "created_at is before that of the message above: messages must be in order.")
        self.message_ids.add(message.id)
        self._last_given = message.created_at
        self._last_stored = next_timestamp(message.created_at, self._last_stored)
        data = msgspec.json.encode(replace(message, created_at=self._last_stored))
        if len(data) - len(message.content_html.encode()) > MESSAGE_BYTES:
            raise BadLine(number, f"The message is larger than {MESSAGE_BYTES} bytes.")
        self._spool.write(data + b"\n")

    def messages(self, thread_id: str) -> Iterator[Message]:
        """The messages, with the ids that they have in the thread with this id. Only one iteration at a time."""
        self._spool.seek(0)
        for data in self._spool:
            message = msgspec.json.decode(data, type=Message)
            metadata = message.metadata
            if run := message.run:
                in_reply_to = self.message_id(thread_id, run["in_reply_to"])
                metadata = {**metadata, "run": {**run, "in_reply_to": in_reply_to}}
            id = self.message_id(thread_id, message.id)
            yield replace(message, id=id, thread_id=thread_id, metadata=metadata)

    def message_id(self, thread_id: str, id: str) -> str:
        """The id that the message has in the thread with this id: its own if the thread has its own id too."""
        return id if thread_id == self.line.id and is_id(id) else _derive_id(thread_id, id)

    def close(self) -> None:
        """Delete the temporary file."""
        self._spool.close()


def _derive_id(scope: str, id: str) -> str:
    return str(uuid.uuid5(_NAMESPACE, f"{scope}\n{id}"))


class Importer:
    """Imports threads into one organization.

    Args:
        user_id: for threads whose line names no user, or the id of a user that the organization does not have.
        agent_id: for threads whose line names no agent, or one that the organization does not have.
        report: called after each thread.
    """

    def __init__(
        self,
        store: Store,
        organization_id: str,
        references: References,
        renderer: Renderer,
        *,
        user_id: str | None,
        agent_id: str | None,
        report: Callable[[Counts], None],
    ) -> None:
        self._store = store
        self._organization_id = organization_id
        self._references = references
        self._renderer = renderer
        self._user_id = user_id
        self._agent_id = agent_id
        self._report = report
        self._slots = asyncio.Semaphore(_CONCURRENT_THREADS)
        self.counts = Counts()

    async def run(self, source: BinaryIO) -> None:
        """Import all threads of the file.

        Raises:
            BadLine: the threads above the one with the bad line are stored, that one and those below are not.
            StoreError: any of the latest threads may be stored.
        """
        bad_line: BadLine | None = None
        try:
            async with asyncio.TaskGroup() as group, contextlib.aclosing(self._read_threads(source)) as threads:
                try:
                    async for incoming in threads:
                        await self._slots.acquire()
                        group.create_task(self._store_thread(incoming))
                except BadLine as error:
                    bad_line = error
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        if bad_line is not None:
            raise bad_line

    # reading

    async def _read_threads(self, source: BinaryIO) -> AsyncGenerator[IncomingThread, None]:
        current: IncomingThread | None = None
        async for number, data in _read_lines(source):
            line = decode_line(number, data)
            if isinstance(line, ThreadLine):
                if current is not None:
                    yield current
                current = await self._begin_thread(number, line)
            elif current is None:
                raise BadLine(number, "The file must begin with a thread.")
            else:
                await self._add_message(current, number, line)
        if current is not None:
            yield current

    async def _begin_thread(self, number: int, line: ThreadLine) -> IncomingThread:
        agent = line.agent or (DEFAULT if self._agent_id is None else None)
        try:
            user_id = await self._find(line.user, self._references.user_id, self._user_id)
            agent_id = await self._find(agent, self._references.agent_id, self._agent_id)
        except UnknownReference as error:
            raise BadLine(number, str(error)) from error
        return IncomingThread(line, Principal(self._organization_id, user_id), agent_id)

    async def _find(self, reference: str | None, find: Callable[[str], Awaitable[str]], alternative: str | None) -> str:
        """The id of what the line names; else that of the option."""
        try:
            if reference is None:
                raise UnknownReference("The thread names no user, and there is no option --user.")
            return await find(reference)
        except UnknownReference:
            if alternative is None:
                raise
            return alternative

    async def _add_message(self, thread: IncomingThread, number: int, line: MessageLine) -> None:
        if line.thread_id not in (None, thread.line.id):
            raise BadLine(number, f"thread_id is not the id of the thread above, {thread.line.id!r}.")
        thread.add(number, build_message(line, await self._render(line)))

    async def _render(self, line: MessageLine) -> str:
        if line.content_html is None:
            return await self._renderer.render_answer(self._organization_id, line.content)
        if line.content_html.startswith("<pre>") and line.content_html == escape_text(line.content):
            return line.content_html  # sanitizing it would change its line ends
        return await self._renderer.sanitize_stored(self._organization_id, line.content_html)

    # storing

    async def _store_thread(self, incoming: IncomingThread) -> None:
        try:
            await self._create_or_extend(incoming)
            self._report(self.counts)
        finally:
            incoming.close()
            self._slots.release()

    async def _create_or_extend(self, incoming: IncomingThread) -> None:
        line = incoming.line
        derived = _derive_id(self._organization_id, line.id)
        ids = [line.id, derived] if is_id(line.id) else [derived]
        for id in [*ids, derived]:  # once more than there are ids: another import may store the thread meanwhile
            if found := await self._find_thread(incoming, ids):
                await self._extend(incoming, found)
                return
            thread = Thread(
                id=id,
                agent_id=incoming.agent_id,
                user_id=incoming.principal.user_id,
                organization_id=self._organization_id,
                title=line.title,
                metadata=line.metadata,
                created_at=timestamp(line.created_at),
                updated_at=incoming.updated_at,
                archived=line.archived,
            )
            if await self._store.import_thread(incoming.principal, thread, incoming.messages(id)):
                self.counts.threads += 1
                self.counts.messages += len(incoming.message_ids)
                return
        raise StoreUnavailable(f"thread {line.id} could not be stored under another id")

    async def _find_thread(self, incoming: IncomingThread, ids: list[str]) -> Thread | None:
        external_id = (incoming.line.metadata.get(SERVER_FACTS) or {}).get("external_id")
        if external_id is not None and (
            found := await self._store.find_thread(incoming.principal, incoming.agent_id, external_id)
        ):
            return found
        for id in ids:
            with contextlib.suppress(ThreadNotFound):
                return await self._store.get(incoming.principal, id, message_limit=0)
        return None

    async def _extend(self, incoming: IncomingThread, thread: Thread) -> None:
        """Add the messages that the thread does not have, and the title and state if the file's are newer."""
        principal, line = incoming.principal, incoming.line
        missing = await self._find_missing(incoming, thread)
        archived = thread.archived
        if missing and archived:
            archived = (await self._store.update(principal, thread.id, archived=False)).archived
        for message in incoming.messages(thread.id):
            if message.id in missing:
                await self._store.append_message(principal, message)
        newer = incoming.updated_at > thread.updated_at
        wanted = (line.title, line.archived) if newer else (thread.title, thread.archived)
        changed = wanted != (thread.title, archived)
        if changed:
            await self._store.update(principal, thread.id, title=wanted[0], archived=wanted[1])
        self.counts.messages += len(missing)
        if missing or changed:
            self.counts.extended += 1
        else:
            self.counts.present += 1

    async def _find_missing(self, incoming: IncomingThread, thread: Thread) -> set[str]:
        """The ids of the messages that the stored thread does not have."""
        missing = {incoming.message_id(thread.id, id) for id in incoming.message_ids}
        before: str | None = None
        while missing:
            page = await self._store.list_messages(incoming.principal, thread.id, before=before, limit=_PAGE)
            missing -= {message.id for message in page.messages}
            if not page.messages or (len(page.messages) < _PAGE and not page.cut):
                break
            before = page.messages[0].id
        return missing


async def _read_lines(source: BinaryIO) -> AsyncGenerator[tuple[int, bytes], None]:
    """The lines that are not empty, with their numbers. Reads in a thread, since a pipe may be slow."""
    number = 0
    while batch := await asyncio.to_thread(_read_batch, source):
        for data in batch:
            number += 1
            if not data.isspace():
                yield number, data


def _read_batch(source: BinaryIO) -> list[bytes]:
    batch: list[bytes] = []
    size = 0
    while size < _READ_BYTES and (data := source.readline(LINE_BYTES + 1)):
        batch.append(data)
        size += len(data)
    return batch
