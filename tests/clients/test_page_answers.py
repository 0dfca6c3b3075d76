"""Answers on the demo page: the places of tool cards, images, Markdown, copying, trying again, interrupting."""

from __future__ import annotations

import json
from base64 import b64encode
from typing import TYPE_CHECKING, Any

from agent_chat.server.files.markdown import to_html
from tests.support.browser import Visit, reads
from tests.support.servers import Live

if TYPE_CHECKING:
    from playwright.async_api import Locator

CALCULATE = 'tool calculate {"expression": "6*7"}'
MARKDOWN = """# Title

Text with **bold**, `code`, ~~gone~~, https://example.com/x?a=1 and [a link](https://example.com) in it.

- [x] done
- [ ] to do
  1. inner

> quoted

| left | center | right |
|:-----|:------:|------:|
| a | b | c |

```python
print("a very long line of code")
```

A claim[^1] and فارسی.

[^1]: Its source.
"""
CORNERS = [
    "a_b **http://q.w/e** `http://c` <http://a.b> README.md www.x.com me@x.com ftp://x.y mailto:a@b.c",
    "- [x] a\n- [ ]\n- [ ]x\n- [X] [l](http://e)\n\n  para\n- [](http://x)\n\n1. [ ] q\n   > - [x] deep",
    "> مرحبا\n\n| ا | ب |\n|--|:-:|\n| 1 | `a` |\n\nText\n===\n\n    code\n\n~~~\nx\n~~~",
    "![i](http://e/x.png) ![](http://e/y) [r](/rel) [j](javascript:alert(1)) <b>raw</b> &amp; \\* a\\\nb  \nc",
    "x[^a] y[^b] z[^a] ^[inline] [^c]\n\n[^a]: one\n\n    more\n[^b]: two\n[^c]: three [^a]\n",
    '```a" onclick="alert(1)\nx\n```\n\n[t](http://e "a\\" onclick=\\"alert(1)") [d](data:text/html,x)',
    "<img src=x onerror=alert(1)> <svg/onload=alert(1)> [v](vbscript:x) [e](java&#115;cript:x) <javascript:x>",
    "[^1]: unused\n\n---\n\n***\n1) x\n2) y\n\n* a\n* b\n\n\n+ c",
]
OUTLINE = """
(body) => [...body.children].map((each) => each.matches(".tool") ? "[card]" : each.innerText.replaceAll(/\\s+/g, " "))
"""
SKELETON = """
(root) => {
  const isShown = ({ name }) => !["aria-level", "data-tip"].includes(name); // set where it is shown
  const attributes = (node) => [...node.attributes].filter(isShown).map(({ name, value }) => `${name}=${value}`).sort();
  const of = (node) => node.nodeType === Node.TEXT_NODE
    ? node.data.trim()
    : `<${node.tagName} ${attributes(node)}>` + [...node.childNodes].map(of).filter(Boolean).join("") + "</>";
  return [...root.childNodes].map(of).filter(Boolean);
}
"""
"""Tags, attributes and texts."""
BOTH = f"""
async ([text, html]) => {{
  const {{ blocks, decorate }} = await import("./markdown.js");
  const [page, server] = [document.createElement("div"), document.createElement("div")];
  page.append(...blocks(text, false, {{}}).map(({{ node }}) => node));
  server.append(...decorate(html).childNodes);
  return [page, server].map({SKELETON.strip()});
}}
"""
"""The skeletons of a text rendered in the page, and of the server's HTML."""
SHOW = """
async ({ calls, run }) => {
  const { MessageList } = await import("./messages.js");
  const { EMPTY } = await import("./client.js");
  const container = document.getElementById("messages");
  const list = new MessageList(container, { urlOf: () => "", nameOf: () => "Agent" });
  const message = { id: "m", role: "assistant", content: "", content_html: "", tool_calls: calls, metadata: { run } };
  list.show([message], EMPTY);
}
"""
"""Show an answer with these tool calls and this state of its run."""


def text(markdown: str) -> str:
    return f"text {json.dumps(markdown)}"


