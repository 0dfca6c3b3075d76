"""content_html: what comes out is safe and bounded, whatever goes in, and nothing else waits for it. Real workers."""

import asyncio
import os
import re
import signal
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from agent_chat.server.errors import RateLimited
from agent_chat.server.files.content_html import LIMITS, Renderer
from agent_chat.server.files.markdown import HTML_BYTES, Source, is_cheap, to_html
from tests.support.gaps import STEP_SECONDS, gaps

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
from agent_chat.server.files.content_html import Renderer

async def main():
    renderer = Renderer()
    assert "<em>" in await renderer.render_markdown("a", "*large* " * 10_000)
    (worker,) = renderer._workers._alive
    stdin = worker.stdin
    stdin.transport.set_write_buffer_limits(0)
    task = asyncio.create_task(renderer.sanitize("a", "<div>" * DIVS))
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
    assert "<em>" in await renderer.render_markdown(ORG, LARGE)
    return worker_pid(renderer)


async def rendering(renderer: Renderer) -> asyncio.Task[str]:
    """A render that won't end by itself, once the worker has it."""
    await started(renderer)
    endless = asyncio.create_task(renderer.render_markdown(ORG, ENDLESS))
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
    assert await renderer.render_markdown(ORG, content) == html
    assert not renderer._workers.processes  # nothing small needs one


async def test_a_table_keeps_its_alignment_without_a_style(renderer: Renderer) -> None:
    html = await renderer.render_markdown(ORG, "| a | b |\n|---|--:|\n| 1 | 2 |")
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
    assert await renderer.sanitize(ORG, given) == html


@pytest.mark.parametrize("target", ["javascript:alert(1)", "data:text/html,a", "data:image/png;base64,a", "vbscript:a"])
async def test_markdown_makes_no_link_or_image_of_an_unsafe_url(renderer: Renderer, target: str) -> None:
    html = await renderer.render_markdown(
        ORG, f"[a]({target}) ![b]({target}) <{target}> <img src='{target}' onerror='c'>"
    )
    assert "href" not in html
    assert "src=" not in html.replace("&lt;img src=", "")


@pytest.mark.slow
async def test_a_megabyte_of_ordinary_text_is_rendered(renderer: Renderer) -> None:
    html = await renderer.render_markdown(ORG, MEGABYTE)
    assert html.startswith('<p dir="auto">An <em>ordinary</em> sentence')
    assert html.count("<p ") == MEGABYTE.count("\n\n")
    assert await renderer.sanitize(ORG, html) == html


@pytest.mark.slow
@pytest.mark.alone
async def test_a_text_that_takes_too_long_is_escaped_and_the_loop_never_waits_for_it(hasty: Renderer) -> None:
    await started(hasty)
    begun = time.monotonic()
    async with asyncio.timeout(20), gaps() as late:
        assert await hasty.render_markdown(ORG, ENDLESS) == f"<pre>{ENDLESS}</pre>"
    assert time.monotonic() - begun > 0.4
    assert len(late) > 40
    assert max(late) < 0.05
    assert hasty.fallbacks == 1
    assert "<em>" in await hasty.render_markdown(ORG, LARGE)


@pytest.mark.parametrize(
    "content",
    [">" * 50_000, "> " * 50_000, "`" * 100_000, "".join("`" * n + "a" for n in range(450)), "- " * 50_000],
    ids=["quotes", "spaced quotes", "backticks", "growing backticks", "lists"],
)
async def test_deep_nesting_harms_nobody(renderer: Renderer, content: str) -> None:
    async with asyncio.timeout(11):
        assert len(await renderer.render_markdown(ORG, content)) <= 8 * len(content)


@pytest.mark.slow
async def test_html_that_grows_too_much_is_given_up(renderer: Renderer) -> None:
    table = "|a" * 200 + "\n" + "|-" * 200 + "\n" + "|\n" * 300
    assert await renderer.render_markdown(ORG, table) == f"<pre>{table}</pre>"


