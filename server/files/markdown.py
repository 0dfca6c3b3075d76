"""Safe HTML from Markdown or from a client's own HTML, both sanitized. Pure functions.

`content_html` calls this on the event loop for texts that are provably cheap, and in a worker process for the others.

Raw HTML in Markdown is displayed as text: people write `Vec<T>`, and nh3 would drop the `<T>`. Relative URLs are
removed, since a message may be displayed on any page. An image becomes a link: a displayed image would be fetched by
every reader's browser, and its URL could carry data to the author of a document that told the model to include it.
For the same reason an image in a client's own HTML loses its `src`, and readers see its `alt` text.
NULs become U+FFFD, as CommonMark requires, and lone surrogates "?", so that every result is valid UTF-8.

Beyond CommonMark: tables, strikethrough, bare URLs, task lists and footnotes. Footnotes have numbers and no links: a
link needs an id, and one from a message could hide an element of the page that shows it. The task list plugin and
markdown-it's own rule for bare URLs were refused because they are quadratic, and inline footnotes (`^[…]`) likewise.
"""

from __future__ import annotations

import html
import re
import string
from collections.abc import Sequence
from typing import Literal, cast, get_args

import nh3
from linkify_it import LinkifyIt  # type: ignore[import-untyped]
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.rules_core import StateCore
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict
from mdit_py_plugins.footnote import footnote_plugin

from agent_chat.server.files import worker_process
from agent_chat.server.files.worker_process import RequestContext

Source = Literal["markdown", "html", "stored"]
"""`html`: a client's own. `stored`: what this server has made of either before, which stays as it is."""

HTML_BYTES = 4 * 2**20
HTML_RATIO = 8
HTML_FLOOR = 64 * 2**10
"""Every text may grow to this size: the tags of `# a` alone are ten bytes."""

CHEAP_BYTES = 8 * 2**10
CHEAP_HTML_BYTES = 2 * 2**10
_CHEAP_MARKS = 64
_CHEAP_LINES = 16
_CHEAP_CELLS = 256

_ESCAPE_STEP = 64 * 2**10
_URL_CHARS = 2048
_SCHEME = re.compile(r"(?<![a-z0-9.+-])https?\Z", re.IGNORECASE)
_TASK = re.compile(r"\[([ xX])\][ \t\n]+(?=\S)")
_PLAIN = (string.ascii_letters + string.digits + " ,.'\"?;()").encode() + bytes(range(128, 256))
"""Bytes at which no rule of Markdown stops. (A list's `1.` needs a line of its own, and lines are counted.)"""

_CELL = {"align", "colspan", "rowspan"}
_ATTRIBUTES = {
    "*": {"dir"},
    "a": {"href", "title"},
    "code": {"class"},
    "img": {"alt", "title"},  # no src: see the module's docstring
    "ol": {"start"},
    "td": _CELL,
    "th": _CELL,
}
_VALUES = {
    "pre": {"tabindex": {"0"}},
    "li": {"class": {"task-list-item"}},
    "ol": {"class": {"footnotes"}},
}
_LANGUAGE = re.compile(r"language-[\w+#.-]{1,40}")
_DIRECTIONS = {"auto", "ltr", "rtl"}
_DIRECTED = {"paragraph_open", "heading_open", "table_open"}
_LISTS = {"bullet_list_open", "ordered_list_open"}

_LINKIFY = LinkifyIt(options={"fuzzy_link": False, "fuzzy_email": False})
"""Only URLs with a scheme: `README.md` and `setup.py` would be hosts in Moldova and Paraguay."""


def _render_image(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType
) -> str:
    """Render an image as a link with the image's text."""
    token = tokens[index]
    source = str(token.attrGet("src") or "")
    words = renderer.renderInlineAsText(token.children, options, env).strip() or source
    return f'<a href="{html.escape(source)}">{html.escape(words, quote=False)}</a>'