def call(result: object) -> dict[str, Any]:
    time = "2026-01-31T12:00:00.000Z"
    times = {"start_time": time, "end_time": time}
    return {"tool_name": "draw", "arguments": {}, "result": result, "error": None, **times}


async def outline(answer: Locator) -> list[str]:
    found: list[str] = await answer.locator(".body").evaluate(OUTLINE)
    return found


async def test_tool_cards_stay_between_the_texts_at_the_end_and_after_a_reload(visit: Visit, server: Live) -> None:
    await visit.choose(mcp_servers=["demo"])
    await visit.say(
        "\n".join(
            [
                text("See [the forecast](https://example.com/a/very/long/address) first:\n\n- one"),
                CALCULATE,
                CALCULATE,
                text("\n\n- two\n\n```\nopen"),
                CALCULATE,
                "hold the last text",
                text("\n\nIt is **sunny**."),
            ]
        )
    )
    before = ["See the forecast first: one", "[card]", "[card]"]
    await visit.page.locator(".tool[data-status=done]").nth(2).wait_for()
    assert (await outline(visit.answer("in_progress")))[:3] == before
    server.gates.release("the last text")
    for _ in range(2):
        answer = visit.answer("completed")
        await reads(answer, "It is sunny.")
        *shown, code, card, last = await outline(answer)
        assert shown == before
        assert code.endswith("open")
        assert (card, last) == ("[card]", "It is sunny.")
        assert await answer.locator("strong").inner_text() == "sunny"
        await visit.page.reload()


async def test_an_answer_looks_the_same_while_it_is_written_and_at_the_end(visit: Visit, server: Live) -> None:
    await visit.choose()
    await visit.say(f"{text(MARKDOWN)}\nhold the same look")
    await reads(visit.answer("in_progress"), "Its source.")
    written = await visit.answer("in_progress").locator(".plain").evaluate(SKELETON)
    server.gates.release("the same look")
    answer = visit.answer("completed")
    assert await answer.locator(".body").evaluate(SKELETON) == written
    assert await answer.locator("input[type=checkbox]:disabled").count() == 2
    assert await answer.locator("input:checked").count() == 1
    assert await answer.locator("td").nth(2).evaluate("cell => getComputedStyle(cell).textAlign") == "right"
    await answer.locator("pre").focus()
    assert await answer.locator("pre:focus").count() == 1


async def test_the_page_renders_markdown_as_the_server_does(visit: Visit) -> None:
    page = await visit.enter()
    for corner in CORNERS:
        rendered, expected = await page.evaluate(BOTH, [corner, to_html(corner.encode(), "markdown")])
        assert rendered == expected


async def test_images_of_a_tool_are_shown_as_images(visit: Visit) -> None:
    page = await visit.enter()
    data = b64encode(await page.screenshot()).decode()
    png = {"type": "image", "data": data, "mimeType": "image/png"}
    svg = {"type": "image", "data": b64encode(b"<svg/>").decode(), "mimeType": "image/svg+xml"}
    bad = {"type": "image", "data": 'x" onerror="alert(1)', "mimeType": "image/png"}
    blocks = [{"type": "text", "text": "A picture"}, png, svg, bad]
    await page.evaluate(
        SHOW, {"calls": [call({"structuredContent": {"rows": [1]}, "content": blocks})], "run": {"status": "completed"}}
    )
    images = page.locator(".tool .images img")
    assert await images.count() == 1
    assert await images.evaluate("image => image.decode().then(() => image.naturalWidth)") == 1280
    assert await images.get_attribute("alt") == "Image 1 of 1 from draw"
    await reads(page.locator(".tool .outcome"), "rows: [1], A picture, image")
    await page.locator(".tool summary").click()
    shown = await page.locator(".tool pre").last.inner_text()
    assert "A picture" in shown
    assert "rows" in shown
    assert data not in shown


async def test_what_a_run_does_before_it_writes_is_shown(visit: Visit) -> None:
    page, answer = await visit.enter(), visit.page.locator(".activity")
    connecting = {"status": "in_progress", "activity": "connecting_to_tools"}
    await page.evaluate(SHOW, {"calls": [], "run": connecting})
    await reads(answer, "Connecting to tools…")