@pytest.mark.parametrize("text", ["\0\ud800<&>" * 1_000_000, "&" * HTML_BYTES])
async def test_a_text_beyond_all_bounds_is_cut_between_its_characters(renderer: Renderer, text: str) -> None:
    await renderer.close()
    html = await renderer.render_markdown(ORG, text)
    assert len(html.encode()) <= HTML_BYTES + 20
    assert html.endswith(("&amp;…</pre>", "&gt;…</pre>", "&lt;…</pre>", "?…</pre>", "\N{REPLACEMENT CHARACTER}…</pre>"))


async def test_large_texts_of_one_organization_get_their_own_html(renderer: Renderer) -> None:
    texts = [f"{n} {LARGE}" for n in range(3)]
    htmls = await asyncio.gather(*(renderer.render_markdown(ORG, text) for text in texts))
    assert [html.removeprefix('<p dir="auto">')[0] for html in htmls] == ["0", "1", "2"]


@pytest.mark.slow
async def test_a_text_whose_worker_is_killed_is_rendered_by_another(renderer: Renderer) -> None:
    killed = await started(renderer)
    task = asyncio.create_task(renderer.render_markdown(ORG, LARGE * 8))
    await asyncio.sleep(0)
    assert renderer.turns.running == 1
    os.kill(killed, signal.SIGKILL)
    async with asyncio.timeout(10):
        assert "<em>" in await task
    assert worker_pid(renderer) != killed
    assert renderer.fallbacks == 0


async def test_a_cancelled_render_leaves_no_answer_for_the_next(renderer: Renderer) -> None:
    endless = await rendering(renderer)
    endless.cancel()
    async with asyncio.timeout(5):
        assert "<em>" in await renderer.render_markdown(ORG, LARGE)


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
    assert await renderer.render_markdown(ORG, LARGE) == f"<pre>{LARGE}</pre>"
    assert await renderer.render_markdown(ORG, "*small*") == '<p dir="auto"><em>small</em></p>\n'


@pytest.mark.parametrize("divs", [0, 10_000, 50_000], ids=["idle", "busy", "busy for long"])
@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("content", "html"),
    [
        ("see https://a.example/b_c_d?e=1.", '<a href="https://a.example/b_c_d?e=1"'),
        ("(http://a.example/b)", '(<a href="http://a.example/b" rel="noopener noreferrer">http://a.example/b</a>)'),
        ("**https://a.example**", '<strong><a href="https://a.example"'),
        ("[https://a.example](https://b.example)", '<a href="https://b.example" rel="noopener noreferrer">https://a.'),
        ("- [ ] milk", '<li class="task-list-item"><input type="checkbox" disabled="" aria-label="To do"> milk</li>'),
        ("1. [x] tea", '<input type="checkbox" disabled="" checked="" aria-label="Done"> tea</li>'),
        ("- a\n  - [X] b", '<li class="task-list-item"><input type="checkbox" disabled="" checked=""'),
        (
            "a[^1]\n\n[^1]: *note*",
            '<p dir="auto">a<sup>[1]</sup></p>\n<hr>\n<ol class="footnotes">\n<li><p dir="auto"><em>note</em>',
        ),
        ("|a|b|c|\n|:-|:-:|-:|", '<th align="left">a</th>\n<th align="center">b</th>\n<th align="right">c</th>'),
        ("```c++\na\n```", '<pre tabindex="0" dir="ltr"><code class="language-c++">'),
        ("    a\n", '<pre tabindex="0" dir="ltr"><code>a'),
        ("- مرحبا\n- b", '<ul dir="auto">\n<li>مرحبا</li>'),
        ("> a", '<blockquote>\n<p dir="auto">a</p>'),
        ("|a|\n|-|", '<table dir="auto">'),
    ],
)
async def test_what_people_and_models_write_beyond_commonmark(renderer: Renderer, content: str, html: str) -> None:
    assert html in await renderer.render_markdown(ORG, content)


