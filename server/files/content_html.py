"""A message's `content_html`: made when the message is complete, here if that is certainly cheap, else in a worker.

Whether a text is rendered depends on the text alone: a worker has 4 s of its own CPU time for it, which a queue, a slow
start or a busy machine does not shorten. A text that takes more is shown as it is, in `<pre>`. The largest ordinary
message, 1 MB, takes 1.2 s, and up to twice that where other processes compete for the caches: 2 s were too few.
"""

from __future__ import annotations

import asyncio
import logging

from agent_chat.server.errors import RateLimited
from agent_chat.server.files.markdown import HTML_BYTES, escaped, is_cheap, to_html
from agent_chat.server.files.turns import QueueFull, Turns
from agent_chat.server.files.worker import WorkerFailed, WorkerLimits, Workers

LIMITS = WorkerLimits(
    cpu_seconds=4.0,
    wall_seconds=120.0,  # it gives way to the server
    memory_bytes=2**30,
    file_bytes=0,
    reply_bytes=HTML_BYTES + 2**16,
    processes=0,
    requests=10_000,
    resident_bytes=300 * 2**20,
    nice=5,
)
WORKERS = 2
WAITING_BYTES = 16 * 2**20
"""Of texts that one organization may have waiting."""
_OVERHEAD_BYTES = 4 * 2**10
_RETRY_SECONDS = 5
_SMALL_BYTES = 64 * 2**10

logger = logging.getLogger(__name__)


class Renderer:
    """Makes the HTML of messages. Opened and closed in the lifespan; a worker starts when one is first needed.

    Attributes:
        turns: its `waiting`, `running` and `refused` are numbers for metrics.
        given_up: how many texts are shown as they are.
    """

    def __init__(self, *, workers: int = WORKERS, limits: WorkerLimits = LIMITS) -> None:
        self.turns = Turns(workers, most_waiting=WAITING_BYTES)
        self.given_up = 0
        self._workers = Workers("agent_chat.server.files.markdown", limits, self.turns)

    async def markdown(self, organization_id: str, content: str) -> str:
        """Render Markdown to safe HTML; escaped in `<pre>` if that takes too much time, memory or room.

        The HTML is at most 8 times the text (or 64 KB, if that is more) and at most 4 MB.

        Raises: RateLimited, if the organization has too much text waiting.
        """
        return await self._html(organization_id, _encoded(content), markdown=True, bounded=True)

    async def answer(self, organization_id: str, content: str) -> str:
        """Render a run's answer: as `markdown`, but never refused. The number of runs bounds what waits."""
        return await self._html(organization_id, _encoded(content), markdown=True, bounded=False)

    async def sanitized(self, organization_id: str, html: str) -> str:
        """Remove what is not safe from a client's HTML; bounds, fallback and errors as for `markdown`."""
        return await self._html(organization_id, _encoded(html), markdown=False, bounded=True)

    async def close(self) -> None:
        """End the workers and wait until they are gone. Texts that need one are escaped from now on."""
        await self._workers.close()

    async def _html(self, organization_id: str, data: bytes, *, markdown: bool, bounded: bool) -> str:
        if is_cheap(data, markdown):
            try:
                return to_html(data, markdown)
            except Exception as error:  # a bug of a library's, which must not cost the message
                logger.warning("a text of %d bytes is shown as it is: %s", len(data), type(error).__name__)
                self.given_up += 1
                return escaped(data)
        request = (b"m" if markdown else b"h") + data
        weight = len(data) + _OVERHEAD_BYTES
        for last in (False, True):
            try:
                return (await self._workers.call(organization_id, request, weight=weight, bounded=bounded)).decode()
            except QueueFull as error:
                what = "bytes of text waiting to be rendered"
                raise RateLimited(what, WAITING_BYTES, _RETRY_SECONDS) from error
            except (WorkerFailed, UnicodeDecodeError) as error:
                # A kill from outside says nothing about the text; a text that crashes a worker does so twice.
                if not last and isinstance(error, WorkerFailed) and error.reason in ("crash", "start"):
                    continue
                logger.warning("a text of %d bytes is shown as it is: %s", len(data), error)
                break
        self.given_up += 1
        return escaped(data) if len(data) <= _SMALL_BYTES else await asyncio.to_thread(escaped, data)


def unrendered(content: str) -> str:
    """The text as it is, in `<pre>`."""
    return escaped(_encoded(content))


def _encoded(text: str) -> bytes:
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace")