def _render_code(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType
) -> str:
    """Render a focusable code block: it scrolls sideways, so the keyboard must reach it."""
    render = renderer.fence if tokens[index].type == "fence" else renderer.code_block
    return str(render(tokens, index, options, env)).replace("<pre>", '<pre tabindex="0" dir="ltr">', 1)


def _render_footnote(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType
) -> str:
    match tokens[index].type:
        case "footnote_ref":
            return f"<sup>[{tokens[index].meta['id'] + 1}]</sup>"
        case "footnote_block_open":
            return '<hr>\n<ol class="footnotes">\n'
        case "footnote_block_close":
            return "</ol>\n"
        case "footnote_open":
            return "<li>"
        case "footnote_close":
            return "</li>\n"
        case _:  # footnote_anchor, the link back
            return ""


def _link_bare_url(state: StateInline, silent: bool) -> bool:
    """Link a bare http or https URL. Reads at most 2,048 characters ahead, so that the total cost is linear."""
    if state.linkLevel or not state.src.startswith("://", state.pos):
        return False
    if not (scheme := _SCHEME.search(state.src[max(0, state.pos - 6) : state.pos])):
        return False
    start = state.pos - len(scheme[0])
    found = _LINKIFY.match_at_start(state.src[start : min(state.posMax, start + _URL_CHARS)])
    if not found or (not silent and not state.pending.endswith(scheme[0])):
        return False
    url = found.url.rstrip("*_~")  # they close an emphasis around the URL
    target = state.md.normalizeLink(url)
    if not state.md.validateLink(target):
        return False
    if not silent:
        state.pending = state.pending[: -len(scheme[0])]
        state.push("link_open", "a", 1).attrs = {"href": target}
        state.push("text", "", 0).content = url
        state.push("link_close", "a", -1)
    state.pos = start + len(url)
    return True


def _convert_task_items(state: StateCore) -> None:
    """Turn `[ ]` and `[x]` at the beginning of list items into checkboxes."""
    for item, paragraph, inline in zip(state.tokens, state.tokens[1:], state.tokens[2:], strict=False):
        if (item.type, paragraph.type, inline.type) != ("list_item_open", "paragraph_open", "inline"):
            continue
        children = inline.children or []
        task = _TASK.match(inline.content)
        # The text token must match too: if the brackets belong to a link or are escaped, it does not begin with them.
        if not task or not children or children[0].type != "text" or not children[0].content.startswith(task[0][:3]):
            continue
        children[0].content = children[0].content[3:]
        done = task[1] != " "
        box = Token("checkbox", "input", 0, attrs={"type": "checkbox", "disabled": ""})
        box.attrs |= {"checked": "", "aria-label": "Done"} if done else {"aria-label": "To do"}
        children.insert(0, box)
        item.attrSet("class", "task-list-item")


def _set_attributes(state: StateCore) -> None:
    """Set the direction of blocks, and the alignment of cells as an attribute, since styles are not allowed.

    A list has one direction, as on GitHub: its own `auto` ignores elements inside it that have a `dir`.
    """
    depth = 0
    for token in state.tokens:
        if token.type in _LISTS or token.type in ("bullet_list_close", "ordered_list_close"):
            if not depth and token.nesting == 1:
                token.attrSet("dir", "auto")
            depth += token.nesting
        elif token.type in _DIRECTED and not depth:
            token.attrSet("dir", "auto")
        elif style := token.attrs.pop("style", None):
            token.attrs["align"] = str(style).removeprefix("text-align:")


def _build_markdown() -> MarkdownIt:
    markdown = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    markdown.use(footnote_plugin, inline=False)
    markdown.inline.ruler.after("text", "bare_url", _link_bare_url)
    markdown.core.ruler.push("tasks", _convert_task_items)
    markdown.core.ruler.push("attributes", _set_attributes)
    markdown.add_render_rule("image", _render_image)
    markdown.add_render_rule("fence", _render_code)
    markdown.add_render_rule("code_block", _render_code)
    for part in ("ref", "block_open", "block_close", "open", "close", "anchor"):
        markdown.add_render_rule(f"footnote_{part}", _render_footnote)
    return markdown