@pytest.mark.parametrize(
    "content",
    [
        "README.md and setup.py, a@b.example, ftp://a.example",
        "`https://a.example` xhttps://a.example",
        "- [y] a\n- [x]b\n- \\[ ] c\n\n[x] d",
        "<input type=text> <input type=checkbox>",
        "a[^2] ^[inline]",
    ],
)
async def test_what_looks_like_a_link_a_task_or_a_footnote_is_text(renderer: Renderer, content: str) -> None:
    html = await renderer.render_markdown(ORG, content)
    for tag in ("<a ", "<input", "<sup"):
        assert tag not in html


@pytest.mark.parametrize(
    "content",
    [
        '[^a"><script>alert(1)</script>]: b\n\n[^a"><script>alert(1)</script>]',
        "[^toString]: a\n\n[^toString] [^__proto__]",
        '```"><script>alert(1)</script>\na\n```',
        '```x" onclick="alert(1)\na\n```',
        'https://a.example/"><script>alert(1)</script>',
        "https://a.example/'onmouseover='alert(1)",
        "- [x] <input onfocus=alert(1)>",
        '|a|\n|:"onclick=1-:|',
        "JAVASCRIPT://a.example/%0aalert(1)",
    ],
)
async def test_nothing_of_a_text_becomes_an_attribute_an_id_or_a_script(renderer: Renderer, content: str) -> None:
    html = await renderer.render_markdown(ORG, content)
    assert "<script" not in html
    tags = re.findall(r"<[^>]*>", html)
    assert not [tag for tag in tags if re.search(r"\s(on\w+|id|name|style)\s*=", tag)]


@pytest.mark.parametrize(
    ("given", "html"),
    [
        ('<input type="password"><input type="checkbox">', ""),
        ('<p dir="rtl">a</p><p dir="x">b</p>', '<p dir="rtl">a</p><p>b</p>'),
        ('<pre tabindex="0">a</pre><pre tabindex="5">b</pre>', '<pre tabindex="0">a</pre><pre>b</pre>'),
        ('<li class="task-list-item x" id="send">a</li>', "<li>a</li>"),
    ],
)
async def test_a_clients_html_has_no_form_and_no_id(renderer: Renderer, given: str, html: str) -> None:
    assert await renderer.sanitize(ORG, given) == html


