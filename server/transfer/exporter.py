"""Export of threads: see `lines` for the format. What is exported is what `agent-chat import` stores again.

Threads come in the order of their ids, which never changes. Only one page of messages is in memory: pages are read
from the newest to the oldest, as clients read them, and written to a temporary file to be turned around.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import BinaryIO

from agent_chat.server.transfer.lines import encode_message, encode_thread
from agent_chat.server.transfer.progress import Counts
from agent_chat.server.transfer.references import References
from agent_chat.stores.contracts import Store
from agent_chat.stores.errors import ThreadNotFound
from agent_chat.stores.models import Principal, Thread

_PAGE = 100
_MEMORY_BYTES = 8 * 2**20
"""How much of a thread is in memory before it is written to a temporary file."""


class Exporter:
    """Exports the threads of one organization.

    Args:
        user_id: only threads of this user.
        agent_id: only threads with this agent.
        report: called after each thread.
    """

    def __init__(
        self,
        store: Store,
        organization_id: str,
        references: References,
        *,
        user_id: str | None,
        agent_id: str | None,
        report: Callable[[Counts], None],
    ) -> None:
        self._store = store
        self._principal = Principal(organization_id, "")
        self._references = references
        self._user_id = user_id
        self._agent_id = agent_id
        self._report = report
        self.counts = Counts()

    async def run(self, target: BinaryIO) -> None:
        """Write all threads. One that is deleted meanwhile is left out, and so is the message of a run in progress."""
        async for thread in self._threads():
            with suppress(ThreadNotFound):
                self.counts.messages += await self._write_thread(thread, target)
                self.counts.threads += 1
                self._report(self.counts)

    async def _threads(self) -> AsyncIterator[Thread]:
        after: str | None = None
        while page := await self._store.scan_threads(
            self._principal, user_id=self._user_id, agent_id=self._agent_id, after=after, limit=_PAGE
        ):
            for thread in page:
                yield thread
            after = page[-1].id

    async def _write_thread(self, thread: Thread, target: BinaryIO) -> int:
        """Write the thread's lines, all or, if it is deleted meanwhile, none, and return how many messages it has."""
        user = await self._references.user_name(thread.user_id)
        agent = await self._references.agent_name(thread.agent_id)
        with tempfile.SpooledTemporaryFile(_MEMORY_BYTES) as spool:
            count = 0
            ends = [0]
            before: str | None = None
            while True:
                page = await self._store.list_messages(self._principal, thread.id, before=before, limit=_PAGE)
                stored = [message for message in page.messages if not message.in_progress]
                spool.writelines(map(encode_message, stored))
                ends.append(spool.tell())
                count += len(stored)
                if not page.messages or (len(page.messages) < _PAGE and not page.cut):
                    break
                before = page.messages[0].id
            target.write(encode_thread(thread, user=user, agent=agent))
            for start, end in zip(ends[-2::-1], ends[:0:-1], strict=True):
                spool.seek(start)
                target.write(spool.read(end - start))
        return count
