"""content_html: what comes out is safe and bounded, whatever goes in, and nothing else waits for it. Real workers."""

import asyncio
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from server.content_html import LIMITS, Renderer
from server.markdown import HTML_BYTES
from tests.units.gaps import gaps

LARGE = (
    "An *ordinary* sentence with `code` and a [link](https://example.com/a), as people write them. " * 5 + "\n\n"
) * 50
MEGABYTE = LARGE * (2**20 // len(LARGE))
ORG = "an organization"
ENDLESS = "[" * 1_000_000
"""Takes ten seconds."""
HASTY = replace(LIMITS, cpu_seconds=0.5)

SERVER = """
import asyncio
from server.content_html import Renderer

async def main():
    renderer = Renderer()
    assert "<em>" in await renderer.markdown("a", "*large* " * 10_000)
    (worker,) = renderer._workers._alive
    stdin = worker.stdin
    stdin.transport.set_write_buffer_limits(0)
    task = asyncio.create_task(renderer.sanitized("a", "<div>" * DIVS))
    await asyncio.sleep(0)
    await stdin.drain()  # now the worker has all of it
    assert renderer.turns.running == (DIVS > 0)
    print("here", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
async def renderer() -> AsyncIterator[Renderer]:
    renderer = Renderer()
    yield renderer
    async with asyncio.timeout(5):
        await renderer.close()


@pytest.fixture
async def hasty() -> AsyncIterator[Renderer]:
    """One that gives a text half a second."""
    renderer = Renderer(limits=HASTY)
    yield renderer
    async with asyncio.timeout(5):
        await renderer.close()


def worker_pid(renderer: Renderer) -> int:
    (worker,) = renderer._workers._alive
    return worker.pid


async def started(renderer: Renderer) -> int:
    """The worker's pid, once it has answered."""
    assert "<em>" in await renderer.markdown(ORG, LARGE)
    return worker_pid(renderer)


async def rendering(renderer: Renderer) -> asyncio.Task[str]:
    """A render that won't end by itself, once the worker has it."""
    await started(renderer)
    endless = asyncio.create_task(renderer.markdown(ORG, ENDLESS))
    await asyncio.sleep(0)
    assert renderer.turns.running == 1
    return endless


@pytest.mark.parametrize(
    ("content", "html"),
    [
        ("", ""),
        ("# Hello *you*", '<h1 dir="auto">Hello <em>you</em></h1>\n'),
        ("~~no~~ **yes**", '<p dir="auto"><s>no</s> <strong>yes</strong></p>\n'),
        ("3. c\n4. d", '<ol start="3" dir="auto">\n<li>c</li>\n<li>d</li>\n</ol>\n'),
        (
            "```python\na < b\n```",
            '<pre tabindex="0" dir="ltr"><code class="language-python">a &lt; b\n</code></pre>\n',
        ),
        ("```c$\na\n```", '<pre tabindex="0" dir="ltr"><code>a\n</code></pre>\n'),
        ("a `Vec<T>` or Vec<T>", '<p dir="auto">a <code>Vec&lt;T&gt;</code> or Vec&lt;T&gt;</p>\n'),
        ("[a](https://b.example)", '<p dir="auto"><a href="https://b.example" rel="noopener noreferrer">a</a></p>\n'),
        (
            "<https://b.example>",
            '<p dir="auto"><a href="https://b.example" rel="noopener noreferrer">https://b.example</a></p>\n',
        ),
        (
            "![*a* & b](https://b.example/c.png?d=1&e)",
            '<p dir="auto"><a href="https://b.example/c.png?d=1&amp;e" rel="noopener noreferrer">a &amp; b</a></p>\n',
        ),
        (
            "![](https://b.example/c)",
            '<p dir="auto"><a href="https://b.example/c" rel="noopener noreferrer">https://b.example/c</a></p>\n',
        ),
        (
            "[a](/logout) ![b](//evil.example)",
            '<p dir="auto"><a rel="noopener noreferrer">a</a> <a rel="noopener noreferrer">b</a></p>\n',
        ),
        ("a\0b \ud800 😀", '<p dir="auto">a\N{REPLACEMENT CHARACTER}b ? 😀</p>\n'),
    ],
)
async def test_markdown_becomes_html(renderer: Renderer, content: str, html: str) -> None:
    assert await renderer.markdown(ORG, content) == html
    assert not renderer._workers.processes  # nothing small needs one


async def test_a_table_keeps_its_alignment_without_a_style(renderer: Renderer) -> None:
    html = await renderer.markdown(ORG, "| a | b |\n|---|--:|\n| 1 | 2 |")
    assert "<th>a</th>" in html
    assert '<td align="right">2</td>' in html
    assert "style" not in html


@pytest.mark.parametrize(
    ("given", "html"),
    [
        ("<p>fine <b>bold</b></p>", "<p>fine <b>bold</b></p>"),
        ('<code class="language-c++">a</code><p class="x">b</p>', '<code class="language-c++">a</code><p>b</p>'),
        ('<code class="language-c x">a</code>', "<code>a</code>"),
        ("a<script>alert(1)</script>b", "ab"),
        ("<style>*{}</style>a", "a"),
        ('<p style="position:fixed" onclick="alert(1)" id="x">a</p>', "<p>a</p>"),
        ("<img src=x onerror=alert(1)>", "<img>"),
        ("<img src='data:image/svg+xml,<svg onload=alert(1)>'>", "<img>"),
        ("<img src='https://a.example/b' srcset='https://a.example/c' alt='a cat'>", '<img alt="a cat">'),
        ("<picture><source srcset='https://a.example/b'><img src='//a.example/c'></picture>a", "<img>a"),
        ("<svg onload=alert(1)><script>alert(1)</script></svg>a", "a"),
        ("<iframe src='https://a.example'></iframe>a", "a"),
        ("<form action='https://a.example'><input name=a><button>b</button></form>", "b"),
        ("<a href='javascript:alert(1)'>a</a>", '<a rel="noopener noreferrer">a</a>'),
        ("<a href=' JaVa\tScript&#58;alert(1)'>a</a>", '<a rel="noopener noreferrer">a</a>'),
        ("<a href='vbscript:a'>a</a>", '<a rel="noopener noreferrer">a</a>'),
        (
            "<a href='https://a.example' rel='opener' target='_top'>a</a>",
            '<a href="https://a.example" rel="noopener noreferrer">a</a>',
        ),
        ("<base href='https://a.example'><meta http-equiv=refresh><link rel=stylesheet href=b><object data=c>a", "a"),
        ("<math><mtext><table><mglyph><style><!--</style><img title='--><img src onerror=alert(1)>'>", ""),
        ("<!-- a --><p>b", "<p>b</p>"),
        ("\0\udfff", "\N{REPLACEMENT CHARACTER}?"),
    ],
)
async def test_a_clients_html_is_stripped_of_what_is_not_safe(renderer: Renderer, given: str, html: str) -> None:
    assert await renderer.sanitized(ORG, given) == html


@pytest.mark.parametrize("target", ["javascript:alert(1)", "data:text/html,a", "data:image/png;base64,a", "vbscript:a"])
async def test_markdown_makes_no_link_or_image_of_an_unsafe_url(renderer: Renderer, target: str) -> None:
    html = await renderer.markdown(ORG, f"[a]({target}) ![b]({target}) <{target}> <img src='{target}' onerror='c'>")
    assert "href" not in html
    assert "src=" not in html.replace("&lt;img src=", "")


async def test_a_megabyte_of_ordinary_text_is_rendered(renderer: Renderer) -> None:
    html = await renderer.markdown(ORG, MEGABYTE)
    assert html.startswith('<p dir="auto">An <em>ordinary</em> sentence')
    assert html.count("<p ") == MEGABYTE.count("\n\n")
    assert await renderer.sanitized(ORG, html) == html


async def test_a_text_that_takes_too_long_is_escaped_and_the_loop_never_waits_for_it(hasty: Renderer) -> None:
    await started(hasty)
    begun = time.monotonic()
    async with asyncio.timeout(20), gaps() as late:
        assert await hasty.markdown(ORG, ENDLESS) == f"<pre>{ENDLESS}</pre>"
    assert time.monotonic() - begun > 0.4
    assert len(late) > 40
    assert max(late) < 0.05
    assert hasty.given_up == 1
    assert "<em>" in await hasty.markdown(ORG, LARGE)


@pytest.mark.parametrize(
    "content",
    [">" * 50_000, "> " * 50_000, "`" * 100_000, "".join("`" * n + "a" for n in range(450)), "- " * 50_000],
    ids=["quotes", "spaced quotes", "backticks", "growing backticks", "lists"],
)
async def test_deep_nesting_harms_nobody(renderer: Renderer, content: str) -> None:
    async with asyncio.timeout(11):
        assert len(await renderer.markdown(ORG, content)) <= 8 * len(content)


async def test_html_that_grows_too_much_is_given_up(renderer: Renderer) -> None:
    table = "|a" * 200 + "\n" + "|-" * 200 + "\n" + "|\n" * 300
    assert await renderer.markdown(ORG, table) == f"<pre>{table}</pre>"


@pytest.mark.parametrize("text", ["\0\ud800<&>" * 1_000_000, "&" * HTML_BYTES])
async def test_a_text_beyond_all_bounds_is_cut_between_its_characters(renderer: Renderer, text: str) -> None:
    await renderer.close()
    html = await renderer.markdown(ORG, text)
    assert len(html.encode()) <= HTML_BYTES + 20
    assert html.endswith(("&amp;…</pre>", "&gt;…</pre>", "&lt;…</pre>", "?…</pre>", "\N{REPLACEMENT CHARACTER}…</pre>"))


async def test_large_texts_of_one_organization_get_their_own_html(renderer: Renderer) -> None:
    texts = [f"{n} {LARGE}" for n in range(3)]
    htmls = await asyncio.gather(*(renderer.markdown(ORG, text) for text in texts))
    assert [html.removeprefix('<p dir="auto">')[0] for html in htmls] == ["0", "1", "2"]


async def test_a_text_whose_worker_is_killed_is_rendered_by_another(renderer: Renderer) -> None:
    killed = await started(renderer)
    task = asyncio.create_task(renderer.markdown(ORG, LARGE * 8))
    await asyncio.sleep(0)
    assert renderer.turns.running == 1
    os.kill(killed, signal.SIGKILL)
    async with asyncio.timeout(10):
        assert "<em>" in await task
    assert worker_pid(renderer) != killed
    assert renderer.given_up == 0


async def test_a_cancelled_render_leaves_no_answer_for_the_next(renderer: Renderer) -> None:
    endless = await rendering(renderer)
    endless.cancel()
    async with asyncio.timeout(5):
        assert "<em>" in await renderer.markdown(ORG, LARGE)


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
async def test_closing_leaves_no_process(renderer: Renderer, busy: bool) -> None:
    endless = await rendering(renderer) if busy else None
    pid = worker_pid(renderer) if busy else await started(renderer)
    async with asyncio.timeout(1):  # it doesn't wait for the text
        await renderer.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    if endless:
        assert await endless == f"<pre>{ENDLESS}</pre>"
    assert await renderer.markdown(ORG, LARGE) == f"<pre>{LARGE}</pre>"
    assert await renderer.markdown(ORG, "*small*") == '<p dir="auto"><em>small</em></p>\n'


@pytest.mark.parametrize("divs", [0, 10_000, 50_000], ids=["idle", "busy", "busy for long"])
async def test_no_worker_outlives_a_server_that_was_killed(divs: int) -> None:
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SERVER.replace("DIVS", str(divs))),
        stdout=PIPE,
        stderr=PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert server.stdout is not None
    assert server.stderr is not None
    async with asyncio.timeout(15):
        assert await server.stdout.readline() == b"here\n"
        server.kill()
        assert await server.stderr.read() == b""  # the worker holds it as well, so it ends with the last of the two
        await server.wait()