@pytest.mark.parametrize("unit", ["https://a.example/b?c=d ", "https://a.example\n", "- [ ] a\n", "a[^1] "])
@pytest.mark.slow
async def test_many_urls_tasks_and_footnotes_cost_no_more_each(unit: str) -> None:
    """The plugins that were refused took 16 times as long for four times the text."""

    def seconds(size: int) -> float:
        text = ("[^1]: a\n\n" + unit * (size // len(unit))).encode()
        begun = time.process_time()
        to_html(text, "markdown")
        return time.process_time() - begun

    assert min(seconds(40_000) for _ in range(2)) < 8 * max(seconds(10_000) for _ in range(2))


UNITS = [
    *("_*", "a**b", "**x ", "[", "![", "`", "<", "&amp;", "\\*", "> ", "- ", "|a", "|a|b|\n|-|-|\n", "# a\n", "a~~b"),
    *("[a](b) ", "[a]: b\n", "1. a\n", "*a* ", '<a href="', "<!--", "[[]", "](", "a  \n", "- a\n  ", "> - 1. ", "[^1]"),
    *("[^1]: a\n", "http://", "https://a.b/(", "- [ ] a\n", "\t", "<http://a.b>", "ordinary words, as people write. "),
]
HTML_UNITS = ["<b>", "<b><i>", "<a href=x>", "<p><b>", "<table><b>", "<div>", "<li><b>x</p>", "&amp;", "<p dir=auto>"]


async def stall(render: Callable[[str, str], Awaitable[str]], text: str) -> float:
    """Seconds for which the loop stood still: the least of several, for other causes do not come each time."""
    worst = []
    for _ in range(10):
        async with gaps() as late:
            await asyncio.sleep(0)  # now it measures
            await render(ORG, text)
            await asyncio.sleep(2 * STEP_SECONDS)  # until it has measured
        worst.append(STEP_SECONDS + max(late))  # the sleep that it is late from passes meanwhile
        if worst[-1] < 0.008:
            break
    return min(worst)


@pytest.mark.parametrize("unit", UNITS)
def test_stored_html_of_markdown_is_stable(unit: str) -> None:
    html = to_html((unit * 7 + "\n\n- [x] a\n- [ ] b\n").encode(), "markdown")
    assert to_html(html.encode(), "stored") == html


@pytest.mark.parametrize("unit", HTML_UNITS)
def test_stored_html_of_clients_is_stable(unit: str) -> None:
    html = to_html((unit * 7).encode(), "html")
    assert to_html(html.encode(), "stored") == html


def test_stored_html_has_no_inputs_but_checkboxes_and_no_scripts() -> None:
    html = to_html(b"<form><input type=password name=a><script>1</script><b onclick=x>b</b></form>", "stored")
    # The order of attributes that the sanitizer adds is random.
    assert html in (
        '<input type="checkbox" disabled=""><b>b</b>',
        '<input disabled="" type="checkbox"><b>b</b>',
    )


@pytest.mark.slow
@pytest.mark.alone
async def test_no_text_holds_up_the_event_loop(hasty: Renderer) -> None:
    await started(hasty)
    texts = [(longest_cheap(unit, "markdown"), True) for unit in UNITS]
    texts += [(longest_cheap(unit, "html"), False) for unit in HTML_UNITS]
    texts += [((unit * 16_384)[:16_384], True) for unit in ("_*", "1. a\n", "![", "|a|b|\n|-|-|\n")]
    found = {}
    for text, markdown in texts:
        found[text[:20]] = await stall(hasty.render_markdown if markdown else hasty.sanitize, text)
    worst = max(found, key=lambda text: found[text])
    print(f"the loop stood still for {found[worst] * 1000:.1f} ms at most, by {worst!r}")  # noqa: T201
    assert found[worst] < 0.01


def longest_cheap(unit: str, source: Source) -> str:
    """The longest text of such units that the event loop renders itself."""
    count = 1
    while is_cheap((unit * (count + 1)).encode(), source):
        count += 1
    return unit * count


async def test_one_organizations_texts_do_not_delay_anothers(hasty: Renderer) -> None:
    flood = [asyncio.create_task(hasty.render_markdown("another", ENDLESS)) for _ in range(6)]
    await asyncio.sleep(0)
    assert (hasty.turns.running, hasty.turns.waiting) == (1, 5)
    async with asyncio.timeout(20):
        assert "<em>" in await hasty.render_markdown(ORG, LARGE)
        assert hasty.turns.waiting >= 3
    for task in flood:
        task.cancel()
    await asyncio.wait(flood)


async def test_too_much_waiting_text_is_refused_but_never_an_answer() -> None:
    renderer = Renderer(workers=1)
    flood = [asyncio.create_task(renderer.render_markdown(ORG, ENDLESS)) for _ in range(20)]
    await asyncio.sleep(0)
    refused = [task for task in flood if task.done()]
    assert len(refused) == 20 - 1 - 16
    with pytest.raises(RateLimited):
        await refused[0]
    answer = asyncio.create_task(renderer.render_answer(ORG, LARGE))
    await asyncio.sleep(0)
    assert not answer.done()
    await renderer.close()
    assert await answer == f"<pre>{LARGE}</pre>"
    assert renderer.turns.refused == 3
    await asyncio.gather(*flood, return_exceptions=True)