async def test_code_and_answers_are_copied(visit: Visit) -> None:
    await visit.context.grant_permissions(["clipboard-read", "clipboard-write"])
    await visit.choose()
    await visit.say(text("Look:\n\n```js\nlet x = 1;\n```"))
    answer = visit.answer("completed")
    await reads(answer.locator(".code .bar"), "js")
    await answer.locator(".code .copy").click()
    await reads(answer.locator(".code .copy"), "Copied")
    assert await visit.page.evaluate("navigator.clipboard.readText()") == "let x = 1;\n"
    await answer.get_by_role("button", name="Copy this answer").click()
    await reads(answer.locator(".tools .copy"), "Copied")
    assert await visit.page.evaluate("navigator.clipboard.readText()") == (await visit.stored())["content"]


async def test_trying_again_answers_the_same_question(visit: Visit, server: Live) -> None:
    await visit.choose()
    await visit.say("until it works\nsay done now")
    await reads(visit.answer("failed"), "waiting for it works")
    await visit.page.reload()
    server.gates.release("it works")
    await visit.page.get_by_role("button", name="Try again").click()
    await reads(visit.answer("completed"), "done now")
    assert await visit.page.locator("article.user").count() == 1
    agent_id, thread_id = visit.page.url.partition("#/")[2].split("/")
    messages = (await server.get(f"/api/v1/chat/{agent_id}/threads/{thread_id}"))["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "assistant"]


async def test_a_question_of_another_client_can_only_be_sent_again_as_the_button_states(
    visit: Visit, server: Live
) -> None:
    agent = await visit.choose()
    thread = await server.thread(agent["id"])
    await server.post(thread, "until it is asked again\nsay done now")
    await visit.page.goto(f"/#/{agent['id']}/{thread.rpartition('/')[2]}")
    await visit.page.get_by_role("button", name="Ask again").click()
    await visit.page.locator("article.user").nth(1).wait_for()
    await visit.page.get_by_role("button", name="Try again").wait_for()  # this one was sent from here


async def test_after_a_failure_that_is_not_retryable_the_question_can_only_be_sent_again(visit: Visit) -> None:
    await visit.choose()
    await visit.say("fail For good.")
    await visit.answer("failed").get_by_role("button", name="Ask again").click()
    await visit.page.locator("article.assistant[data-status=failed]").nth(1).wait_for()
    await visit.page.locator("article.assistant").last.get_by_role("button", name="Ask again").wait_for()
    assert await visit.page.get_by_role("button", name="Ask again").count() == 1
    assert await visit.page.locator("article.user").count() == 2


async def test_enter_during_an_answer_offers_to_stop_it(visit: Visit, server: Live) -> None:
    page, notice = visit.page, visit.page.locator("#busy")
    await visit.choose(name="Writer")
    await visit.say("say first\nhold an interruption")
    await reads(visit.answer("in_progress"), "first")
    await visit.say("say second")
    await reads(notice, "Writer is still answering.")
    assert await page.locator("#input").input_value() == "say second"
    await notice.get_by_role("button", name="Stop it and send").click()
    await reads(visit.answer("completed"), "second")
    await reads(visit.answer("cancelled"), "first")
    assert await notice.is_hidden()
    assert await page.locator("#input").input_value() == ""


async def test_only_the_demo_agent_has_starting_messages(visit: Visit) -> None:
    await visit.enter()
    await visit.page.locator("#starters button").first.wait_for()
    await visit.choose(name="Other")
    await reads(visit.page.locator("#welcome-name"), "Other")
    assert await visit.page.locator("#starters").is_hidden()


async def test_threads_without_a_title_show_their_first_words(visit: Visit, server: Live) -> None:
    page = visit.page
    agent = await visit.choose()
    for question in ("say oranges\nsay and more", "say apples"):
        thread = await server.thread(agent["id"])
        await server.post(thread, question)
    await server.thread(agent["id"])
    await page.reload()
    await page.locator("#threads li").nth(2).wait_for()
    names = await page.locator("#threads .name").all_inner_texts()
    assert names == ["New thread", "say apples", "say oranges"]
    await page.locator("#threads a", has_text="say apples").click()
    await visit.answer("completed").wait_for()
