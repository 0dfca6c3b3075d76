"""A message's `content_html`: Markdown rendered, or a client's own HTML, and either of them sanitized.

`ai_chat_service` and the runner call this when a message is complete. What is small and quick is done where it is
called. The rest goes to one worker process, because neither library can be interrupted and a thread would share the
GIL. The worker is a bare interpreter that runs this file and reads frames from its stdin, which is safe beside
threads. `multiprocessing` was refused: it imports the server's `__main__` once more and brings threads of its own.

The kernel is the clock: the worker arms a timer over its own CPU time for each text, and dies of SIGPROF when that
runs out. So a queue, a slow start or a busy machine costs a text nothing, and a worker whose server was killed ends
too: idle at the end of its stdin, busy when its time is over.

Raw HTML in Markdown is shown as text: people write `Vec<T>`, and nh3 would drop the `<T>`. Relative URLs go, since
nobody knows on which page a message is shown. An image in Markdown becomes a link: shown, every reader's browser would
fetch it unasked, and whoever talked a model into naming it (a document can) would read in its URL what the model put
there. For the same reason an image in a client's own HTML loses its `src`, and readers see its `alt` text. NULs become
U+FFFD, as CommonMark has it, and lone surrogates "?", so that every result is valid UTF-8.
"""

from __future__ import annotations

import asyncio
import gc
import html
import logging
import os
import re
import signal
import struct
import sys
from collections.abc import Sequence

import nh3
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict

SMALL_BYTES = 16 * 2**10
WORK_SECONDS = 2.0
"""The worker's CPU time for one text."""
WAIT_SECONDS = 10.0
"""How long a text waits in all: for its turn, for the worker to start, and for its result."""
HTML_BYTES = 4 * 2**20
HTML_RATIO = 8
HTML_FLOOR = 64 * 2**10
"""What any text may grow to: `# a` alone is ten bytes of tags."""

_FRAME = struct.Struct("!?Q")
"""Before every text: whether it is Markdown, and its length."""
_CELL = {"align", "colspan", "rowspan"}
_ATTRIBUTES = {
    "a": {"href", "title"},
    "code": {"class"},
    "img": {"alt", "title"},  # no src: see the module's docstring
    "ol": {"start"},
    "td": _CELL,
    "th": _CELL,
}
_LANGUAGE = re.compile(r"language-[\w+#.-]{1,40}")
_MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])


def _linked(renderer: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType) -> str:
    """An image as a link with its text."""
    token = tokens[index]
    source = str(token.attrGet("src") or "")
    words = renderer.renderInlineAsText(token.children, options, env).strip() or source
    return f'<a href="{html.escape(source)}">{html.escape(words, quote=False)}</a>'


_MARKDOWN.add_render_rule("image", _linked)
_CLEANER = nh3.Cleaner(
    tags=nh3.ALLOWED_TAGS - {"area", "map"},
    attributes=_ATTRIBUTES,
    attribute_filter=lambda _, name, value: None if name == "class" and not _LANGUAGE.fullmatch(value) else value,
    url_schemes={"http", "https", "mailto"},
    url_relative="deny",
    link_rel="noopener noreferrer",
)

logger = logging.getLogger(__name__)