def _build_cleaner(source: Source) -> nh3.Cleaner:
    """Build the sanitizer. A client's HTML has no `input` elements: its own could ask for a password.

    Those of stored HTML become disabled checkboxes, which is what Markdown makes of a task list.
    """
    boxes = source != "html"
    box = {"type": {"checkbox"}, "disabled": {""}, "checked": {""}, "aria-label": {"Done", "To do"}}
    return nh3.Cleaner(
        tags=(nh3.ALLOWED_TAGS - {"area", "map"}) | ({"input"} if boxes else set()),
        attributes=_ATTRIBUTES,
        tag_attribute_values=_VALUES | ({"input": box} if boxes else {}),
        set_tag_attribute_values={"input": {"type": "checkbox", "disabled": ""}} if source == "stored" else None,
        attribute_filter=_filter_attribute,
        url_schemes={"http", "https", "mailto"},
        url_relative="deny",
        link_rel="noopener noreferrer",
    )


def _filter_attribute(tag: str, name: str, value: str) -> str | None:
    if name == "dir":
        return value if value in _DIRECTIONS else None
    return None if tag == "code" and not _LANGUAGE.fullmatch(value) else value


_MARKDOWN = _build_markdown()
_CLEANERS = {source: _build_cleaner(source) for source in get_args(Source)}


def is_cheap(data: bytes, source: Source) -> bool:
    """Return True if `to_html` provably takes a few milliseconds at most, so that the event loop can call it.

    Every character at which a rule of Markdown stops, and every line, costs up to 80 µs; a table's cells are its
    columns times its lines. A client's HTML costs most by its attributes, which are compared with each other.
    """
    if source != "markdown":
        return len(data) <= CHEAP_HTML_BYTES
    if len(data) > CHEAP_BYTES:
        return False
    lines = data.count(b"\n") + data.count(b"\r") + 1
    marks = len(data.translate(None, _PLAIN))
    return marks <= _CHEAP_MARKS and lines <= _CHEAP_LINES and marks * lines <= _CHEAP_CELLS


def to_html(data: bytes, source: Source) -> str:
    """Convert a text to safe HTML; escape it if the HTML would be too large or too deeply nested.

    Raises:
        MemoryError: the limit of a worker is reached.
    """
    text = data.decode()
    try:
        result = _CLEANERS[source].clean(str(_MARKDOWN.render(text)) if source == "markdown" else text)
    except RecursionError:
        return escape(data)
    fits = len(result.encode()) <= min(HTML_BYTES, max(HTML_RATIO * len(data), HTML_FLOOR))
    return result if fits else escape(data)


def escape(data: bytes) -> str:
    """Escape a text in `<pre>`, truncated to 4 MB."""
    parts: list[bytes] = []
    room = HTML_BYTES
    for start in range(0, len(data), _ESCAPE_STEP):  # in steps, so that a thread releases the GIL in between
        part = data[start : start + _ESCAPE_STEP].replace(b"&", b"&amp;").replace(b"<", b"&lt;").replace(b">", b"&gt;")
        parts.append(part[:room])
        room -= len(part)
        if room < 0:
            break
    body = b"".join(parts)
    if room < 0:
        body = re.sub(rb"&\w*$", b"", body[-8:]).join((body[:-8], "…".encode()))
    return f"<pre>{body.decode(errors='ignore')}</pre>"


def _handle(request: bytes, context: RequestContext) -> bytes:
    """Handle a request of `content_html`: the source, a line end, and the text."""
    source, _, text = request.partition(b"\n")
    return to_html(text, cast(Source, source.decode())).encode()


def main() -> None:
    """Serve requests in a worker process."""
    worker_process.serve(_handle)
