"""A message's `content_html`, rendered when the message is complete: on the event loop if cheap, else in a worker.

Whether a text is rendered depends only on the text: a worker has 4 s of its own CPU time for it, which no queue, slow
start or busy machine shortens. A text that takes longer is escaped in `<pre>`. The largest ordinary message, 1 MB,
takes 1.2 s, and up to twice that where other processes compete for the CPU's caches, so a limit of 2 s was too low.
"""

from __future__ import annotations

import asyncio
import logging

from agent_chat.server.errors import RateLimited
from agent_chat.server.files.markdown import HTML_BYTES, Source, escape, is_cheap, to_html
from agent_chat.server.files.turns import QueueFull, Turns
from agent_chat.server.files.worker import WorkerFailed, WorkerLimits, Workers

LIMITS = WorkerLimits(
    cpu_seconds=4.0,
    wall_seconds=120.0,  # workers run at a lower priority than the server
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
"""The largest total size of the texts in one organization's queue."""
_OVERHEAD_BYTES = 4 * 2**10
_RETRY_SECONDS = 5
_SMALL_BYTES = 64 * 2**10

logger = logging.getLogger(__name__)


class Renderer:
    """Renders the HTML of messages. Opened and closed in the lifespan; a worker starts when it is first needed.

    Attributes:
        turns: the queue for the workers; its `waiting`, `running` and `refused` are read by the metrics.
        fallbacks: number of texts that were escaped because they could not be rendered.
    """

    def __init__(self, *, workers: int = WORKERS, limits: WorkerLimits = LIMITS) -> None:
        self.turns = Turns(workers, max_waiting=WAITING_BYTES)
        self.fallbacks = 0
        self._workers = Workers("agent_chat.server.files.markdown", limits, self.turns)

    async def render_markdown(self, organization_id: str, content: str) -> str:
        """Render Markdown to safe HTML, or escape it in `<pre>` if rendering takes too much time, memory or space.

        The HTML is at most 8 times the text (or 64 KB, if that is more) and at most 4 MB.

        Raises:
            RateLimited: the organization's queue is full.
        """
        return await self._render(organization_id, _to_utf8(content), "markdown", bounded=True)

    async def render_answer(self, organization_id: str, content: str) -> str:
        """Render a run's answer: as `render_markdown`, but never refused, since the limit on runs bounds the queue."""
        return await self._render(organization_id, _to_utf8(content), "markdown", bounded=False)

    async def sanitize(self, organization_id: str, html: str) -> str:
        """Sanitize a client's HTML; bounds, fallback and errors as for `render_markdown`."""
        return await self._render(organization_id, _to_utf8(html), "html", bounded=True)

    async def sanitize_stored(self, organization_id: str, html: str) -> str:
        """Sanitize HTML that this or another server has made, which does not change it. Never refused."""
        return await self._render(organization_id, _to_utf8(html), "stored", bounded=False)

    async def close(self) -> None:
        """Kill the workers and wait until they have ended. From now on texts that need one are escaped."""
        await self._workers.close()

    async def _render(self, organization_id: str, data: bytes, source: Source, *, bounded: bool) -> str:
        if is_cheap(data, source):
            try:
                return to_html(data, source)
            except Exception as error:  # a bug in a library must not cost the message
                logger.warning(
                    "Markdown or HTML of %d bytes could not be rendered and is escaped: %s",
                    len(data),
                    type(error).__name__,
                )
                self.fallbacks += 1
                return escape(data)
        request = f"{source}\n".encode() + data
        weight = len(data) + _OVERHEAD_BYTES
        for last in (False, True):
            try:
                return (await self._workers.call(organization_id, request, weight=weight, bounded=bounded)).decode()
            except QueueFull as error:
                what = "bytes of text waiting to be rendered"
                raise RateLimited(what, WAITING_BYTES, _RETRY_SECONDS) from error
            except (WorkerFailed, UnicodeDecodeError) as error:
                # One retry: the worker may have been killed from outside; a text that crashes workers does so twice.
                if not last and isinstance(error, WorkerFailed) and error.reason in ("crash", "start"):
                    continue
                logger.warning(
                    "Markdown or HTML of %d bytes could not be rendered and is escaped: %s", len(data), error
                )
                break
        self.fallbacks += 1
        return escape(data) if len(data) <= _SMALL_BYTES else await asyncio.to_thread(escape, data)


def escape_text(content: str) -> str:
    """Escape a text in `<pre>`, without rendering it."""
    return escape(_to_utf8(content))


def _to_utf8(text: str) -> bytes:
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace")