class Renderer:
    """Makes the HTML of messages. Opened and closed in the lifespan; its worker starts with the first large text."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._worker: asyncio.subprocess.Process | None = None
        self._ready = False
        self._closed = False

    async def markdown(self, content: str) -> str:
        """Render Markdown (CommonMark, tables, strikethrough) to safe HTML; escaped in `<pre>` if that takes too much.

        Never raises for any text. The HTML is at most 8 times the text (or 64 KB, if that is more) and at most 4 MB.
        """
        return await self._html(_encoded(content), markdown=True)

    async def sanitized(self, html: str) -> str:
        """Strip a client's HTML of all that isn't safe; bounds and fallback as for `markdown`."""
        return await self._html(_encoded(html), markdown=False)

    async def close(self) -> None:
        """End the worker and wait until it is gone. A large text is escaped from now on, one in progress as well."""
        self._closed = True
        self._kill()
        async with self._lock:
            await self._reap()

    async def _html(self, data: bytes, markdown: bool) -> str:
        if _quick(data):
            return to_html(data, markdown)
        try:
            async with asyncio.timeout(WAIT_SECONDS), self._lock:
                return await self._ask(data, markdown)
        except (OSError, EOFError, RuntimeError) as error:  # RuntimeError: uvloop, when the pipe is already closed
            logger.warning("a text of %d bytes is shown as it is: %r", len(data), error)
            return escaped(data)

    async def _ask(self, data: bytes, markdown: bool) -> str:
        if not self._ready or self._worker is None or self._worker.returncode is not None:
            await self._reap()
            self._worker = await self._start()
        self._ready = False
        try:
            stdin, stdout = self._worker.stdin, self._worker.stdout
            assert stdin is not None
            assert stdout is not None
            stdin.write(_FRAME.pack(markdown, len(data)) + data)
            await stdin.drain()
            _, size = _FRAME.unpack(await stdout.readexactly(_FRAME.size))
            reply = await stdout.readexactly(size)
            self._ready = True
            return reply.decode()
        except (EOFError, ConnectionError):  # it died: asyncio's watcher must be the one that reaps it, not a kill
            await self._worker.wait()
            raise
        finally:  # on a timeout or a cancellation too: the next text must not read this one's reply
            if not self._ready:
                self._kill()

    async def _start(self) -> asyncio.subprocess.Process:
        if self._closed:
            raise EOFError("the renderer is closed")
        # -P: this directory's module names must not hide anybody else's. A session of its own: Ctrl-C is the server's
        # to handle. The limit is above any reply, so that reading never pauses and the end of a dead worker is seen.
        worker = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", __file__),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=2 * HTML_BYTES,
            start_new_session=True,
        )
        if self._closed:
            worker.kill()
        return worker

    def _kill(self) -> None:
        if self._worker is not None and self._worker.returncode is None:
            try:
                self._worker.kill()
            except ProcessLookupError:
                pass

    async def _reap(self) -> None:
        if self._worker is not None:
            await self._worker.wait()
            self._worker = None


def _encoded(text: str) -> bytes:
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace")


def _quick(data: bytes) -> bool:
    """Whether the calling thread can do it: some kilobytes of brackets or of table rows would take it a second."""
    if len(data) > SMALL_BYTES:
        return False
    rows = data.count(b"\n") + data.count(b"\r") + 1
    return data.count(b"[") + data.count(b"<") <= 1_000 and (data.count(b"|") + data.count(b">")) * rows <= 20_000


def to_html(data: bytes, markdown: bool) -> str:
    """The safe HTML of a text, within its bounds, or else the text escaped."""
    text = data.decode()
    try:
        result = _CLEANER.clean(_rendered(text) if markdown else text)
    except Exception:
        logger.exception("a text of %d bytes is shown as it is", len(data))
        return escaped(data)
    fits = len(result.encode()) <= min(HTML_BYTES, max(HTML_RATIO * len(data), HTML_FLOOR))
    return result if fits else escaped(data)


def _rendered(text: str) -> str:
    tokens = _MARKDOWN.parse(text)
    for token in tokens:  # a column's alignment comes as a style, which nobody may have
        if style := token.attrs.pop("style", None):
            token.attrs["align"] = str(style).removeprefix("text-align:")
    return str(_MARKDOWN.renderer.render(tokens, _MARKDOWN.options, {}))


def escaped(data: bytes) -> str:
    """The text in `<pre>`, cut where it would be more than 4 MB."""
    body = html.escape(data[:HTML_BYTES].decode(errors="ignore"), quote=False).encode()
    if len(data) > HTML_BYTES or len(body) > HTML_BYTES:
        body = re.sub(rb"&\w*$", b"", body[:HTML_BYTES]) + "…".encode()
    return f"<pre>{body.decode(errors='ignore')}</pre>"


def work() -> None:
    """Answer frames on stdin with frames on stdout until stdin ends: what the worker process does."""
    gc.disable()  # a megabyte is made a third faster; the garbage goes between two texts
    while header := sys.stdin.buffer.read(_FRAME.size):
        markdown, size = _FRAME.unpack(header)
        if len(data := sys.stdin.buffer.read(size)) < size:
            return
        if sys.platform != "win32":
            signal.setitimer(signal.ITIMER_PROF, WORK_SECONDS)
        reply = to_html(data, markdown).encode()
        if sys.platform != "win32":
            signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(_FRAME.pack(markdown, len(reply)) + reply)
        sys.stdout.buffer.flush()
        gc.collect()


if __name__ == "__main__":
    try:
        work()
    except (BrokenPipeError, struct.error):  # the server went away in the middle of a frame
        os._exit(1)  # at once: an ordinary exit would flush into the broken pipe, and complain
